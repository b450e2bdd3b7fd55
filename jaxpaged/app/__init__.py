"""The command line and the server; the one package that imports both the cache and the models."""
