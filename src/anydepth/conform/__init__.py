"""A conformance check of OpenAI-compatible servers, and of speculative decoders in them.

Only the standard library is used: a server of any implementation is checked over HTTP, with none of anydepth's models.
"""
