"""Thin programs over `pipeline`."""
