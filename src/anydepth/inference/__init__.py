"""Running an adapted model: generation, and (issue 3) the fast engine."""
