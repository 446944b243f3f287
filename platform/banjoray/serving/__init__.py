"""A version in, HTTP answers out."""
