"""Text to windows, losses, training on transformers' Trainer, and checkpoints."""
