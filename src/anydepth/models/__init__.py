"""Load a base model, and describe its structure for all other modules."""
