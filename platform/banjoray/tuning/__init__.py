"""A space in, the best checkpoint out."""
