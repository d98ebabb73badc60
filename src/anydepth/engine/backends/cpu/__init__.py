"""The compiled kernels, and all that calls them: the only place with ctypes."""
