"""The decode loop: sequences, sampler, scheduler."""
