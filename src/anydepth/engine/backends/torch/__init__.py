"""PyTorch's own operators: any device, and the fallback of every other backend."""
