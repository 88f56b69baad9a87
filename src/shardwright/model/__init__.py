"""Compute: a slice of a transformers model with paged attention."""
