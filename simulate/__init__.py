"""The scheduler and the batcher as they are, with workers, callers and time that are only played."""
