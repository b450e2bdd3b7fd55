"""Whole generations inside XLA programs.

``loop`` prefills, decodes and samples; ``api`` runs it at once, ``stream`` a few steps at a time.
``beams`` and ``lookup`` are ways to choose tokens in it; ``prompts`` and ``request`` check arguments,
``sampling`` has the chain of samplers, ``result`` what comes out; ``scoring`` reads given texts.
"""

from jaxpaged.generation.api import beam_search, generate
from jaxpaged.generation.loop import LimitVocab, run
from jaxpaged.generation.request import ContextShift, Lookup, Request
from jaxpaged.generation.result import FINISH_LENGTH, FINISH_NAN, FINISH_OUT_OF_PAGES, FINISH_STOP
from jaxpaged.generation.sampling import sample
from jaxpaged.generation.sampling_params import SamplingParams
from jaxpaged.generation.scoring import score
from jaxpaged.generation.stream import generate_stream

__all__ = [
    "FINISH_LENGTH",
    "FINISH_NAN",
    "FINISH_OUT_OF_PAGES",
    "FINISH_STOP",
    "ContextShift",
    "LimitVocab",
    "Lookup",
    "Request",
    "SamplingParams",
    "beam_search",
    "generate",
    "generate_stream",
    "run",
    "sample",
    "score",
]
