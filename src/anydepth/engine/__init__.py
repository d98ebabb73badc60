"""The fast engine: prefill and decoding of Llama-like decoders at the speed of the memory."""
