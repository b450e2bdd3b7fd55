"""Attention over paged keys and values: one operation, several implementations."""

from jaxpaged.attention.api import IMPLEMENTATIONS, candidates, choose, paged_attention
from jaxpaged.attention.base import merge_states

__all__ = ["IMPLEMENTATIONS", "candidates", "choose", "merge_states", "paged_attention"]
