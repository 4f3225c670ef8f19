"""One process per GPU, or per CPU slice: holds models, forms batches, runs them, publishes results."""
