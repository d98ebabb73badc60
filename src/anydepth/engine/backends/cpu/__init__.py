"""The compiled kernels and their callers: the only place with ctypes."""
