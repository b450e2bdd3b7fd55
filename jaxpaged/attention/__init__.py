"""Attention over paged keys and values: one operation, several implementations."""

from jaxpaged.attention.api import IMPLEMENTATIONS, paged_attention
from jaxpaged.attention.base import merge_states

__all__ = ["IMPLEMENTATIONS", "merge_states", "paged_attention"]
