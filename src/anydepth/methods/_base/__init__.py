"""What every method has: its contract, and the parts of methods that are trained and calibrated."""
