"""Weights on disk: every released layout can be read, written and converted."""
