"""Snapshot files: sequences outside of any pool, verified when read; independent of caches.

A snapshot is a safetensors file, so that it can be inspected, and loading runs no code of it. A row
that several entries or sequences share is stored once, and free slots are not stored.
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

from jaxpaged.pages.formats import (
    BlockFormat,
    Float8Format,
    PageFormat,
    ResidualFormat,
    check_page_size,
    heads_title,
    titled,
)

KIND, VERSIONS = "jaxpaged.snapshot", ("2", "3")
"""Version 2 is of one layer group, with a token id for each token that it holds; 3 of any."""
_BLANK = "0" * 64
_TYPES = {"F32", "F16", "BF16", "I32", "I8", "U8"}
_MAX_POSITION = 2**31 - 1
_MAX_SIZE = 1 << 16


class SnapshotError(ValueError):
    """A file that cannot be used, or not with this cache; one line with the file's name. Nothing
    was changed."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a snapshot in the order of their sequences; ``i64[T]`` each."""

    owner: np.ndarray
    """Index into ``Snapshot.sequences``."""
    home: np.ndarray
    """Slot of the token in the pool it was saved from: ``page * page_size + slot``."""
    row: np.ndarray
    """Index of its key and value in ``Snapshot.keys`` and ``values``; several tokens may share a
    row."""
    position: np.ndarray
    rotation: np.ndarray
    """Position at which its key was rotated, minus ``position``."""

    def __getitem__(self, kept: np.ndarray) -> Tokens:
        return Tokens(
            self.owner[kept], self.home[kept], self.row[kept], self.position[kept], self.rotation[kept]
        )


Stored = np.ndarray | dict[str, np.ndarray]
"""Keys or values of one layer: numbers, or the parts of quantized ones."""


def shapes_of(storage: PageFormat, sizes: tuple[int, int, int], count: int, num_residual: int) -> Any:
    """Shapes and dtypes of ``count`` stored rows of a format, or pages of a residual format.

    Args:
      storage: the format.
      sizes: num_kv_heads, page_size and head_dim.
      count: number of rows or pages.
      num_residual: number of residual pages.
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
class SavedGroup:
    """Tokens of sequences in the layers of one group. E = entries, R = rows, at most one a token."""

    layers: tuple[int, ...]
    """Indices in the model."""
    k_format: PageFormat
    """Format of the pages of keys."""
    v_format: PageFormat
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    """Numbers of a head of values."""
    entries: np.ndarray
    """i32[E, 6]: sequence, page, first slot, tokens, position and rotation as in BlockTable, in the
    order of ``Snapshot.sequences``. Pages are numbered within the group."""
    keys: tuple[Stored, ...]
    """Rows of each layer as the format stores them, ``[R, num_kv_heads, ...]``, in the order in
    which tokens first refer to them. Of a residual format, quantized pages ``[pages, num_kv_heads,
    ...]``, and residual pages ``[O, ...]`` as part "residual"."""
    values: tuple[Stored, ...]
    """Same layout as ``keys``."""
    residual: np.ndarray
    """i32[O]: residual pages; empty without a residual format."""

    @property
    def has_residual(self) -> bool:
        """True if whole pages are stored, because a format cannot extract rows."""
        return self.k_format.has_residual or self.v_format.has_residual

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences here; shared ones count once a sequence."""
        return int(self.entries[:, 3].sum())

    def held(self, sequences: Sequence[int]) -> np.ndarray:
        """i64[len(sequences)]: tokens of each sequence here."""
        order = np.searchsorted(sequences, self.entries[:, 0])
        return np.bincount(order, self.entries[:, 3], len(sequences)).astype(np.int64)


@dataclass(frozen=True, repr=False)
class Snapshot:
    """Sequences outside of any pool. T = tokens of all sequences."""

    fingerprint: str
    """Identifies the model that computed the keys and values."""
    page_size: int
    """Tokens a page of the pool that the sequences were saved from."""
    sequences: tuple[int, ...]
    """Ids of the sequences there, including empty ones."""
    lengths: np.ndarray
    """i64[len(sequences)]: tokens of each sequence, including those at its beginning that no group holds."""
    tokens: np.ndarray
    """i32[T]: token ids, in the order of ``sequences``."""
    groups: tuple[SavedGroup, ...]
    """Layer groups, the one that sees furthest first; one with a window holds the last tokens alone."""

    def __repr__(self) -> str:
        total = len(self.tokens)
        groups = "; ".join(
            f"{len(g.layers)} layers of {heads_title(g.num_kv_heads, g.head_dim, g.v_head_dim)} values, "
            f"k {g.k_format.title}, "
            f"v {g.v_format.title}" + (f", {g.num_tokens} of the tokens" if g.num_tokens < total else "")
            for g in self.groups
        )
        return f"Snapshot({len(self.sequences)} sequences, {total} tokens, {groups})"

    @property
    def has_residual(self) -> bool:
        """True if whole pages of a group are stored, because a format cannot extract rows."""
        return any(group.has_residual for group in self.groups)

    @property
    def token_ids(self) -> dict[int, list[int]]:
        """Token ids of each sequence."""
        ends = np.cumsum(self.lengths)[:-1]
        parts = np.split(self.tokens, ends) if self.sequences else []
        return {seq: part.tolist() for seq, part in zip(self.sequences, parts, strict=True)}

    def expand(self, group: int = 0) -> Tokens:
        """Slot, row and position of each token that a group holds."""
        return expand(self.sequences, self.groups[group].entries, self.page_size)

    def common_prefix(self, token_ids: Sequence[int]) -> int:
        """Number of leading ``token_ids`` that the only sequence has at positions 0, 1, ...

        Raises:
          ValueError: several sequences, or none.
        """
        if len(self.sequences) != 1:
            raise ValueError(f"a prefix is of one sequence; the snapshot has {len(self.sequences)}")
        limit = min(len(token_ids), len(self.tokens))
        held = self.expand().position
        gone = len(self.tokens) - len(held)
        if gone and held[0] != gone:  # there was a gap among those that are not held any more
            return 0
        position = np.concatenate([np.arange(gone), held])
        same = (self.tokens[:limit] == np.asarray(token_ids[:limit])) & (position[:limit] == np.arange(limit))
        return limit if same.all() else int(np.argmin(same))


def expand(sequences: Sequence[int], entries: np.ndarray, page_size: int) -> Tokens:
    """Slot, row and position of each token of ``entries i32[E, 6]``; see ``SavedGroup.entries``."""
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
    """Writes a file beside ``path`` and renames it: readers see the old file or the new one,
    complete.

    Raises:
      ImportError: safetensors is not installed.
      OSError: the file cannot be written.
    """
    save_file = _safetensors().numpy.save_file
    target = Path(os.path.realpath(path))
    tensors: dict[str, np.ndarray] = {"token_ids": snapshot.tokens}
    metadata = {
        "kind": KIND,
        "sha256": _BLANK,
        "fingerprint": snapshot.fingerprint,
        "page_size": str(snapshot.page_size),
        "sequences": _listed(snapshot.sequences),
    }
    first, lengths = snapshot.groups[0], snapshot.lengths.tolist()
    whole = first.held(snapshot.sequences).tolist() == lengths
    if len(snapshot.groups) == 1 and whole and first.layers == tuple(range(len(first.layers))):
        names = [""]
        metadata |= {"version": "2", "num_layers": str(len(first.layers))}
    else:
        names = [f"{g}." for g in range(len(snapshot.groups))]
        metadata |= {"version": "3", "lengths": _listed(lengths)}
        metadata |= {f"{g}.layers": _listed(group.layers) for g, group in enumerate(snapshot.groups)}
    for of, group in zip(names, snapshot.groups, strict=True):
        for i, pair in enumerate(zip(group.keys, group.values, strict=True)):
            for name, stored in zip(("k", "v"), pair, strict=True):
                parts = stored if isinstance(stored, dict) else {"": stored}
                tensors |= {f"{of}{name}.{i}.{part}".rstrip("."): rows for part, rows in parts.items()}
        tensors[f"{of}entries"] = group.entries
        if group.has_residual:
            tensors[f"{of}residual"] = group.residual
        metadata |= {
            f"{of}k_format": group.k_format.title,
            f"{of}v_format": group.v_format.title,
            f"{of}num_kv_heads": str(group.num_kv_heads),
            f"{of}head_dim": str(group.head_dim),
        }
        if group.v_head_dim != group.head_dim:
            metadata[f"{of}v_head_dim"] = str(group.v_head_dim)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        save_file({name: np.ascontiguousarray(rows) for name, rows in tensors.items()}, part, metadata)
        part.chmod(mode)  # safetensors may have replaced the file by one that only its owner can read
        with open(part, "r+b") as file:
            head = _head(file)
            digest = _sha256(file, head)
            file.seek(0)
            file.write(_with_digest(head, _BLANK, digest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except _safetensors().SafetensorError as error:  # safetensors wraps an OSError
        raise OSError(f"{target.name}: cannot be written: {_first_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_snapshot(path: str | os.PathLike[str], *, fingerprint: str) -> Snapshot:
    """Reads a file of ``snapshot`` and verifies all of it.

    Args:
      path: the file.
      fingerprint: of the model that will continue the sequences, as given to ``snapshot``.

    Raises:
      SnapshotError: no snapshot, one of another version or model, truncated or damaged; one line
        that names the file without its folder.
      ImportError: safetensors is not installed.
      OSError: the file is missing or cannot be read.
    """
    name = Path(path).name
    library = _safetensors()
    with open(path, "rb") as file:
        try:
            opened = library.safe_open(path, framework="numpy")
        except library.SafetensorError as error:
            raise SnapshotError(f"{name}: no snapshot, or a truncated or damaged one") from error
        with opened as reader:
            metadata = reader.metadata() or {}
            _check_kind(name, metadata)
            stated = metadata.get("sha256", "")
            head = _head(file)
            if _sha256(file, _with_digest(head, stated, _BLANK)) != stated:
                raise SnapshotError(f"{name}: damaged: its checksum does not match its contents")
            if (made_with := metadata.get("fingerprint", "")) != fingerprint:
                raise SnapshotError(
                    f"{name}: made with another model: its fingerprint is {_short(made_with)}, "
                    f"this model's {_short(fingerprint)}"
                )
            keys = reader.keys()
            types = {reader.get_slice(key).get_dtype() for key in keys}
            invalid = f"{name}: invalid in version {metadata['version']} of a snapshot"
            if not types <= _TYPES:  # safetensors has no arrays of some others
                raise SnapshotError(f"{invalid}: types {types}")
            tensors = {key: reader.get_tensor(key) for key in keys}
    try:
        return _checked(metadata, tensors)
    except (KeyError, ValueError, IndexError, OverflowError) as error:
        raise SnapshotError(f"{invalid}: {error}") from error


def _check_kind(name: str, metadata: dict[str, str]) -> None:
    if metadata.get("kind") != KIND:
        raise SnapshotError(f"{name}: a safetensors file, but no snapshot of a jaxpaged cache")
    if (version := metadata.get("version", "")) not in VERSIONS:
        supported = " and ".join(VERSIONS)
        raise SnapshotError(f"{name}: a snapshot of version {_short(version)}; supported are {supported}")


def _checked(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> Snapshot:
    """Snapshot of the data read, once all that ``restore`` relies on is checked: a checksum does
    not prove intent."""
    page_size = check_page_size(int(metadata["page_size"]))
    sequences = tuple(_ints(metadata["sequences"]))
    of_one_group = metadata["version"] == "2"
    if of_one_group:
        groups = [_group(metadata, tensors, "", range(min(int(metadata["num_layers"]), len(tensors))))]
    else:
        names = [f"{g}." for g in range(len(tensors)) if f"{g}.entries" in tensors]
        groups = [_group(metadata, tensors, of, _ints(metadata[f"{of}layers"])) for of in names]
    for group in groups:
        _check(_conditions_of_group(sequences, page_size, group))
    snapshot = Snapshot(
        fingerprint=metadata["fingerprint"],
        page_size=page_size,
        sequences=sequences,
        lengths=groups[0].held(sequences) if of_one_group else np.asarray(_ints(metadata["lengths"])),
        tokens=tensors["token_ids"],
        groups=tuple(groups),
    )
    _check(_conditions(snapshot))
    return snapshot


def _check(conditions: Iterator[tuple[str, bool]]) -> None:
    for name, wrong in conditions:
        if wrong:
            raise ValueError(name)


def _group(
    metadata: dict[str, str], tensors: dict[str, np.ndarray], of: str, layers: Sequence[int]
) -> SavedGroup:
    """Group whose names in the file begin with ``of``."""
    k_format, v_format = (titled(metadata[f"{of}{side}_format"]) for side in ("k", "v"))

    def stored(side: str, layer: int, storage: PageFormat) -> Stored:
        name = f"{of}{side}.{layer}"
        if not isinstance(storage, BlockFormat) or isinstance(storage, Float8Format):
            return tensors[name]
        return {n.removeprefix(f"{name}."): rows for n, rows in tensors.items() if n.startswith(f"{name}.")}

    return SavedGroup(
        layers=tuple(layers),
        k_format=k_format,
        v_format=v_format.for_values(),
        num_kv_heads=int(metadata[f"{of}num_kv_heads"]),
        head_dim=int(metadata[f"{of}head_dim"]),
        v_head_dim=int(metadata.get(f"{of}v_head_dim", metadata[f"{of}head_dim"])),
        entries=tensors[f"{of}entries"],
        keys=tuple(stored("k", i, k_format) for i in range(len(layers))),
        values=tuple(stored("v", i, v_format) for i in range(len(layers))),
        residual=tensors.get(f"{of}residual", np.zeros(0, np.int32)),
    )


def _conditions(snapshot: Snapshot) -> Iterator[tuple[str, bool]]:
    """Names of conditions of all groups together and ``True`` if violated, once each group is checked."""
    ids, groups, tokens, lengths = snapshot.sequences, snapshot.groups, snapshot.tokens, snapshot.lengths
    every = sorted(layer for group in groups for layer in group.layers)
    yield "layers", not every or every != list(range(len(every)))
    held, first = groups[0].held(ids), snapshot.expand()
    end = np.zeros(len(ids), np.int64)
    np.maximum.at(end, first.owner, first.position + 1)
    yield "lengths", lengths.shape != held.shape or bool(((lengths < held) | (lengths > end)).any())
    yield "token_ids", tokens.dtype != np.int32 or tokens.shape != (lengths.sum(),)
    begin = np.where(held > 0, _MAX_POSITION, 0)
    np.minimum.at(begin, first.owner, first.position)
    for g in range(1, len(groups)):  # no token that the first group lacks, unless it is before all others
        other = snapshot.expand(g)
        other = other[other.position >= begin[other.owner]]
        yield "positions of the groups", not np.isin(_places(other), _places(first)).all()


def _conditions_of_group(
    ids: tuple[int, ...], page_size: int, group: SavedGroup
) -> Iterator[tuple[str, bool]]:
    """Names of conditions and ``True`` if violated, in an order in which each may rely on those
    before."""
    entries = group.entries
    yield "sequences", list(ids) != sorted(set(ids)) or ids[0] < 0
    yield "entries", entries.dtype != np.int32 or entries.ndim != 2 or entries.shape[1] != 6
    sequence, page, first, count, position, _ = entries.astype(np.int64).T
    yield "sequences of the entries", not np.isin(sequence, ids).all() or bool((np.diff(sequence) < 0).any())
    yield "pages", bool((page < 0).any())
    yield "slots", bool(((first < 0) | (count < 1) | (first + count > page_size)).any())
    yield "positions", bool(((position < 0) | (position + count > _MAX_POSITION)).any())
    unordered = (np.diff(sequence) == 0) & (position[1:] < (position + count)[:-1])
    yield "order of the positions", bool(unordered.any())
    homes = expand(ids, entries, page_size).home
    rows, pages, residual = len(np.unique(homes)), len(np.unique(page)), group.residual
    yield "layers", not group.keys
    if group.has_residual:
        yield "numbers of the pages", pages > 0 and int(page.max()) != pages - 1
        yield "residual pages", residual.dtype != np.int32 or residual.ndim != 1
        yield (
            "residual pages",
            len(set(residual.tolist())) != len(residual) or not np.isin(residual, page).all(),
        )
        yield "residual pages", not _end_with(page, sequence, residual)
    sizes = group.num_kv_heads, page_size, group.head_dim, group.v_head_dim
    yield "sizes", min(sizes) < 1 or max(sizes) > _MAX_SIZE
    for storage, layers, dim in (
        (group.k_format, group.keys, group.head_dim),
        (group.v_format, group.values, group.v_head_dim),
    ):
        storage.check(page_size, dim)
        expected = shapes_of(
            storage, (*sizes[:2], dim), pages if storage.has_residual else rows, len(residual)
        )
        names = expected.keys() if isinstance(expected, dict) else None
        for layer in layers:
            yield "keys and values", (layer.keys() if isinstance(layer, dict) else None) != names
            same = jax.tree.map(lambda x, y: x.shape == y.shape and x.dtype == y.dtype, layer, expected)
            yield "keys and values", not all(jax.tree.leaves(same))


def _places(tokens: Tokens) -> np.ndarray:
    """i64[T]: a number for each sequence and position."""
    return tokens.owner * (_MAX_POSITION + 1) + tokens.position


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _end_with(page: np.ndarray, sequence: np.ndarray, residual: np.ndarray) -> bool:
    """True if each residual page is the last page of all sequences that have it."""
    for seq in np.unique(sequence):
        pages = page[sequence == seq]
        if not set(pages[np.isin(pages, residual)].tolist()) <= {int(pages[-1])}:
            return False
    return True


def _safetensors() -> Any:
    """The library, imported on first use, because the core depends on JAX and numpy only."""
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ImportError("snapshots need the package safetensors: pip install safetensors") from error
    return safetensors


def _head(file: Any) -> bytes:
    """Bytes before the tensors: the header's length in 8 bytes, and the header."""
    file.seek(0)
    length = file.read(8)
    return length + file.read(int.from_bytes(length, "little"))


def _with_digest(head: bytes, old: str, new: str) -> bytes:
    """Header with another digest; quotes of any other text in it would be escaped."""
    return head.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode(), 1)


def _sha256(file: Any, head: bytes) -> str:
    """Digest of ``head``, in which the checksum is blank, and of the rest of the file."""
    digest = hashlib.sha256(head)
    file.seek(len(head))
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _short(text: str) -> str:
    """Text from a file, shortened and quoted for a message."""
    return repr(text[:16] + ("..." if len(text) > 16 else ""))
