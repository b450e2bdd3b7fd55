"""Weights that stay quantized in memory: their formats, how they lie there, and products with them.

``formats`` says what a GGUF type's numbers are, ``panels`` how a matrix of them is kept, ``linear`` has the layers of a
model, and ``product`` chooses who computes them on a platform.
"""
