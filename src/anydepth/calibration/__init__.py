"""Setting what training leaves open: skip sets, thresholds, budgets."""
