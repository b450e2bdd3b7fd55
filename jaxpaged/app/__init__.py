"""The command line: the one room that knows both the cache and the models."""
