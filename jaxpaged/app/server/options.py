"""The flags of ``jaxpaged serve``; their names are llama-server's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click

from jaxpaged.app.errors import InputError
from jaxpaged.app.flags import AT_LEAST_1, FILE, FiniteFloat, Parsed, flag
from jaxpaged.app.options import RunFlags
from jaxpaged.app.prompt import read_text

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SHORTEST_KEY = 8


def parse_bytes(text: str) -> int:
    """Number of bytes such as 512M or 2G.

    Raises:
      ValueError: it is none.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a number of bytes such as 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_memory(text: str) -> float | int:
    """A share (float) such as 0.5 or 50%, or bytes (int) such as 2G.

    Raises:
      ValueError: it is neither.
    """
    word = text.strip()
    try:
        share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        share = None
    if share is None or (share > 1 and not word.endswith("%")):
        size = parse_bytes(word)
        if size < 2**20:
            raise ValueError(f"{text!r} is under 1M; write 0.5 or 50% for a share, 2G for bytes")
        return size
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is no share; 0.5 or 50% is one, 2G are bytes")
    return share


def _parse_words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise ValueError("it is empty")
    return words


def _joined(_: click.Context, __: click.Parameter, value: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for words in value for word in words))


BYTES = Parsed("bytes", parse_bytes)
_WORDS: dict[str, Any] = {"type": Parsed("word,...", _parse_words), "multiple": True, "callback": _joined}
"""A flag that may be repeated, each time with a list."""
_model = partial(flag, "Model")
_server = partial(flag, "Server")
_batch = partial(flag, "Batch")
_cache = partial(flag, "KV cache")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(RunFlags):
    """One run of ``jaxpaged serve``. Generation and sampling flags are defaults of requests."""

    alias: tuple[str, ...] = _model(
        "-a, --alias",
        "Names of the model for clients.  [default: the file's]",
        (),
        metavar="NAME,...",
        **_WORDS,
    )
    models_dir: Path | None = _model(
        "--models-dir",
        "Folder of GGUF files and Hugging Face folders, served by name: the `model` of a request loads the one "
        "it names; -m names one to load at once.",
        type=FILE,
        metavar="FOLDER",
    )
    models_max: int | None = _model(
        "--models-max",
        "Models of --models-dir loaded at once; for another one, that which was idle longest is unloaded.  "
        "[default: as many as the free memory has room for]",
        type=AT_LEAST_1,
    )
    models_autoload: bool = _model(
        "--models-autoload/--no-models-autoload",
        "Requests load the models of --models-dir that they name; otherwise only POST /models/load does.",
        True,
    )
    host: str = _server(
        "--host",
        "Address to listen on, or several with commas; 0.0.0.0 = all, which needs --api-key to be safe.",
        "127.0.0.1",
    )
    port: int = _server(
        "--port", "TCP port; 0 = any free one, which is printed.", 8080, click.IntRange(0, 65535)
    )
    api_keys: tuple[str, ...] = _server(
        "--api-key",
        "Key that every path but /health asks for; may be repeated. Also read from JAXPAGED_API_KEY or "
        "LLAMA_API_KEY, which other users of the machine do not see.",
        (),
        metavar="KEY,...",
        **_WORDS,
    )
    api_key_file: Path | None = _server("--api-key-file", "File with keys, one a line.", type=FILE)
    cors_origins: tuple[str, ...] = _server(
        "--cors-origins, --cors-origin",
        "Sites whose pages may call the server from a browser; localhost = this machine's, on any port.  "
        "[default: its own page alone]",
        (),
        metavar="URL,...",
        **_WORDS,
    )
    max_body: int = _server(
        "--max-body", "Largest body of a request.", 8 * 2**20, BYTES, show_default="8M", metavar="SIZE"
    )
    drain_seconds: float = _server(
        "--drain-seconds",
        "Time for running requests to end after SIGTERM or Ctrl-C.",
        30.0,
        FiniteFloat(0),
        metavar="S",
    )
    sleep_idle_seconds: int = _server(
        "--sleep-idle-seconds",
        "Unload a model after so many seconds without a request; the next one loads it again. -1 = never.",
        -1,
        click.IntRange(-1),
    )
    webui: bool = _server("--webui/--no-webui, --ui/--no-ui", "The page in the browser, at /.", True)
    pooling: Literal["none", "mean", "cls", "last"] | None = _server(
        "--pooling",
        "How an embedding is made of a text's hidden states; none: a vector for each token.  "
        "[default: as the file says, or last]",
        type=click.Choice(["none", "mean", "cls", "last"]),
    )
    embd_normalize: int = _server(
        "--embd-normalize",
        "Norm by which embeddings are divided: 2 = Euclidean, 1 = taxicab, 0 = the largest is 32767, -1 = none.",
        2,
        click.IntRange(-1, 64),
        metavar="N",
    )
    reasoning_format: str = _server(
        "--reasoning-format",
        "Where thoughts go: deepseek or auto = reasoning_content, none = a part of the content.",
        "auto",
        click.Choice(["auto", "none", "deepseek", "deepseek-legacy"]),
    )
    reasoning: str = _server(
        "--reasoning, -rea",
        "Ask for thoughts, or for none, where the template can; auto: as the template decides.",
        "auto",
        click.Choice(["auto", "on", "off"]),
    )
    reasoning_budget: int = _server(
        "--reasoning-budget",
        "Tokens of thoughts before an answer, at most; 0 = none, -1 = any number.",
        -1,
        click.IntRange(-1),
        metavar="N",
    )
    slots: bool = _server("--slots/--no-slots", "GET /slots: the state of each sequence.", True)
    slot_save_path: Path | None = _server(
        "--slot-save-path",
        "Folder of POST /slots/N?action=save and restore.  [default: none, and these are off]",
        type=FILE,
        metavar="FOLDER",
    )
    metrics: bool = _server("--metrics", "GET /metrics, for Prometheus.", False)
    props: bool = _server("--props", "POST /props; it changes nothing yet.", False)
    parallel: int = _batch("-np, --parallel", "Sequences at once; more requests wait.", 16, AT_LEAST_1)
    decode_steps: int = _batch(
        "--decode-steps",
        "Tokens of a sequence between two looks at the queue, at most.",
        8,
        click.IntRange(1, 64),
    )
    max_queue: int = _batch(
        "--max-queue", "Requests that may wait; more are refused with 429.", 256, AT_LEAST_1
    )
    kv_memory: float | int | None = _cache(
        "--kv-memory",
        "Memory of the pool: 0.5 or 50% of what is free, or 2G.  "
        "[default: what -np contexts need, if there is as much]",
        type=Parsed("memory", parse_memory),
        metavar="SHARE|SIZE",
    )
    prefix_cache: bool = _cache(
        "--prefix-cache/--no-prefix-cache, --cache-prompt/--no-cache-prompt",
        "Reuse the pages of prompts that begin alike.",
        True,
    )
    swap_space: int = _cache(
        "--swap-space",
        "Host memory for the pages of preempted sequences; 0 = they are recomputed.",
        2**30,
        BYTES,
        show_default="1G",
        metavar="SIZE",
    )

    @classmethod
    def of_flags(
        cls,
        *,
        environment: Mapping[str, str],
        api_keys: tuple[str, ...],
        api_key_file: Path | None,
        **flags: Any,
    ) -> ServeOptions:
        """The options of a command line; keys also come from a file and from the environment.

        Raises:
          InputError: flags that contradict each other, or that name what is not there.
        """
        keys = all_keys(api_keys, api_key_file, environment)
        options = cls(api_keys=keys, api_key_file=api_key_file, **flags)
        if options.kv_memory is not None and options.kv_pages is not None:
            raise InputError("--kv-memory and --kv-pages both size the pool; give one of them")
        if options.kv_pages is not None and not options.paged:
            raise InputError("--kv-pages bounds a pool of pages, and --no-kv-cache-paged asks for none")
        if options.context_shift and not options.paged:
            raise InputError("--context-shift needs a paged cache, not --no-kv-cache-paged")
        if options.slot_save_path is not None and not options.slot_save_path.is_dir():
            raise InputError(f"--slot-save-path {options.slot_save_path}: no such folder")
        if options.sleep_idle_seconds == 0:
            raise InputError("--sleep-idle-seconds 0: at least 1, or -1 for never")
        if options.models_dir is None and options.models_max is not None:
            raise InputError("--models-max counts the models of --models-dir, which is not given")
        if options.models_dir is not None and (options.hf is not None or options.alias):
            raise InputError(
                "the models of --models-dir have the names of their files; -hf and -a do not fit it"
            )
        return options


def all_keys(
    given: tuple[str, ...], file: Path | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The API keys of the command line, of a file (one a line, # begins a comment) and of the
    environment.

    Raises:
      InputError: the file cannot be read or holds no key, or a key is too short to be one.
    """
    keys = list(given)
    if file is not None:
        lines = [line.strip() for line in read_text("--api-key-file", file).splitlines()]
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
