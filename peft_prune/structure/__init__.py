"""Heads and neurons: where they live, which to remove, and a model without them."""
