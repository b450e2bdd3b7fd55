"""Whole generations inside XLA programs.

``loop`` prefills, decodes and samples; ``stream`` runs it a few steps at a time, ``beams`` searches,
``speculative`` drafts tokens from the text so far. ``prompts`` and ``request`` check arguments,
``sampling`` has the chain of samplers, ``prefill`` what beams and drafts begin with.
"""

from jaxpaged.generation.beams import beam_search
from jaxpaged.generation.loop import (
    FINISH_LENGTH,
    FINISH_NAN,
    FINISH_OUT_OF_PAGES,
    FINISH_STOP,
    LimitVocab,
    generate,
)
from jaxpaged.generation.request import ContextShift
from jaxpaged.generation.sampling import SamplingParams, sample
from jaxpaged.generation.speculative import generate_lookup, lookup_stream
from jaxpaged.generation.stream import generate_stream

__all__ = [
    "FINISH_LENGTH",
    "FINISH_NAN",
    "FINISH_OUT_OF_PAGES",
    "FINISH_STOP",
    "ContextShift",
    "LimitVocab",
    "SamplingParams",
    "beam_search",
    "generate",
    "generate_lookup",
    "generate_stream",
    "lookup_stream",
    "sample",
]
