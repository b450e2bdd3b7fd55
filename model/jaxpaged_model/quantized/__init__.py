"""Weights that stay quantized in memory.

``formats`` defines GGUF's types, ``panels`` and ``lanes`` the layouts of matrices in memory, ``linear``
the layers of a model; ``product`` chooses the implementation of products on a platform.
"""
