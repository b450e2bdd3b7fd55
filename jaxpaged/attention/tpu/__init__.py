"""Attention on TPUs: a Pallas kernel."""
