"""The flags that commands share, and those of ``jaxpaged generate``; their names are llama.cpp's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import click

from jaxpaged.app.flags import (
    AT_LEAST_0,
    AT_LEAST_1,
    AT_LEAST_MINUS_1,
    CONTEXT_SIZE,
    FILE,
    FiniteFloat,
    Parsed,
    flag,
    name_list,
)
from jaxpaged.app.sampling_options import SamplingFlags

DTYPES = ("f32", "bf16", "f16")
Weights = Literal["auto", "stored", "dequantized"]
"""``jaxpaged_model.checkpoint.loading.Weights``, which is built on JAX."""
CACHE_TYPES = (
    *DTYPES,
    *("fp8_e4m3", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q4_k", "kivi4", "kivi2"),
)
"""The names of ``PAGE_FORMATS``, which is built on JAX."""
CACHE_TYPE = click.Choice(CACHE_TYPES)
SPEC_TYPES = ("none", "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
"""llama.cpp's types of speculative decoding without a second model."""
_DRAFT = 8
"""Tokens of a draft if only its type is given."""
TYPE_HELP = (
    f"Format of keys: {', '.join(CACHE_TYPES)}. q8_0 takes half the memory of f16 and is near lossless, q4_0 or q4_k a "
    "quarter at some cost in quality (docs/guides/quantization.md, jaxpaged perplexity)."
)


_CPU_STEP = 128
"""Rows of a prefill step on a CPU: longer steps are not faster, and short prompts pay for them."""


def _page_size(text: str) -> int:
    if not text.isdecimal() or not 8 <= (size := int(text)) <= 256 or size & (size - 1):
        raise ValueError(f"{text} is not a power of two from 8 to 256")
    return size


def _picture_file(text: str) -> Path:
    if Path(text).suffix.lower() not in (".svg", ".html"):
        raise ValueError(f"{text}: the name must end in .svg or .html")
    return Path(text)


_model = partial(flag, "Model")
_devices = partial(flag, "Devices")
_prompt = partial(flag, "Prompt")
_chat = partial(flag, "Chat")
_generation = partial(flag, "Generation")
_batch = partial(flag, "Batch")
_cache = partial(flag, "KV cache")
_output = partial(flag, "Output")


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """Flags that name the model."""

    model: Path | None = _model(
        "-m, --model", "GGUF file, or Hugging Face folder.  [default: the embedded model]", type=FILE
    )
    hf: str | None = _model(
        "-hf, -hfr, --hf-repo", "Model of the Hugging Face hub, downloaded once.", metavar="USER/REPO[:QUANT]"
    )
    offline: bool = _model("--offline", "Use what was downloaded; never ask the network.", False)


@dataclass(frozen=True, kw_only=True)
class ModelFlags(ModelFile):
    """Flags that name the model and say how it is loaded."""

    dtype: str = _model(
        "--dtype",
        "What the model computes in; auto is f32 on CPU and bf16 elsewhere.",
        "auto",
        click.Choice(["auto", *DTYPES]),
    )
    weights: Weights = _model(
        "--weights",
        "Keep weights in the file's format in memory, or convert them to --dtype. auto: stored where "
        "a kernel reads them (CPUs with numba).",
        "auto",
        click.Choice(get_args(Weights)),
    )
    exact: bool = _model(
        "--exact/--no-exact",
        "Do not round activations to 16 bits in products with stored weights: slower, and as exact as "
        "dequantized weights.",
        False,
    )
    threads: int | None = _model("-t, --threads", "CPU threads.  [default: one a core]", type=AT_LEAST_1)


@dataclass(frozen=True, kw_only=True)
class MeshFlags:
    """Flag of the device mesh."""

    mesh: str | None = _devices(
        "--mesh",
        "Spread model and cache over devices: data=2,tensor=4 makes two pools of pages, each on 4 devices "
        "that split every layer by heads; context=N (generate, bench) spreads the pages of each sequence.  "
        "[default: one device; of several processes, tensor over all]",
        metavar="AXIS=N,...",
    )


@dataclass(frozen=True, kw_only=True)
class PageSizeFlags:
    """Flags of pages."""

    page_size: int = _cache(
        "--page-size",
        "Tokens of a page, a power of two from 8 to 256.",
        32,
        Parsed("tokens", _page_size),
        metavar="N",
    )
    hadamard: str = _cache(
        "--hadamard",
        "Hadamard transform of heads before they are quantized, so that outliers cost less. auto: for "
        "formats of 4 bits or fewer.",
        "auto",
        click.Choice(["auto", "on", "off"]),
    )


@dataclass(frozen=True, kw_only=True)
class PageFlags(PageSizeFlags):
    """Flags of pages and their formats; None = the dtype that the model computes in."""

    cache_type_k: str | None = _cache(
        "-ctk, --cache-type-k",
        f"{TYPE_HELP}  [default: the model's dtype]",
        type=CACHE_TYPE,
        metavar="FORMAT",
    )
    cache_type_v: str | None = _cache(
        "-ctv, --cache-type-v",
        "Format of values, one of the same.  [default: the model's dtype]",
        type=CACHE_TYPE,
        metavar="FORMAT",
    )


@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """Flags of the size of a step."""

    batch_size: int = _batch("-b, --batch-size", "Prompt tokens of one step, at most.", 512, AT_LEAST_1)
    ubatch_size: int | None = _batch(
        "-ub, --ubatch-size",
        "A lower limit for the same.  [default: 128 on a CPU, which is not faster with more]",
        type=AT_LEAST_1,
    )

    @property
    def step_tokens(self) -> int:
        """Largest number of tokens in one step."""
        if self.ubatch_size is not None:
            return min(self.batch_size, self.ubatch_size)
        from jaxpaged.attention.api import default_platform  # built on JAX

        return min(self.batch_size, _CPU_STEP) if default_platform() == "cpu" else self.batch_size


@dataclass(frozen=True, kw_only=True)
class RunFlags(StepFlags, PageFlags, MeshFlags, ModelFlags, SamplingFlags):
    """Flags that ``generate`` and ``serve`` share."""

    swa_full: bool = _cache(
        "--swa-full",
        "Keep all tokens in layers with a sliding window too, which by default keep their window: any beginning of "
        "a text can then be reused.",
        False,
    )
    chat_template: str | None = _chat(
        "--chat-template", "chatml, llama3, ... or Jinja source.  [default: the model's]", metavar="NAME"
    )
    chat_template_file: Path | None = _chat("--chat-template-file", "File with Jinja source.", type=FILE)
    predict: int = _generation(
        "-n, --predict, --n-predict",
        "Tokens to generate; -1 = until the text or the context ends.",
        -1,
        AT_LEAST_MINUS_1,
    )
    ctx_size: int = _generation(
        "-c, --ctx-size",
        "Tokens of each sequence, not divided by -np; 0 = what the model was trained for.",
        0,
        CONTEXT_SIZE,
    )
    ignore_eos: bool = _generation("--ignore-eos", "Never sample a token that ends the text.", False)
    context_shift: bool = _generation(
        "--context-shift/--no-context-shift",
        "Go on when the context is full: forget half of it (see --keep) and shift the rest.",
        False,
    )
    keep: int = _generation(
        "--keep",
        "First tokens of the prompt that a context shift keeps; -1 = all of it.",
        0,
        AT_LEAST_MINUS_1,
    )
    paged: bool = _cache(
        "--kv-cache-paged/--no-kv-cache-paged",
        "Pages on demand, or the whole context of every sequence at once.",
        True,
        show_default="paged",
    )
    kv_pages: int | None = _cache(
        "--kv-pages", "Pages of the pool.  [default: what the sequences can fill]", type=AT_LEAST_1
    )
    log: bool = _output("--log-disable", "Print nothing but errors on stderr.", True, flag_value=False)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunFlags):
    """One run of ``jaxpaged generate``."""

    prompt: str | None = _prompt(
        "-p, --prompt", "Text to continue; in a chat, the first message.", metavar="TEXT"
    )
    file: str | None = _prompt(
        "-f, --file", "File with the prompt, - for stdin. One line end at its end is dropped.", metavar="FILE"
    )
    escape: bool = _prompt(
        "-e/ , --escape/--no-escape",
        r"Replace \n, \t, \\, \x41 in -p and -sys by the characters they name.",
        True,
    )
    display_prompt: bool = _prompt(
        "--display-prompt/--no-display-prompt", "Print the prompt before its continuation.", True
    )
    verbose_prompt: bool = _prompt("--verbose-prompt", "Print the prompt's tokens on stderr.", False)
    conversation: bool | None = _chat(
        "-cnv/-no-cnv, -i/ , -if/ , --conversation/--no-conversation, --interactive/ , --interactive-first/ ",
        "Chat.  [default: when no prompt is given, on a terminal]",
    )
    single_turn: bool = _chat("-st, --single-turn", "End the chat after one answer.", False)
    system: str | None = _chat(
        "-sys, --system-prompt", "Instructions before the first message; turns the chat on.", metavar="TEXT"
    )
    parallel: int = _generation(
        "-np, --parallel",
        "Samples of the same prompt, decoded together, with the seeds S, S+1, ...",
        1,
        AT_LEAST_1,
    )
    beams: int = _generation(
        "--beams", "Beam search with N beams; prints the best text, --json all N. 1 = off.", 1, AT_LEAST_1
    )
    length_penalty: float = _generation(
        "--length-penalty",
        "Of beams: divide a text's log-probability by its length to this power.",
        1.0,
        FiniteFloat(),
    )
    json_schema: str | None = _generation(
        "-j, --json-schema", "JSON schema of the answer; {} is any JSON.", metavar="SCHEMA"
    )
    json_schema_file: str | None = _generation(
        "-jf, --json-schema-file", "File with a JSON schema of the answer.", metavar="FILE"
    )
    grammar: str | None = _generation(
        "--grammar", "Grammar of the answer, in llama.cpp's notation (GBNF).", metavar="GRAMMAR"
    )
    grammar_file: str | None = _generation(
        "--grammar-file", "File with a grammar of the answer.", metavar="FILE"
    )
    lookup: int = _generation(
        "--lookup, --spec-draft-n-max, --spec-ngram-mod-n-max",
        "Draft up to N tokens a step from the text so far; the tokens stay the same. 0 = off.",
        0,
        AT_LEAST_0,
    )
    spec_type: tuple[str, ...] = _generation(
        "--spec-type",
        f"{', '.join(SPEC_TYPES)}: llama.cpp's names; each ngram type is --lookup {_DRAFT} here, or the N given.",
        (),
        name_list(SPEC_TYPES),
        metavar="TYPE",
    )
    spec_default: bool = _generation("--spec-default", "The same as --spec-type ngram-mod.", False)
    prompt_cache: Path | None = _cache(
        "--prompt-cache",
        "Reuse keys and values that FILE has of the prompt's beginning, and save the prompt's.",
        type=FILE,
    )
    prompt_cache_all: bool = _cache(
        "--prompt-cache-all", "Save those of generated tokens, too: FILE is written at the end.", False
    )
    prompt_cache_ro: bool = _cache("--prompt-cache-ro", "Reuse FILE, and never write it.", False)
    page_map: Path | None = _cache(
        "--page-map",
        "Draw the pool of pages: .svg when it is fullest, .html step by step.",
        type=Parsed("file", _picture_file),
        metavar="FILE",
    )
    as_json: bool = _output("--json", "Print one JSON object instead of text.", False)
    warmup: bool = _output("--warmup/--no-warmup", "Compile before the clock starts.", True)
    perf: bool = _output("--perf/--no-perf", "Print timings and KV memory on stderr.", True)
    verbose: bool = _output(
        "-v, --verbose", "Print on stderr what the time up to the first token was spent on.", False
    )
    sampling_flags: tuple[str, ...] = ()
    """Flags under the heading Sampling that were given."""

    @property
    def num_draft(self) -> int:
        """Tokens to draft a step, at most; 0 = off."""
        drafts = self.spec_default or any(name != "none" for name in self.spec_type)
        return self.lookup or (_DRAFT if drafts else 0)
