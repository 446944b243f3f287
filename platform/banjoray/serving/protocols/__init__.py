"""The request and answer shapes of the clients that people already have."""
