"""Snapshot: sequences as they lie in a file, verified when read; knows no cache.

The file is a safetensors file, so that anyone can look into it, and holds no code that loading would run. A row
that several entries or sequences share is in it once; a slot that no token lives in is not in it at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpaged.pages.formats import BlockFormat, PageFormat, ResidualFormat, check_page_size, titled

KIND, VERSION = "jaxpaged.snapshot", 2
_BLANK = "0" * 64
_TYPES = {"F32", "F16", "BF16", "I32", "I8", "U8"}
_MAX_POSITION = 2**31 - 1
_MAX_SIZE = 1 << 16


class SnapshotError(ValueError):
    """A file that cannot be used, or not with this cache; the message is one line. Nothing was changed."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a snapshot one by one, sequence after sequence, in order; ``i64[T]`` each."""

    owner: np.ndarray
    """Index into ``Snapshot.sequences``."""
    home: np.ndarray
    """The slot that held the token in the pool it came from: ``page * page_size + slot``."""
    row: np.ndarray
    """Where its key and value stand in ``Snapshot.keys`` and ``values``; shared rows are named by several tokens."""
    position: np.ndarray
    rotation: np.ndarray
    """Position its key was rotated at, minus ``position``."""

    def __getitem__(self, kept: np.ndarray) -> Tokens:
        return Tokens(
            self.owner[kept], self.home[kept], self.row[kept], self.position[kept], self.rotation[kept]
        )


Stored = np.ndarray | dict[str, np.ndarray]
"""One layer's keys or values: numbers, or the parts of quantized ones."""


def shapes_of(storage: PageFormat, sizes: tuple[int, int, int], count: int, num_residual: int) -> Any:
    """What ``count`` rows, or sealed pages, of a format are: its parts as ``jax.ShapeDtypeStruct``.

    Args:
      storage: the format.
      sizes: num_kv_heads, page_size and head_dim.
      count: of rows or pages.
      num_residual: of open pages.
    """
    num_kv_heads, page_size, head_dim = sizes
    index: Any = np.zeros(count, np.int32)

    def made() -> Any:
        if isinstance(storage, ResidualFormat):
            pages = storage.create(count, num_kv_heads, page_size, head_dim, num_residual=num_residual)
            return {**pages.parts, "residual": pages.residual}
        return storage.read(storage.create(1, num_kv_heads, page_size, head_dim), index, index)

    return jax.eval_shape(made)


@dataclass(frozen=True)
class Snapshot:
    """Sequences outside of any pool. E = entries, T = tokens, R = rows, at most T."""

    fingerprint: str
    """Of the model that computed the keys and values."""
    k_format: PageFormat
    """Of the pages that the keys come from."""
    v_format: PageFormat
    num_kv_heads: int
    head_dim: int
    page_size: int
    """Tokens a page held in the pool that the sequences come from."""
    sequences: tuple[int, ...]
    """Their ids there, empty sequences included."""
    entries: np.ndarray
    """i32[E, 6]: sequence, page, first slot, tokens, position and rotation, as BlockTable has them; sequence after
    sequence in the order of ``sequences``. Pages have numbers of the snapshot's own."""
    tokens: np.ndarray
    """i32[T]: the token ids, sequence after sequence."""
    keys: tuple[Stored, ...]
    """L times rows as the format stores them, ``[R, num_kv_heads, ...]``, in the order in which the tokens first name
    them; or sealed pages, ``[pages, num_kv_heads, ...]``, with the open ones, ``[O, ...]``, as part "residual"."""
    values: tuple[Stored, ...]
    """As ``keys``."""
    staging: np.ndarray
    """i32[O]: which pages are open; none where no format seals pages."""

    @property
    def sealed(self) -> bool:
        """Whether pages are kept whole, because rows cannot be taken out of them."""
        return self.k_format.has_residual or self.v_format.has_residual

    @property
    def lengths(self) -> np.ndarray:
        """i64[len(sequences)]: tokens of each sequence."""
        order = np.searchsorted(self.sequences, self.entries[:, 0])
        return np.bincount(order, self.entries[:, 3], len(self.sequences)).astype(np.int64)

    @property
    def token_ids(self) -> dict[int, list[int]]:
        """Token ids of each sequence."""
        ends = np.cumsum(self.lengths)[:-1]
        parts = np.split(self.tokens, ends) if self.sequences else []
        return {seq: part.tolist() for seq, part in zip(self.sequences, parts, strict=True)}

    def expand(self) -> Tokens:
        """The tokens one by one."""
        return expand(self.sequences, self.entries, self.page_size)

    def common_prefix(self, token_ids: Sequence[int]) -> int:
        """How many of ``token_ids`` the only sequence has from position 0 on, without a gap.

        Raises:
          ValueError: there are several sequences, or none.
        """
        if len(self.sequences) != 1:
            raise ValueError(f"a prefix is of one sequence; the snapshot has {len(self.sequences)}")
        limit = min(len(token_ids), len(self.tokens))
        same = (self.tokens[:limit] == np.asarray(token_ids[:limit])) & (
            self.expand().position[:limit] == np.arange(limit)
        )
        return limit if same.all() else int(np.argmin(same))


def expand(sequences: Sequence[int], entries: np.ndarray, page_size: int) -> Tokens:
    """The tokens of ``entries i32[E, 6]`` one by one; see ``Snapshot.entries``."""
    sequence, page, first, count, position, rotation = entries.astype(np.int64).T
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    home = np.repeat(page * page_size + first, count) + within
    _, named, inverse = np.unique(home, return_index=True, return_inverse=True)
    rank = np.empty(len(named), np.int64)
    rank[np.argsort(named)] = np.arange(len(named))
    return Tokens(
        owner=np.repeat(np.searchsorted(sequences, sequence), count),
        home=home,
        row=rank[inverse],
        position=np.repeat(position, count) + within,
        rotation=np.repeat(rotation, count),
    )


def write_snapshot(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Writes the file beside ``path`` and renames it: a reader finds the old file or the new one, whole.

    Raises:
      ImportError: safetensors is not installed.
      OSError: the file cannot be written.
    """
    save_file = _safetensors().numpy.save_file
    target = Path(os.path.realpath(path))
    layers = enumerate(zip(snapshot.keys, snapshot.values, strict=True))
    tensors: dict[str, np.ndarray] = {}
    for i, pair in layers:
        for name, stored in zip(("k", "v"), pair, strict=True):
            parts = stored if isinstance(stored, dict) else {"": stored}
            tensors |= {f"{name}.{i}.{part}".rstrip("."): rows for part, rows in parts.items()}
    tensors |= {"entries": snapshot.entries, "token_ids": snapshot.tokens}
    if snapshot.sealed:
        tensors["staging"] = snapshot.staging
    metadata = {
        "kind": KIND,
        "version": str(VERSION),
        "sha256": _BLANK,
        "fingerprint": snapshot.fingerprint,
        "k_format": snapshot.k_format.title,
        "v_format": snapshot.v_format.title,
        "num_kv_heads": str(snapshot.num_kv_heads),
        "head_dim": str(snapshot.head_dim),
        "num_layers": str(len(snapshot.keys)),
        "page_size": str(snapshot.page_size),
        "sequences": ",".join(map(str, snapshot.sequences)),
    }
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        save_file({name: np.ascontiguousarray(rows) for name, rows in tensors.items()}, part, metadata)
        part.chmod(mode)  # safetensors may have put a file of its own here, which nobody else can read
        with open(part, "r+b") as file:
            head = _head(file)
            digest = _sha256(file, head)
            file.seek(0)
            file.write(_with_digest(head, _BLANK, digest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except _safetensors().SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(f"{path}: cannot be written: {_first_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_snapshot(path: str | os.PathLike[str], *, fingerprint: str) -> Snapshot:
    """Reads a file that ``snapshot`` wrote, and verifies all of it.

    Args:
      path: the file.
      fingerprint: what was given to ``snapshot``: of the model that is to go on with it.

    Raises:
      SnapshotError: no snapshot, one of another version or model, cut off or damaged; one line that says which.
      ImportError: safetensors is not installed.
      OSError: the file is missing or cannot be read.
    """
    library = _safetensors()
    with open(path, "rb") as file:
        try:
            opened = library.safe_open(path, framework="numpy")
        except library.SafetensorError as error:
            raise SnapshotError(f"{path}: no snapshot, or one that is cut off or damaged") from error
        with opened as reader:
            metadata = reader.metadata() or {}
            _check_kind(path, metadata)
            stated = metadata.get("sha256", "")
            head = _head(file)
            if _sha256(file, _with_digest(head, stated, _BLANK)) != stated:
                raise SnapshotError(f"{path}: damaged: the contents do not have the checksum they came with")
            if (made_with := metadata.get("fingerprint", "")) != fingerprint:
                raise SnapshotError(
                    f"{path}: made with another model: its fingerprint is {_short(made_with)}, "
                    f"this model's {_short(fingerprint)}"
                )
            names = reader.keys()
            types = {reader.get_slice(name).get_dtype() for name in names}
            if not types <= _TYPES:  # of some others safetensors makes no arrays
                raise SnapshotError(f"{path}: not what version {VERSION} of a snapshot holds: types {types}")
            tensors = {name: reader.get_tensor(name) for name in names}
    try:
        return _checked(metadata, tensors)
    except (KeyError, ValueError, IndexError) as error:
        raise SnapshotError(f"{path}: not what version {VERSION} of a snapshot holds: {error}") from error


def _check_kind(path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    if metadata.get("kind") != KIND:
        raise SnapshotError(f"{path}: a safetensors file, but no snapshot of a jaxpaged cache")
    if metadata.get("version") != str(VERSION):
        raise SnapshotError(
            f"{path}: a snapshot of version {_short(metadata.get('version', ''))}; this one reads {VERSION}"
        )


def _checked(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> Snapshot:
    """What was read, after a look at every law that ``restore`` relies on: a checksum proves no good intentions."""
    layers = range(int(metadata["num_layers"]))
    k_format, v_format = (titled(metadata[f"{side}_format"]) for side in ("k", "v"))

    def stored(side: str, layer: int, storage: PageFormat) -> Stored:
        name = f"{side}.{layer}"
        if not isinstance(storage, BlockFormat):
            return tensors[name]
        return {n.removeprefix(f"{name}."): rows for n, rows in tensors.items() if n.startswith(f"{name}.")}

    snapshot = Snapshot(
        fingerprint=metadata["fingerprint"],
        k_format=k_format,
        v_format=v_format.for_values(),
        num_kv_heads=int(metadata["num_kv_heads"]),
        head_dim=int(metadata["head_dim"]),
        page_size=check_page_size(int(metadata["page_size"])),
        sequences=tuple(int(seq) for seq in metadata["sequences"].split(",")),
        entries=tensors["entries"],
        tokens=tensors["token_ids"],
        keys=tuple(stored("k", layer, k_format) for layer in layers),
        values=tuple(stored("v", layer, v_format) for layer in layers),
        staging=tensors.get("staging", np.zeros(0, np.int32)),
    )
    for name, wrong in _broken_laws(snapshot):
        if wrong:
            raise ValueError(name)
    return snapshot


def _broken_laws(snapshot: Snapshot) -> Iterator[tuple[str, bool]]:
    """Laws and whether they are broken, in an order in which each may rely on those before."""
    ids, entries, tokens = snapshot.sequences, snapshot.entries, snapshot.tokens
    yield "sequences", list(ids) != sorted(set(ids)) or ids[0] < 0
    yield "entries", entries.dtype != np.int32 or entries.ndim != 2 or entries.shape[1] != 6
    sequence, page, first, count, position, _ = entries.astype(np.int64).T
    yield "sequences of the entries", not np.isin(sequence, ids).all() or bool((np.diff(sequence) < 0).any())
    yield "pages", bool((page < 0).any())
    yield "slots", bool(((first < 0) | (count < 1) | (first + count > snapshot.page_size)).any())
    yield "positions", bool(((position < 0) | (position + count > _MAX_POSITION)).any())
    unordered = (np.diff(sequence) == 0) & (position[1:] < (position + count)[:-1])
    yield "order of the positions", bool(unordered.any())
    yield "token_ids", tokens.dtype != np.int32 or tokens.shape != (count.sum(),)
    rows, pages, opened = len(np.unique(snapshot.expand().home)), len(np.unique(page)), snapshot.staging
    yield "layers", not snapshot.keys
    if snapshot.sealed:
        yield "numbers of the pages", pages > 0 and int(page.max()) != pages - 1
        yield "staging", opened.dtype != np.int32 or opened.ndim != 1
        yield "staging", len(set(opened.tolist())) != len(opened) or not np.isin(opened, page).all()
        yield "staging", not _end_with(page, sequence, opened)
    sizes = snapshot.num_kv_heads, snapshot.page_size, snapshot.head_dim
    yield "sizes", min(sizes) < 1 or max(sizes) > _MAX_SIZE
    for storage, layers in ((snapshot.k_format, snapshot.keys), (snapshot.v_format, snapshot.values)):
        storage.check(snapshot.page_size, snapshot.head_dim)
        expected = shapes_of(storage, sizes, pages if storage.has_residual else rows, len(opened))
        names = expected.keys() if isinstance(expected, dict) else None
        for layer in layers:
            yield "keys and values", (layer.keys() if isinstance(layer, dict) else None) != names
            same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, layer, expected)
            yield "keys and values", not all(jax.tree.leaves(same))


def _end_with(page: np.ndarray, sequence: np.ndarray, opened: np.ndarray) -> bool:
    """Whether each open page is the last one of every sequence that has it."""
    for seq in np.unique(sequence):
        pages = page[sequence == seq]
        if not set(pages[np.isin(pages, opened)].tolist()) <= {int(pages[-1])}:
            return False
    return True


def _safetensors() -> Any:
    """The library; imported here, because the core needs JAX and numpy alone."""
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ImportError("snapshots need the package safetensors: pip install safetensors") from error
    return safetensors


def _head(file: Any) -> bytes:
    """The bytes before the tensors: the header's length in 8 bytes, and the header."""
    file.seek(0)
    length = file.read(8)
    return length + file.read(int.from_bytes(length, "little"))


def _with_digest(head: bytes, old: str, new: str) -> bytes:
    """The header with other digits; the quotes of any other text in it would be escaped."""
    return head.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode(), 1)


def _sha256(file: Any, head: bytes) -> str:
    """Of ``head``, in which the checksum's own digits are blank, and of all that stands behind it in the file."""
    digest = hashlib.sha256(head)
    file.seek(len(head))
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _short(text: str) -> str:
    """Text from a file, fit for a message."""
    return repr(text[:16] + ("..." if len(text) > 16 else ""))
