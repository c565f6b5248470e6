"""Datasets: shards, their index, the cache and the stream of batches."""
