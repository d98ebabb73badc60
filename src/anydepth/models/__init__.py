"""Loading a base model, and the structural view of it that everything else goes through."""
