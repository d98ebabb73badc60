"""Quality and speed, always beside full depth; the schema of results."""
