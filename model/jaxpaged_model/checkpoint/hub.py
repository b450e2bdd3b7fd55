"""``-hf user/repo[:quant]``: models from the Hugging Face hub, in its usual cache.

``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE`` have the same meaning
as for huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from jaxpaged_model.checkpoint.gguf_file import split_parts
from jaxpaged_model.metadata import ModelError

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
"""Default quants in order of preference, as in llama.cpp; else the first GGUF file is used."""

FOLDER_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt")
NOT_IN_FOLDER = ("*/*", "consolidated*")
SIDECARS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
TIMEOUT_S = 15.0

_SPEC = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<quant>[\w.-]+))?$", re.ASCII)
# huggingface_hub's base class of connection errors: httpx in its versions 1, httpx2 in 2.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]

T = TypeVar("T")


@dataclass(frozen=True)
class HubSpec:
    """``user/repo[:quant]``."""

    repo: str
    quant: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSpec:
        """Raises ModelError unless the text is ``user/repo`` or ``user/repo:quant``."""
        match = _SPEC.match(text)
        if match is None:
            raise ModelError(f"{text!r} names no model of a hub; write user/repo or user/repo:quant")
        return cls(match["repo"], match["quant"])


def resolve(
    spec: str, *, cache_dir: str | Path | None = None, offline: bool = False, endpoint: str | None = None
) -> Path:
    """Downloads a model, or finds it in the cache, and returns the path for ``load_model``.

    From a repository with GGUF files, the one that names the quant is downloaded, with all its parts if
    it is split; from another, the folder with configuration, tokenizer and safetensors. If the hub
    cannot be reached, the cache is used.

    Args:
      spec: ``user/repo`` or ``user/repo:quant``.
      cache_dir: None = huggingface_hub's.
      offline: True to use the cache only.
      endpoint: address of the hub; None = ``HF_ENDPOINT``.

    Raises:
      ModelError: no such repository or quant, no access, no answer, or the model is not in the cache.
    """
    wanted = HubSpec.parse(spec)
    if offline or constants.HF_HUB_OFFLINE:
        return _from_cache(wanted, cache_dir, "offline")
    api = huggingface_hub.HfApi(endpoint=endpoint, library_name="jaxpaged")
    try:
        info = _explained(wanted, api.endpoint, lambda: api.model_info(wanted.repo, timeout=TIMEOUT_S))
    except _Unreachable as error:
        return _from_cache(wanted, cache_dir, str(error))
    files = choose_gguf(wanted, [sibling.rfilename for sibling in info.siblings or []])

    def download() -> str:
        if files:
            paths = [api.hf_hub_download(wanted.repo, name, cache_dir=cache_dir) for name in files]
            return paths[0]
        return api.snapshot_download(
            wanted.repo,
            cache_dir=cache_dir,
            allow_patterns=list(FOLDER_PATTERNS),
            ignore_patterns=list(NOT_IN_FOLDER),
        )

    try:
        return Path(_explained(wanted, api.endpoint, download))
    except _Unreachable as error:
        raise ModelError(str(error)) from error


def choose_gguf(spec: HubSpec, names: Iterable[str]) -> list[str]:
    """The GGUF file to use of a repository's files, with all its parts; empty if it has none.

    A quant is matched regardless of case, followed by a period or a hyphen, as in llama.cpp.

    Raises:
      ModelError: no file names the quant; the message lists those that exist.
    """
    models = [name for name in sorted(names) if name.lower().endswith(".gguf")]
    models = [name for name in models if not any(s in PurePosixPath(name).name for s in SIDECARS)]
    first = [name for name in models if split_parts(name)[0] == 1]
    if not first:
        if spec.quant is not None:
            raise ModelError(f"{spec.repo} has no GGUF files, so no {spec.quant!r}; leave the quant out")
        return []
    for quant in (spec.quant,) if spec.quant is not None else DEFAULT_QUANTS:
        pattern = re.compile(re.escape(quant) + "[.-]", re.IGNORECASE)
        if found := next((name for name in first if pattern.search(name)), None):
            return split_parts(found)[1]
    if spec.quant is not None:
        raise ModelError(f"{spec.repo} has no GGUF file of quant {spec.quant!r}; it has {', '.join(first)}")
    return split_parts(first[0])[1]


class _Unreachable(Exception):
    """The hub does not answer."""


def _explained(spec: HubSpec, endpoint: str, call: Callable[[], T]) -> T:
    """Runs a call to the hub; its errors become ModelErrors of one line."""
    try:
        return call()
    except GatedRepoError:
        raise ModelError(
            f"{spec.repo} is gated: accept its terms at {endpoint}/{spec.repo} and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no model {spec.repo} at {endpoint}; if it is private, set HF_TOKEN"
        ) from None
    except RemoteEntryNotFoundError as error:
        raise ModelError(f"{spec.repo}: the hub lists a file that it does not have: {_line(error)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500:
            raise _Unreachable(f"{endpoint} answered {status} for {spec.repo}") from error
        raise ModelError(f"{endpoint} answered {status} for {spec.repo}: {_line(error)}") from None
    except HFValidationError as error:
        raise ModelError(f"{spec.repo!r} names no model of a hub: {_line(error)}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, _TransportError) as error:
        raise _Unreachable(f"{endpoint} cannot be reached: {_line(error)}") from error
    except OSError as error:
        raise ModelError(f"{spec.repo} cannot be downloaded: {_line(error)}") from error


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _from_cache(spec: HubSpec, cache_dir: str | Path | None, why: str) -> Path:
    """The newest cached revision with all files of the model."""
    try:
        repos = huggingface_hub.scan_cache_dir(cache_dir).repos
    except CacheNotFound:
        repos = frozenset()
    revisions = [
        r for repo in repos if (repo.repo_id, repo.repo_type) == (spec.repo, "model") for r in repo.revisions
    ]
    if not revisions:
        raise ModelError(f"{spec.repo} is not in the cache {cache_dir or constants.HF_HUB_CACHE}, and {why}")
    refusal: ModelError | None = None
    for revision in sorted(revisions, key=lambda r: r.last_modified, reverse=True):
        present = {str(f.file_path.relative_to(revision.snapshot_path).as_posix()) for f in revision.files}
        try:
            files = choose_gguf(spec, present)
        except ModelError as error:
            refusal = error
            continue
        if files and present.issuperset(files):
            return revision.snapshot_path / files[0]
        if not files and any(name.endswith(".safetensors") for name in present):
            return revision.snapshot_path
    held = f" ({refusal})" if refusal is not None else ""
    raise ModelError(f"{spec.repo} is not completely in the cache{held}, and {why}")
