"""How many units stay, and which compete: the second part of a recipe."""
