"""The flags of ``jaxpaged serve``, their names those of llama-server, and what they are once checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from jaxpaged.app.errors import InputError
from jaxpaged.app.options import (
    MESH_OPTIONS,
    MODEL_OPTIONS,
    FiniteFloat,
    Weights,
    chain,
    option,
    page_options,
)

_AT_LEAST_1 = click.IntRange(min=1)
_LONGEST_CONTEXT = 2**24
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SHORTEST_KEY = 8


@dataclass(frozen=True)
class ServeOptions:
    """One server, as asked for."""

    model: Path | None = None
    hf: str | None = None
    offline: bool = False
    dtype: str = "auto"
    weights: Weights = "auto"
    exact: bool = False
    threads: int | None = None
    alias: tuple[str, ...] = ()
    """Names of the model; none: the file's."""
    chat_template: str | None = None
    chat_template_file: Path | None = None
    ctx_size: int = 0
    parallel: int = 16
    batch_size: int = 512
    ubatch_size: int | None = None
    predict: int = -1
    """Tokens to generate at most where a request does not say; -1 = as many as fit."""
    context_shift: bool = False
    keep: int = 0
    decode_steps: int = 8
    max_queue: int = 256
    paged: bool = True
    page_size: int = 32
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    hadamard: str = "auto"
    kv_memory: float | int | None = None
    """A share below or equal to 1 (a float), or bytes (an int)."""
    kv_pages: int | None = None
    prefix_cache: bool = True
    swap_space: int = 2**30
    """Bytes of host memory for preempted sequences; 0 = they are computed again."""
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body: int = 8 * 2**20
    drain_seconds: float = 30.0
    webui: bool = True
    slots: bool = True
    slot_save_path: Path | None = None
    metrics: bool = False
    props: bool = False
    seed: int = -1
    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    log: bool = True
    mesh: str | None = None

    @property
    def step_tokens(self) -> int:
        """Token budget of one step."""
        return min(self.batch_size, self.ubatch_size or self.batch_size)

    @classmethod
    def of_flags(
        cls,
        *,
        api_keys: tuple[str, ...],
        api_key_file: Path | None,
        environment: Mapping[str, str],
        **flags: Any,
    ) -> ServeOptions:
        """The options of a command line; keys also come from a file and from the environment.

        Raises:
          InputError: flags that contradict each other, or that name what is not there.
        """
        options = cls(api_keys=all_keys(api_keys, api_key_file, environment), **flags)
        if options.kv_memory is not None and options.kv_pages is not None:
            raise InputError("--kv-memory and --kv-pages both size the pool; give one of them")
        if options.kv_pages is not None and not options.paged:
            raise InputError("--kv-pages bounds a pool of pages, and --no-kv-cache-paged asks for none")
        if options.context_shift and not options.paged:
            raise InputError("--context-shift needs a paged cache, not --no-kv-cache-paged")
        if options.slot_save_path is not None and not options.slot_save_path.is_dir():
            raise InputError(f"--slot-save-path {options.slot_save_path}: no such folder")
        return options


def all_keys(
    given: tuple[str, ...], file: Path | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The API keys of the command line, of a file (one a line, # begins a comment) and of the environment.

    Raises:
      InputError: the file cannot be read or holds no key, or a key is too short to be one.
    """
    keys = list(given)
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise InputError(f"--api-key-file {file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"--api-key-file {file}: not UTF-8 text") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:  # a server that was meant to be closed must not be open
            raise InputError(f"--api-key-file {file}: there is no key in it")
        keys += found
    for name in ("JAXPAGED_API_KEY", "LLAMA_API_KEY"):
        keys += [key.strip() for key in environment.get(name, "").split(",") if key.strip()]
    for key in keys:
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable():
            raise InputError(f"an API key has fewer than {_SHORTEST_KEY} characters, or others than ASCII")
    return tuple(dict.fromkeys(keys))


class ByteSize(click.ParamType):
    """A number of bytes such as 512M or 2G."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _BYTES.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a number of bytes such as 512M or 2G.", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].lower()])


class Memory(click.ParamType):
    """A share such as 0.5 or 50%, or bytes such as 2G."""

    name = "memory"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | int | None:
        if not isinstance(value, str):
            return value
        text = value.strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = None
        if share is None or (share > 1 and not text.endswith("%")):
            size = ByteSize().convert(text, param, ctx)
            if size < 2**20:
                self.fail(f"{value!r} is under 1M; write 0.5 or 50% for a share, 2G for bytes.", param, ctx)
            return size
        if not 0 < share <= 1:
            self.fail(f"{value!r} is no share; 0.5 or 50% is one, 2G are bytes.", param, ctx)
        return share


class Words(click.ParamType):
    """Words with commas between them."""

    name = "word,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in str(value).split(",") if word.strip())
        if not words:
            self.fail("it is empty.", param, ctx)
        return words


def _joined(_: click.Context, __: click.Parameter, value: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """A flag that may be written several times, each time with a list."""
    return tuple(dict.fromkeys(word for words in value for word in words))


SERVE_OPTIONS = chain(
    *MODEL_OPTIONS,
    *MESH_OPTIONS,
    option("Model", "-a", "--alias", type=Words(), multiple=True, callback=_joined, metavar="NAME,...",
           help="Names under which clients see the model.  [default: the file's]"),
    option("Model", "--chat-template", metavar="NAME",
           help="chatml, llama3, ... or Jinja source.  [default: the model's]"),
    option("Model", "--chat-template-file", type=click.Path(path_type=Path), metavar="FILE",
           help="A file with Jinja source."),
    option("Server", "--host", default="127.0.0.1", show_default=True,
           help="Address to listen on, or several with commas; 0.0.0.0 = every one, to be used with --api-key."),
    option("Server", "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N",
           help="0 = any free one, printed."),
    option("Server", "--api-key", "api_keys", type=Words(), multiple=True, callback=_joined, metavar="KEY,...",
           help="Key that every path but /health asks for; may be repeated. Also from JAXPAGED_API_KEY or "
                "LLAMA_API_KEY, where other users' ps does not see it."),
    option("Server", "--api-key-file", type=click.Path(path_type=Path), metavar="FILE",
           help="A file with keys, one a line."),
    option("Server", "--cors-origins", "--cors-origin", "cors_origins", type=Words(), multiple=True, callback=_joined,
           metavar="URL,...",
           help="Sites whose pages may use the server from a browser; localhost = this machine's, on any port.  "
                "[default: none but its own page]"),
    option("Server", "--max-body", type=ByteSize(), default="8M", show_default=True, metavar="SIZE",
           help="Largest body of a request."),
    option("Server", "--drain-seconds", type=FiniteFloat(0), default=30.0, show_default=True, metavar="S",
           help="Time that running requests get to end after SIGTERM or Ctrl-C."),
    option("Server", "--webui/--no-webui", "--ui/--no-ui", default=True, show_default="on",
           help="The page in the browser, at /."),
    option("Server", "--slots/--no-slots", default=True, show_default="on",
           help="GET /slots: what each sequence does."),
    option("Server", "--slot-save-path", type=click.Path(path_type=Path), metavar="FOLDER",
           help="Turns on POST /slots/N?action=save, restore, erase."),
    option("Server", "--metrics", is_flag=True, help="GET /metrics, for Prometheus."),
    option("Server", "--props", is_flag=True, help="POST /props; there is nothing yet that it changes."),
    option("Batch", "-c", "--ctx-size", type=click.IntRange(0, _LONGEST_CONTEXT), default=0, show_default=True,
           metavar="N", help="Tokens that each sequence may hold, not divided by -np; 0 = the model's."),
    option("Batch", "-np", "--parallel", type=_AT_LEAST_1, default=16, show_default=True, metavar="N",
           help="Sequences at once; more requests wait."),
    option("Batch", "-b", "--batch-size", type=_AT_LEAST_1, default=512, show_default=True, metavar="N",
           help="Tokens of one step, over all sequences."),
    option("Batch", "-ub", "--ubatch-size", type=_AT_LEAST_1, metavar="N", help="A lower limit for the same."),
    option("Batch", "-n", "--predict", "--n-predict", "predict", type=click.IntRange(min=-1), default=-1,
           show_default=True, metavar="N",
           help="Tokens to generate where a request does not say; -1 = until the text or the context ends."),
    option("Batch", "--decode-steps", type=click.IntRange(1, 64), default=8, show_default=True, metavar="N",
           help="Tokens of a sequence between two looks at the queue, at most."),
    option("Batch", "--max-queue", type=_AT_LEAST_1, default=256, show_default=True, metavar="N",
           help="Requests that may wait; more are told to come back (429)."),
    option("Batch", "--context-shift/--no-context-shift", default=False, show_default="off",
           help="Go on when a context is full: half of what is not kept is forgotten, the rest moves up."),
    option("Batch", "--keep", type=click.IntRange(min=-1), default=0, show_default=True, metavar="N",
           help="Tokens of a prompt's beginning that a context shift keeps; -1 = all of it."),
    option("KV cache", "--kv-cache-paged/--no-kv-cache-paged", "paged", default=True, show_default="paged",
           help="Pages on demand, or the whole context of every sequence at once."),
    option("KV cache", "--kv-memory", type=Memory(), metavar="SHARE|SIZE",
           help="Memory of the pool: 0.5 or 50% of what is free, or 2G.  "
                "[default: what -np contexts need, if it fits]"),
    option("KV cache", "--kv-pages", type=_AT_LEAST_1, metavar="N", help="Pages of the pool, instead."),
    option("KV cache", "--prefix-cache/--no-prefix-cache", "--cache-prompt/--no-cache-prompt", "prefix_cache",
           default=True, show_default="on", help="Reuse the pages of prompts that begin alike."),
    option("KV cache", "--swap-space", type=ByteSize(), default="1G", show_default=True, metavar="SIZE",
           help="Host memory for sequences that had to make room; 0 = they are computed again."),
    page_options(),
    option("Defaults of requests", "-s", "--seed", type=click.IntRange(-1, 2**32 - 1), default=-1, show_default=True,
           metavar="S", help="-1 = a random one for each request."),
    option("Defaults of requests", "--temp", "--temperature", "temp", type=FiniteFloat(), default=0.8,
           show_default=True, help="0 or less takes the likeliest token."),
    option("Defaults of requests", "--top-k", type=click.IntRange(min=-1), default=40, show_default=True, metavar="N"),
    option("Defaults of requests", "--top-p", type=FiniteFloat(0, 1), default=0.95, show_default=True),
    option("Defaults of requests", "--min-p", type=FiniteFloat(0, 1), default=0.05, show_default=True),
    option("Defaults of requests", "--repeat-penalty", type=FiniteFloat(0, above=True), default=1.0, show_default=True),
    option("Defaults of requests", "--repeat-last-n", type=click.IntRange(min=-1), default=64, show_default=True,
           metavar="N"),
    option("Defaults of requests", "--presence-penalty", type=FiniteFloat(), default=0.0, show_default=True),
    option("Defaults of requests", "--frequency-penalty", type=FiniteFloat(), default=0.0, show_default=True),
    option("Defaults of requests", "--ignore-eos", is_flag=True, help="Go on after the end of a text."),
    option("Output", "--log-disable", "log", is_flag=True, flag_value=False, default=True,
           help="Print nothing but errors and the address on stderr."),
)  # fmt: skip
"""All the flags of ``jaxpaged serve``; a decorator."""
