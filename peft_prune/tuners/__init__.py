"""The tuners: what all methods share (`layer`, `model`), and one folder a method."""
