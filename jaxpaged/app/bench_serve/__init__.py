"""``jaxpaged bench-serve``: servers under load, measured from their clients."""
