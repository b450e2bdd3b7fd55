"""``jaxpaged bench-serve``: load on a server, and what its clients see."""
