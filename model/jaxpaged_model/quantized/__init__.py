"""Weights that stay in memory as a file has them.

``formats`` defines their types, ``panels`` and ``lanes`` the layouts of matrices in memory, ``linear``
the layers of a model; ``product`` chooses the implementation of products on a platform.
"""
