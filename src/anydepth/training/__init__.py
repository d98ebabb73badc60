"""Read text as windows, train on transformers' Trainer, and save checkpoints."""
