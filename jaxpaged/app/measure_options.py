"""The flags of ``jaxpaged bench``, ``perplexity`` and ``explain``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import click

from jaxpaged.app.flags import AT_LEAST_1, AT_LEAST_MINUS_1, CONTEXT_SIZE, count_list, flag, name_list
from jaxpaged.app.options import (
    CACHE_TYPES,
    TYPE_HELP,
    MeshFlags,
    ModelFile,
    ModelFlags,
    PageFlags,
    PageSizeFlags,
    StepFlags,
)

_tests = partial(flag, "Tests")
_text = partial(flag, "Text")
_batch = partial(flag, "Batch")
_cache = partial(flag, "KV cache")
_output = partial(flag, "Output")
_FORMATS = {"type": name_list(CACHE_TYPES), "metavar": "FORMAT,..."}


@dataclass(frozen=True, kw_only=True)
class BenchOptions(PageSizeFlags, MeshFlags, ModelFlags):
    """One run of ``jaxpaged bench``."""

    n_prompt: tuple[int, ...] = _tests(
        "-p, --n-prompt", "Prompt tokens; 0 = no such test.", (512,), count_list(0)
    )
    n_gen: tuple[int, ...] = _tests(
        "-n, --n-gen", "Tokens to generate; 0 = no such test.", (128,), count_list(0)
    )
    batch: tuple[int, ...] = _tests("-b, --batch", "Sequences at once.", (1, 8), count_list(1))
    depth: tuple[int, ...] = _tests("-d, --n-depth", "Tokens already in the context.", (0,), count_list(0))
    kinds: tuple[str, ...] = _tests(
        "--kv", "Caches to compare.", ("paged", "contiguous"), name_list(("paged", "contiguous"))
    )
    repetitions: int = _tests("-r, --repetitions", "Repetitions of each test.", 5, AT_LEAST_1)
    ubatch_size: int = _tests("-ub, --ubatch-size", "Prompt tokens of one step.", 512, AT_LEAST_1)
    cache_type_k: tuple[str, ...] | None = _cache(
        "-ctk, --cache-type-k", f"{TYPE_HELP}  [default: the model's dtype]", **_FORMATS
    )
    cache_type_v: tuple[str, ...] | None = _cache(
        "-ctv, --cache-type-v", "Format of values, one of the same.  [default: as -ctk]", **_FORMATS
    )
    output: str = _output("-o, --output", "Markdown, JSON or CSV.", "md", click.Choice(["md", "json", "csv"]))


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(StepFlags, PageFlags, ModelFlags):
    """One run of ``jaxpaged perplexity``."""

    file: str | None = _text(
        "-f, --file",
        "File with the text, - for stdin.  [default: Python that the embedded model was not trained on]",
        metavar="FILE",
    )
    ctx_size: int | None = _text(
        "-c, --ctx-size",
        "Tokens of a chunk; 0 = the model's context.  [default: 512, or the context if that is less]",
        type=CONTEXT_SIZE,
    )
    chunks: int = _text("--chunks", "Read at most N chunks; -1 = all.", -1, AT_LEAST_MINUS_1)
    parallel: int | None = _batch(
        "-np, --parallel",
        "Chunks side by side.  [default: what makes 512 tokens a step, 32 at most]",
        type=AT_LEAST_1,
    )
    kl_divergence: bool = _output(
        "--kl-divergence", "Compare with exact products and f32 pages, token by token.", False
    )
    as_json: bool = _output("--json", "Print one JSON object instead of text.", False)
    log: bool = _output("--log-disable", "Print nothing but errors on stderr.", True, flag_value=False)


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(PageFlags, ModelFile):
    """One run of ``jaxpaged explain``."""

    platform: str = _batch(
        "--platform", "auto: this machine's.", "auto", click.Choice(["auto", "cpu", "gpu", "tpu"])
    )
    batch: tuple[int, ...] = _batch("-b, --batch", "Sequences that decode at once.", (1, 8), count_list(1))
    context: int = _batch("-c, --ctx-size", "Tokens that each sequence holds.", 4096, AT_LEAST_1)
    ubatch_size: int = _batch("-ub, --ubatch-size", "Prompt tokens of one step.", 512, AT_LEAST_1)
    as_json: bool = _output("--json", "Print one JSON object instead of text.", False)
