"""Speculative decoding: drafters, how long a draft is worth it, verification, and the training of a drafter."""
