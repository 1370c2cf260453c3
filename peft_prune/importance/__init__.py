"""What ranks units: the first part of a recipe."""
