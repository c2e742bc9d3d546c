"""One token of self-modifying Titans in few operations."""
