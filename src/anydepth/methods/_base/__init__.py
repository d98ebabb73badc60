"""The contract of methods, and the parts of methods that are trained and calibrated."""
