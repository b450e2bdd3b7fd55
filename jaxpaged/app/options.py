"""The flags of ``jaxpaged generate``, their names those of llama.cpp, and what they are once checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import click

from jaxpaged.app.llama_flags import GroupedOption

DTYPES = ("f32", "bf16", "f16")
Weights = Literal["auto", "stored", "dequantized"]
"""The names of ``jaxpaged_model.checkpoint.loading.Weights``, which is built on JAX."""
CACHE_TYPES = (
    *DTYPES, "fp8_e4m3", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q4_k", "kivi4", "kivi2",
)  # fmt: skip
"""The names of ``page_format.PAGE_FORMATS``, which is built on JAX."""
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class GenerateOptions:
    """One run of ``jaxpaged generate``, as asked for."""

    model: Path | None
    hf: str | None
    offline: bool
    dtype: str
    weights: Weights
    exact: bool
    threads: int | None
    prompt: str | None
    file: str | None
    escape: bool
    display_prompt: bool
    verbose_prompt: bool
    conversation: bool | None
    single_turn: bool
    system: str | None
    chat_template: str | None
    chat_template_file: Path | None
    predict: int
    ctx_size: int
    parallel: int
    batch_size: int
    ubatch_size: int | None
    ignore_eos: bool
    beams: int
    length_penalty: float
    lookup: int
    context_shift: bool
    keep: int
    seed: int
    temp: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    sampling_flags: tuple[str, ...]
    """Those of the flags above, from the seed on, that were written down."""
    paged: bool
    page_size: int
    kv_pages: int | None
    cache_type_k: str | None
    """None = as ``dtype``."""
    cache_type_v: str | None
    hadamard: str
    prompt_cache: Path | None
    prompt_cache_all: bool
    prompt_cache_ro: bool
    page_map: Path | None
    as_json: bool
    warmup: bool
    perf: bool
    verbose: bool
    log: bool
    mesh: str | None = None

    @property
    def prefill_step(self) -> int:
        """Prompt tokens of one step."""
        return min(self.batch_size, self.ubatch_size or self.batch_size)


class FiniteFloat(click.ParamType):
    """A float from ``low`` to ``high``; not a number and infinity are none.

    ``above`` excludes the lower end.
    """

    name = "number"

    def __init__(self, low: float | None = None, high: float | None = None, *, above: bool = False) -> None:
        self.low, self.high, self.above = low, high, above

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        if self.low is not None and (number < self.low or (self.above and number == self.low)):
            self.fail(f"{value} is not {'above' if self.above else 'at least'} {self.low:g}.", param, ctx)
        if self.high is not None and number > self.high:
            self.fail(f"{value} is above {self.high:g}.", param, ctx)
        return number


class PageSize(click.ParamType):
    """A power of two from 8 to 256."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        size = click.INT.convert(value, param, ctx)
        if not 8 <= size <= 256 or size & (size - 1):
            self.fail(f"{size} is not a power of two from 8 to 256.", param, ctx)
        return size


class PictureFile(click.ParamType):
    """A file whose name says which picture it is to hold."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.suffix.lower() not in (".svg", ".html"):
            self.fail(f"{value}: the name must end in .svg or .html.", param, ctx)
        return path


class CountList(click.ParamType):
    """Whole numbers with commas between them, none below ``minimum``."""

    name = "n,n,..."

    def __init__(self, minimum: int) -> None:
        self.minimum = minimum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        counts = []
        for word in str(value).split(","):
            try:
                count = int(word)
            except ValueError:
                self.fail(f"{value!r} is not a list of whole numbers such as 1,8.", param, ctx)
            if count < self.minimum:
                self.fail(f"{count} in {value!r} is below {self.minimum}.", param, ctx)
            counts.append(count)
        return tuple(dict.fromkeys(counts))


class NameList(click.ParamType):
    """Some of the names that there are, with commas between them."""

    name = "name,name,..."

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        chosen = str(value).split(",")
        if unknown := [name for name in chosen if name not in self.names]:
            self.fail(f"{unknown[0]!r} is not one of {', '.join(map(repr, self.names))}.", param, ctx)
        return tuple(chosen)


def option(group: str, *names: str, **kwargs: Any) -> Decorator:
    """``click.option`` under a heading of the help."""
    return click.option(*names, cls=GroupedOption, group=group, **kwargs)


def chain(*decorators: Decorator) -> Decorator:
    """The decorators as one; options appear in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_AT_LEAST_1 = click.IntRange(min=1)
_LONGEST_CONTEXT = 2**24

WHICH_MODEL = (
    option("Model", "-m", "--model", type=click.Path(path_type=Path), metavar="FILE",
           help="A GGUF file, or a Hugging Face folder.  [default: the embedded model]"),
    option("Model", "-hf", "-hfr", "--hf-repo", "hf", metavar="USER/REPO[:QUANT]",
           help="A model of the Hugging Face hub; downloaded once."),
    option("Model", "--offline", is_flag=True, help="Never ask the network; use what was downloaded."),
)  # fmt: skip

MODEL_OPTIONS = (
    *WHICH_MODEL,
    option("Model", "--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True,
           help="Numbers to compute in; auto is f32 on CPU and bf16 elsewhere."),
    option("Model", "--weights", type=click.Choice(get_args(Weights)), default="auto", show_default=True,
           help="Quantized weights of a GGUF file stay as stored in memory, or become --dtype; auto: stored where a "
                "kernel reads them so (CPUs with numba)."),
    option("Model", "--exact/--no-exact", default=False, show_default="off",
           help="Products with stored weights take activations as they are, not as 16-bit numbers: as exact as "
                "dequantized weights, and slower."),
    option("Model", "-t", "--threads", type=_AT_LEAST_1, metavar="N",
           help="CPU threads.  [default: one for each core]"),
)  # fmt: skip

MESH_OPTIONS = (
    option("Devices", "--mesh", metavar="AXIS=N,...",
           help="Spread model and cache over N devices: data=2,tensor=4 are two pools of pages, each of 4 devices that "
                "split every layer by heads; context=N, of generate and bench, spreads the pages of each sequence.  "
                "[default: one device; of several processes, tensor over all]"),
    option("Devices", "--coordinator", envvar="JAX_COORDINATOR_ADDRESS", metavar="HOST:PORT",
           help="Run in several processes: where the first of them listens. Each is started with the same flags.  "
                "[default: what SLURM, Open MPI, a TPU pod or GKE says]"),
    option("Devices", "--num-processes", type=click.IntRange(min=1), metavar="N", help="With --coordinator: how many."),
    option("Devices", "--process-id", type=click.IntRange(min=0), metavar="I",
           help="With --coordinator: which of them this is, from 0; that one reads and writes."),
)  # fmt: skip

_WHICH_TYPE = (
    "q8_0 takes half of f16 and is near lossless, q4_0 or q4_k a quarter at some cost (docs/quantization.md, "
    "jaxpaged perplexity)."
)


def page_options(
    *, k_default: str = "as --dtype", v_default: str = "as --dtype", several: bool = False
) -> Decorator:
    """The options that say how pages are kept: of one cache, or of several to compare."""
    kind: click.ParamType = NameList(CACHE_TYPES) if several else click.Choice(CACHE_TYPES)
    metavar = "FORMAT,..." if several else "FORMAT"
    return chain(
        option("KV cache", "--page-size", type=PageSize(), default=32, show_default=True, metavar="N",
               help="Tokens of a page, a power of two from 8 to 256."),
        option("KV cache", "-ctk", "--cache-type-k", type=kind, metavar=metavar,
               help=f"Format of keys: {', '.join(CACHE_TYPES)}. {_WHICH_TYPE}  [default: {k_default}]"),
        option("KV cache", "-ctv", "--cache-type-v", type=kind, metavar=metavar,
               help=f"Format of values, one of the same.  [default: {v_default}]"),
        option("KV cache", "--hadamard", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
               help="Turn heads by a Hadamard matrix before they are quantized: outliers cost less. auto: where the "
                    "format has 4 bits or fewer."),
    )  # fmt: skip


GENERATE_OPTIONS = chain(
    *MODEL_OPTIONS,
    *MESH_OPTIONS,
    option("Prompt", "-p", "--prompt", metavar="TEXT",
           help="The text to continue; in a chat, the first message."),
    option("Prompt", "-f", "--file", metavar="FILE",
           help="A file with the prompt, - for stdin. One line break at its end is dropped."),
    option("Prompt", "-e/ ", "--escape/--no-escape", "escape", default=True, show_default="on",
           help=r"Read \n, \t, \\, \x41 in -p and -sys as the characters they name."),
    option("Prompt", "--display-prompt/--no-display-prompt", default=True, show_default="on",
           help="Print the prompt before its continuation."),
    option("Prompt", "--verbose-prompt", is_flag=True, help="Print the prompt's tokens on stderr."),
    option("Chat", "-cnv/-no-cnv", "-i/ ", "-if/ ", "--conversation/--no-conversation",
           "--interactive/ ", "--interactive-first/ ", "conversation", default=None,
           help="Chat.  [default: when no prompt is given, on a terminal]"),
    option("Chat", "-st", "--single-turn", is_flag=True, help="End after one answer."),
    option("Chat", "-sys", "--system-prompt", "system", metavar="TEXT",
           help="Instructions before the first message; turns the chat on."),
    option("Chat", "--chat-template", metavar="NAME",
           help="chatml, llama3, ... or Jinja source.  [default: the model's]"),
    option("Chat", "--chat-template-file", type=click.Path(path_type=Path), metavar="FILE",
           help="A file with Jinja source."),
    option("Generation", "-n", "--predict", "--n-predict", "predict", type=click.IntRange(min=-1), default=-1,
           show_default=True, metavar="N",
           help="Tokens to generate; -1 = until the text or the context ends, 0 = read the prompt only."),
    option("Generation", "-c", "--ctx-size", type=click.IntRange(0, _LONGEST_CONTEXT), default=0,
           show_default=True, metavar="N",
           help="Tokens that each sequence may hold; 0 = what the model was trained for."),
    option("Generation", "-np", "--parallel", type=_AT_LEAST_1, default=1, show_default=True, metavar="N",
           help="Samples of the same prompt, decoded together, with the seeds S, S+1, ..."),
    option("Generation", "--beams", type=_AT_LEAST_1, default=1, show_default=True, metavar="N",
           help="Beam search: the likeliest text that N beams find; --json gives all N. 1 = off."),
    option("Generation", "--length-penalty", type=FiniteFloat(), default=1.0, show_default=True,
           help="Of beams: a text's log-probability is divided by its length to this power."),
    option("Generation", "--lookup", "--draft-max", "--draft", "--draft-n", "lookup",
           type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
           help="Draft up to N tokens a step from the text so far; needs --temp 0. 0 = off."),
    option("Generation", "-b", "--batch-size", type=_AT_LEAST_1, default=512, show_default=True, metavar="N",
           help="Prompt tokens of one step."),
    option("Generation", "-ub", "--ubatch-size", type=_AT_LEAST_1, metavar="N",
           help="A lower limit for the same."),
    option("Generation", "--ignore-eos", is_flag=True, help="Go on after the end of the text."),
    option("Generation", "--context-shift/--no-context-shift", default=False, show_default="off",
           help="Go on when the context is full: half of what is not kept is forgotten, the rest moves up."),
    option("Generation", "--keep", type=click.IntRange(min=-1), default=0, show_default=True, metavar="N",
           help="Tokens of the prompt's beginning that a context shift keeps; -1 = all of it."),
    option("Sampling", "-s", "--seed", type=click.IntRange(-1, 2**32 - 1), default=-1, show_default=True,
           metavar="S", help="-1 = a random one, printed on stderr."),
    option("Sampling", "--temp", "--temperature", "temp", type=FiniteFloat(), default=0.8, show_default=True,
           help="0 or less takes the likeliest token."),
    option("Sampling", "--top-k", type=click.IntRange(min=-1), default=40, show_default=True, metavar="N",
           help="Keep the N likeliest tokens; 0 or -1 = off."),
    option("Sampling", "--top-p", type=FiniteFloat(0, 1), default=0.95, show_default=True,
           help="Keep the likeliest tokens up to this probability; 1 = off."),
    option("Sampling", "--min-p", type=FiniteFloat(0, 1), default=0.05, show_default=True,
           help="Keep tokens at least this probable, against the likeliest; 0 = off."),
    option("Sampling", "--repeat-penalty", type=FiniteFloat(0, above=True), default=1.0, show_default=True,
           help="Divides the logits of recent tokens; 1 = off."),
    option("Sampling", "--repeat-last-n", type=click.IntRange(min=-1), default=64,
           show_default=True, metavar="N",
           help="Recent tokens that penalties look at; -1 = all, 0 = none."),
    option("Sampling", "--presence-penalty", type=FiniteFloat(), default=0.0, show_default=True,
           help="Taken from the logit of every recent token."),
    option("Sampling", "--frequency-penalty", type=FiniteFloat(), default=0.0, show_default=True,
           help="Taken from it for each time it occurs."),
    option("KV cache", "--kv-cache-paged/--no-kv-cache-paged", "paged", default=True, show_default="paged",
           help="Pages on demand, or the whole context of every sequence at once."),
    page_options(),
    option("KV cache", "--kv-pages", type=_AT_LEAST_1, metavar="N",
           help="Pages of the pool at most.  [default: what this run can fill]"),
    option("KV cache", "--prompt-cache", type=click.Path(path_type=Path), metavar="FILE",
           help="Reuse what FILE has of the prompt's beginning, and keep the prompt in it."),
    option("KV cache", "--prompt-cache-all", is_flag=True,
           help="Keep what is generated, too: FILE is written at the end."),
    option("KV cache", "--prompt-cache-ro", is_flag=True, help="Reuse FILE, and never write it."),
    option("KV cache", "--page-map", type=PictureFile(), metavar="FILE",
           help="Draw the pool: .svg when it is fullest, .html step by step."),
    option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."),
    option("Output", "--warmup/--no-warmup", default=True, show_default="on",
           help="Compile before the clock starts."),
    option("Output", "--perf/--no-perf", default=True, show_default="on",
           help="Print timings and KV memory on stderr."),
    option("Output", "-v", "--verbose", is_flag=True,
           help="Print what the start was spent on, up to the first token, on stderr."),
    option("Output", "--log-disable", "log", is_flag=True, flag_value=False, default=True,
           help="Print nothing but errors on stderr."),
)  # fmt: skip
"""All the flags of ``jaxpaged generate``; a decorator."""
