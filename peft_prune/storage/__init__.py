"""The stored form of masks and values, and its checks, on tensors alone."""
