"""A transformer, and where to cut it."""
