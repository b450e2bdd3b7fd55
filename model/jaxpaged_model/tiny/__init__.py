"""The embedded model: a small Llama that completes Python, and the script that trained it."""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).with_name("tiny-python-Q8_0.gguf")
"""The GGUF file that ``jaxpaged`` runs when no model is named."""
