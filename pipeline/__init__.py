"""Everything with input and output: shards and their stream, storage, training, evaluation."""
