"""PrefixIndex: an index of pages by their tokens and all tokens before them, on the host."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

_CANDIDATES = 32
"""Sibling pages with the same first token that are compared for the best match, at most."""


@dataclass(eq=False)
class WindowPage:
    """A node's page in a layer group with a window."""

    page: int
    users: int = 0
    """Sequences that hold it."""
    pinned: bool = False
    """True if the index holds a reference to it."""


@dataclass(eq=False)
class Node:
    """A page of tokens, or fewer at the end of a text."""

    key: bytes
    root: bytes
    """Key at the start of its chain."""
    parent: Node | None
    siblings: dict[int, list[Node]]
    """Children of its parent, by first token."""
    tokens: tuple[int, ...]
    page: int
    users: int = 0
    pinned: bool = False
    """True if the index holds a reference to the page."""
    children: dict[int, list[Node]] = field(default_factory=dict)
    windows: dict[int, WindowPage] = field(default_factory=dict)
    """Its pages in groups with a window, by group."""


@dataclass(frozen=True)
class Match:
    """The longest indexed prefix of a text."""

    nodes: tuple[Node, ...]
    """Full pages, in order."""
    tail: Node | None
    """Page of which the first ``num_tail`` tokens continue the match."""
    num_tail: int

    @property
    def num_tokens(self) -> int:
        return sum(len(node.tokens) for node in self.nodes) + self.num_tail


def root_key(**extras: str) -> bytes:
    """Key at the start of a chain, from everything but tokens that must agree for pages to be
    shared.

    Each extra is tagged with its name and length, so that different extras never give the same key.
    """
    digest = hashlib.sha256(b"jaxpaged prefix 1")
    for name, value in sorted(extras.items()):
        for part in (name.encode(), value.encode("utf-8", "surrogatepass")):
            digest.update(struct.pack("<q", len(part)) + part)
    return digest.digest()


def child_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a page with ``tokens`` after the page of key ``parent``."""
    return hashlib.sha256(parent + np.asarray(tokens, "<i4").tobytes()).digest()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two texts."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


class PrefixIndex:
    """Index of pages of ``page_size`` tokens by their tokens and all tokens before them, on the host.

    A node is a page with keys and values of its tokens, computed after the tokens of all its ancestors.
    Its key is a hash chain, ``sha256(parent's key, tokens)``, starting from the tagged extras of a
    request. After a lookup by key the tokens are compared too.

    Sequences hold nodes (``users``). Pages of unused nodes stay in the pool until they are evicted,
    least recently used first. A node has at least as many users as its descendants, and chains are
    released from their end, so the order of the list of unused nodes is also one in which they can be
    removed.

    In a cache of several layer groups a node has a page in the first group, which sees everything, and
    may have one in each of the others (``WindowPage``): sequences leave it when their window does, and
    it is evicted on its own. A prefix is found as far as every group has what the next token sees.

    Reference: vLLM's automatic prefix caching; its tokens-verified, salted keys answer what others had
    reported there.

    Args:
      page_size: tokens of a page.
      windows: window of each layer group; the first sees everything, None.
    """

    def __init__(self, page_size: int, windows: Sequence[int | None] = (None,)) -> None:
        self.page_size = page_size
        self._windows = {g: window for g, window in enumerate(windows) if window is not None}
        self._num_groups = len(windows)
        self._nodes: dict[bytes, Node] = {}
        self._roots: dict[bytes, dict[int, list[Node]]] = {}
        self._unused: OrderedDict[bytes, Node] = OrderedDict()
        self._unused_windows: dict[int, OrderedDict[bytes, Node]] = {g: OrderedDict() for g in self._windows}
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_unused(self) -> tuple[int, ...]:
        """Number of evictable pages in each layer group."""
        return len(self._unused), *map(len, self._unused_windows.values())

    def pinned_pages(self, group: int = 0) -> list[int]:
        """Pages of a layer group that the index holds a reference to."""
        if group == 0:
            return [node.page for node in self._nodes.values() if node.pinned]
        held = (node.windows.get(group) for node in self._nodes.values())
        return [one.page for one in held if one is not None and one.pinned]

    def first_seen(self, group: int, num_tokens: int) -> int:
        """First page that the token behind ``num_tokens`` tokens sees in a layer group."""
        window = self._windows.get(group)
        return 0 if window is None else max(0, num_tokens + 1 - window) // self.page_size

    def match(self, root: bytes, tokens: Sequence[int], limit: int, *, tails: bool = True) -> Match:
        """The longest indexed prefix of a text.

        Args:
          root: the chain's ``root_key``.
          tokens: the text.
          limit: tokens to match, at most; one less than the text if its last token must be
            computed.
          tails: allow a partial match of the last page.
        """
        ps, key = self.page_size, root
        nodes: list[Node] = []
        while (len(nodes) + 1) * ps <= limit:
            page = tuple(tokens[len(nodes) * ps : (len(nodes) + 1) * ps])
            key = child_key(key, page)
            node = self._nodes.get(key)
            if node is None or node.tokens != page:
                break
            nodes.append(node)
        begin = len(nodes) * ps
        rest = tokens[begin : min(limit, begin + ps)]
        tail, num_tail = None, 0
        if tails and len(rest):
            siblings = nodes[-1].children if nodes else self._roots.get(root, {})
            for node in siblings.get(rest[0], [])[-_CANDIDATES:]:
                count = common_prefix(node.tokens, rest)
                if count > num_tail and len(node.windows) == len(self._windows):
                    tail, num_tail = node, count
        held = self._held_up_to(nodes, begin + num_tail)
        if held < begin + num_tail:
            tail, num_tail, held = None, 0, self._held_up_to(nodes, begin)
        return Match(tuple(nodes[: held // ps]), tail, num_tail)

    def _held_up_to(self, nodes: Sequence[Node], num_tokens: int) -> int:
        """Tokens of a chain, at most ``num_tokens``, of which every group has what the next one sees:
        as many as given, or those of whole pages."""
        if not self._windows:
            return num_tokens
        # Number of successive nodes, up to each, that have a page in the group.
        runs: dict[int, list[int]] = {}
        for group in self._windows:
            run = [0]
            for node in nodes:
                run.append(run[-1] + 1 if group in node.windows else 0)
            runs[group] = run

        def holds(num_tokens: int) -> bool:
            full = min(num_tokens // self.page_size, len(nodes))
            return all(run[full] >= full - self.first_seen(group, num_tokens) for group, run in runs.items())

        if holds(num_tokens):
            return num_tokens
        whole = range(min(num_tokens // self.page_size, len(nodes)), 0, -1)
        return self.page_size * next((full for full in whole if holds(full * self.page_size)), 0)

    def acquire(self, nodes: Iterable[Node]) -> None:
        """Adds a user to each node."""
        for node in nodes:
            node.users += 1
            self._unused.pop(node.key, None)

    def insert(self, root: bytes, parent: Node | None, tokens: Sequence[int], page: int) -> tuple[Node, bool]:
        """Finds or adds the node of ``tokens`` after ``parent``, and adds a user: ``(node, True if
        it was added)``.

        Args:
          root: the chain's ``root_key``.
          parent: node of the page before; None for the first page.
          tokens: tokens of a page, fewer at the end of a text.
          page: page of a node that is added.
        """
        tokens = tuple(tokens)
        key = child_key(root if parent is None else parent.key, tokens)
        node = self._nodes.get(key)
        new = node is None
        if node is None:
            siblings = self._roots.setdefault(root, {}) if parent is None else parent.children
            node = Node(key, root, parent, siblings, tokens, page)
            self._nodes[key] = node
            siblings.setdefault(tokens[0], []).append(node)
        self.acquire([node])
        return node, new

    def beginning_with(self, root: bytes, parent: Node | None, token: int) -> list[Node]:
        """Children of ``parent`` that begin with ``token``."""
        siblings = self._roots.get(root, {}) if parent is None else parent.children
        return list(siblings.get(token, []))

    def release(self, nodes: Sequence[Node], *, keep: bool = True) -> list[int]:
        """Removes a user from each node of a chain; returns pages to pin before their sequence is
        removed.

        Args:
          nodes: nodes of one sequence, in order.
          keep: False: pin nothing, and remove unused nodes that are not pinned.
        """
        pinned = []
        for node in reversed(nodes):
            node.users -= 1
            if keep and not node.pinned:  # the sequence may be the only holder of the page
                node.pinned = True
                pinned.append(node.page)
            if node.users == 0:
                if node.pinned:
                    self._unused[node.key] = node
                else:
                    self._delete(node)
        return pinned

    def release_shared(self, nodes: Sequence[Node]) -> None:
        """Reverts ``acquire``, where other sequences or the index hold the pages too."""
        for node in reversed(nodes):
            node.users -= 1
            if node.users == 0:
                assert node.pinned, "the page of an unused node is pinned"
                self._unused[node.key] = node

    # Pages of groups with a window

    def use(self, group: int, node: Node, page: int | None = None) -> bool:
        """Adds a user to a node's page in a group with a window.

        Args:
          group: the layer group.
          node: the node.
          page: page of a sequence that computed the same tokens; becomes the node's if it has none. None:
            the sequence attaches the node's.

        Returns:
          False if the node has another page, which the sequence then does not use.
        """
        held = node.windows.get(group)
        if held is None:
            assert page is not None, "a page that is attached is there"
            held = node.windows[group] = WindowPage(page)
        elif page is not None and held.page != page:
            return False
        held.users += 1
        self._unused_windows[group].pop(node.key, None)
        return True

    def pin(self, group: int, node: Node, page: int) -> list[int]:
        """Keeps a node's page in a group with a window, or ``page`` of a sequence, if it has none; returns
        pages to pin."""
        held = node.windows.setdefault(group, WindowPage(page))
        if held.users == 0:
            self._unused_windows[group].pop(node.key, None)
            self._unused_windows[group][node.key] = node
        if held.pinned:
            return []
        held.pinned = True
        return [held.page]

    def leave(self, group: int, node: Node) -> None:
        """Removes a user from a node's page in a group with a window."""
        held = node.windows[group]
        held.users -= 1
        if held.users == 0:
            if held.pinned:
                self._unused_windows[group][node.key] = node
            else:
                del node.windows[group]

    # Eviction

    def evict(self, counts: Sequence[int]) -> list[list[int]]:
        """Removes the least recently used pages, ``counts`` in each layer group; returns pages to unpin."""
        pages: list[list[int]] = [[] for _ in range(self._num_groups)]
        while self._unused and len(pages[0]) < counts[0]:
            _, node = self._unused.popitem(last=False)
            assert not node.children, "chains are released from their end"
            self._delete(node, pages)
        for group, unused in self._unused_windows.items():
            while unused and len(pages[group]) < counts[group]:
                _, node = unused.popitem(last=False)
                pages[group].append(node.windows.pop(group).page)
        self.evictions += sum(map(len, pages))
        return pages

    def remove(self, node: Node, pages: list[list[int]] | None = None) -> list[list[int]]:
        """Removes a node and its descendants if it is unused; returns their pages, to be unpinned."""
        pages = [[] for _ in range(self._num_groups)] if pages is None else pages
        if node.users or self._nodes.get(node.key) is not node:
            return pages
        for siblings in list(node.children.values()):
            for child in list(siblings):
                self.remove(child, pages)
        self._unused.pop(node.key, None)
        self._delete(node, pages)
        return pages

    def drop(self, chain: Sequence[Node]) -> tuple[list[list[int]], int]:
        """Removes the unused end of a chain: ``(pages to unpin, number of tokens)``."""
        pages: list[list[int]] = [[] for _ in range(self._num_groups)]
        tokens = 0
        for node in reversed(chain):
            if node.users or node.children:
                break
            tokens += len(node.tokens)
            self.remove(node, pages)
        return pages, tokens

    def _delete(self, node: Node, pages: list[list[int]] | None = None) -> None:
        """Removes a node without children; adds pages that the index holds to ``pages``."""
        if pages is not None and node.pinned:
            pages[0].append(node.page)
        for group, held in node.windows.items():
            self._unused_windows[group].pop(node.key, None)
            if held.pinned:
                assert pages is not None, "a window is kept of texts that are kept"
                pages[group].append(held.page)
        del self._nodes[node.key]
        same = node.siblings[node.tokens[0]]
        same.remove(node)
        if not same:
            del node.siblings[node.tokens[0]]
        if node.parent is None and not node.siblings:
            del self._roots[node.root]
