"""Thresholds and budgets: what training leaves open, set on text within a bound."""
