"""Generation with an adapted model: drafting and verifying, and the fast engine."""
