"""Values of codes that are indices of a table, for encoders and for kernels."""

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Codebook of iq4_nl, in units of the scale; denser where numbers are frequent."""
