"""Compiled programs on disk: the ``executable_cache``, and the ``cache_folder`` it lies in."""
