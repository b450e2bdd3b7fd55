"""Attention on Hopper GPUs: a Mosaic GPU kernel."""
