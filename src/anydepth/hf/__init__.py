"""Methods' gates on the Hugging Face model itself: sparse and masked layers, and their cache."""
