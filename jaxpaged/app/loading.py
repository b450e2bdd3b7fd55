"""Loads the model that the flags name."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxpaged_model.checkpoint.loading import LoadedModel, load_model
from jaxpaged_model.llama import ModelFn

from jaxpaged.app import interrupt
from jaxpaged.app.errors import InputError
from jaxpaged.app.options import ModelFlags, PageFlags
from jaxpaged.app.processes import open_mesh
from jaxpaged.app.timings import since_start
from jaxpaged.attention.api import prepare
from jaxpaged.pages.batch import Batch
from jaxpaged.pages.formats import formats_of


@dataclass(frozen=True)
class ReadyModel:
    """A loaded model, and how to call it."""

    loaded: LoadedModel
    call: ModelFn
    dtype: str
    load_ms: float
    opened: float
    """Seconds from the start of the process until loading began."""


@dataclass(frozen=True)
class ForbidTokens:
    """A model that gives some tokens no probability, so that they are never sampled."""

    model: ModelFn
    tokens: tuple[int, ...]

    def __call__(
        self, params: Any, tokens: Array, cache: Any, batch: Batch, rows: Array
    ) -> tuple[Array, Any]:
        logits, cache = self.model(params, tokens, cache, batch, rows)
        return logits.at[:, jnp.array(self.tokens)].set(-jnp.inf), cache

    @property
    def program_key(self) -> str | None:
        """Key of the executable cache; None if the model has none."""
        key = getattr(self.model, "program_key", None)
        return None if key is None else f"{key} without {self.tokens}"


def open_model(options: ModelFlags, *, mesh: str | None = None, show_progress: bool = True) -> ReadyModel:
    """Loads the model that ``-m`` or ``-hf`` names, else the embedded one, onto the devices of ``--mesh``.

    Raises:
      InputError: no such file, not a model, an unsupported model, a failed download, or a mesh that does not fit the
        devices or the model.
    """
    dtype = options.dtype
    if dtype == "auto":
        dtype = "f32" if jax.default_backend() == "cpu" else "bf16"
    start, opened = time.perf_counter(), since_start()
    if isinstance(options, PageFlags):
        prepare(*formats_of(dtype, options.cache_type_k, options.cache_type_v))
    devices = open_mesh(mesh)
    try:
        file = model_file(options.model, options.hf, options.offline)
        with _progress(show_progress, file.name) as report:
            loaded = load_model(
                file,
                dtype=dtype,
                weights=options.weights,
                exact=options.exact,
                progress=report,
                mesh=devices,
                context_length=getattr(options, "ctx_size", 0) or None,
            )
    except OSError as error:
        raise InputError(
            f"{error.filename or options.model or options.hf}: {error.strerror or error}"
        ) from error
    except ValueError as error:  # ModelError and the tokenizer's errors: one line that names the file
        raise InputError(str(error)) from error
    jax.block_until_ready(loaded.params)
    load_ms = 1e3 * (time.perf_counter() - start)
    return ReadyModel(loaded, loaded.function, dtype, load_ms, opened)


def model_file(path: Path | None, hf: str | None, offline: bool) -> Path:
    """File or folder that ``-m`` or ``-hf`` names, else the embedded model's.

    Raises:
      InputError: both are given, or there is no such file.
    """
    if path is not None and hf is not None:
        raise InputError("-m and -hf both name a model; give one of them")
    if hf is not None:
        from jaxpaged_model.checkpoint import hub

        return hub.resolve(hf, offline=offline)
    if path is None:
        from jaxpaged_model import tiny

        path = tiny.PATH
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; -m takes a GGUF file or a Hugging Face folder")
    return path


@contextmanager
def _progress(show: bool, name: str) -> Iterator[Callable[[int, int], None] | None]:
    """Shows a progress bar on stderr, if that is a terminal."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns: tuple[Any, ...] = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    with interrupt.before_exit(progress.stop), progress as bar:  # the bar hides the cursor
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
