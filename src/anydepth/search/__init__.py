"""Search skip sets, and the first weights of a router, without training."""
