"""What the engine computes with, one folder per backend; `choice.py` chooses one for a model."""
