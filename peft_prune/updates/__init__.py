"""What happens to the weights that stay: the third part of a recipe."""
