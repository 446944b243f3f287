"""Rows and a model in, a checkpoint out."""
