"""A flat key space of named byte strings: local, S3 or any fsspec URL."""
