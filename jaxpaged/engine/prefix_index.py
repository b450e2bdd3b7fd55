"""PrefixIndex: which page holds which tokens behind which beginning; host data that knows neither tables nor devices.

A node is a page whose keys and values were computed from its tokens behind all the tokens of its ancestors. Its key
is a hash chain, ``sha256(parent's key, tokens)``, that starts from the tagged extras of a request. A key only finds a
node: the tokens are compared before anybody gets the page.

Sequences use nodes (``users``). Pages of nodes that none uses stay in the pool until they are needed, least recently
used first, and of one chain the last first: a node always has at least the users of its descendants, and whoever lets
a chain go lets the last node go first, so that the order of the list is the order in which nodes can leave.

Reference: vLLM's automatic prefix caching; its tokens-verified, salted keys answer what others had reported there.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

_CANDIDATES = 32
"""Pages that begin with the same token behind the same beginning and are compared for the best match."""


@dataclass(eq=False)
class Node:
    """One page's worth of tokens, or fewer at the end of a text."""

    key: bytes
    root: bytes
    """The key that its chain starts from."""
    parent: Node | None
    siblings: dict[int, list[Node]]
    """Where it is found: the nodes of its parent by their first token."""
    tokens: tuple[int, ...]
    page: int
    users: int = 0
    pinned: bool = False
    """Whether the index itself keeps the page in the pool."""
    children: dict[int, list[Node]] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """What the index has of the beginning of a text."""

    nodes: tuple[Node, ...]
    """Whole pages, from the beginning on."""
    tail: Node | None
    """A page whose first ``num_tail`` tokens go on behind them."""
    num_tail: int

    @property
    def num_tokens(self) -> int:
        return sum(len(node.tokens) for node in self.nodes) + self.num_tail


def root_key(**extras: str) -> bytes:
    """The key that a chain starts from: what, beside its tokens, decides whether a page may be shared.

    Every extra is tagged with its name and its length, so that no two sets of them run together.
    """
    digest = hashlib.sha256(b"jaxpaged prefix 1")
    for name, value in sorted(extras.items()):
        for part in (name.encode(), value.encode("utf-8", "surrogatepass")):
            digest.update(struct.pack("<q", len(part)) + part)
    return digest.digest()


def child_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page with ``tokens`` behind the page of key ``parent``."""
    return hashlib.sha256(parent + np.asarray(tokens, "<i4").tobytes()).digest()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


class PrefixIndex:
    """See the module. ``page_size`` tokens make a whole page."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._nodes: dict[bytes, Node] = {}
        self._roots: dict[bytes, dict[int, list[Node]]] = {}
        self._unused: OrderedDict[bytes, Node] = OrderedDict()
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_unused(self) -> int:
        """Pages that ``evict`` could give."""
        return len(self._unused)

    def pinned_pages(self) -> list[int]:
        """Pages that the index keeps in the pool."""
        return [node.page for node in self._nodes.values() if node.pinned]

    def match(self, root: bytes, tokens: Sequence[int], limit: int, *, tails: bool = True) -> Match:
        """The longest beginning of ``tokens`` that the index has, ``limit`` tokens at most.

        Args:
          root: the chain's ``root_key``.
          tokens: the text.
          limit: at most so many tokens; one less than the text, where its last token must be computed.
          tails: whether the last page may be matched in part.
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
                if count > num_tail:
                    tail, num_tail = node, count
        return Match(tuple(nodes), tail, num_tail)

    def acquire(self, nodes: Iterable[Node]) -> None:
        """One more user of each node."""
        for node in nodes:
            node.users += 1
            self._unused.pop(node.key, None)

    def insert(self, root: bytes, parent: Node | None, tokens: Sequence[int], page: int) -> tuple[Node, bool]:
        """The node of these tokens behind ``parent``, used once more; ``(node, whether it is new and has this page)``.

        Args:
          root: the chain's ``root_key``.
          parent: the page before; None for the first one.
          tokens: a whole page of them, or fewer at the end of a text.
          page: the page that holds them, should the index not have them yet.
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
        """The pages behind ``parent`` that begin with ``token``."""
        siblings = self._roots.get(root, {}) if parent is None else parent.children
        return list(siblings.get(token, []))

    def release(self, nodes: Sequence[Node], *, keep: bool = True) -> list[int]:
        """One user less of each node of a chain; the pages that must be pinned before their sequence ends.

        Args:
          nodes: of one sequence, in order.
          keep: False: what nobody uses any more is forgotten, and nothing is pinned.
        """
        pinned = []
        for node in reversed(nodes):
            node.users -= 1
            if keep and not node.pinned:  # its sequence may be the one that ends
                node.pinned = True
                pinned.append(node.page)
            if node.users == 0:
                if node.pinned:
                    self._unused[node.key] = node
                else:
                    self._forget(node)
        return pinned

    def give_back(self, nodes: Sequence[Node]) -> None:
        """``acquire`` taken back by who holds none of their pages alone: whoever does, or the index, still does."""
        for node in reversed(nodes):
            node.users -= 1
            if node.users == 0:
                assert node.pinned, "the last sequence that held the page pinned it when it ended"
                self._unused[node.key] = node

    def evict(self, count: int) -> list[int]:
        """Gives up the ``count`` pages least recently used, or all that nobody uses; they are to be unpinned."""
        pages: list[int] = []
        while self._unused and len(pages) < count:
            _, node = self._unused.popitem(last=False)
            assert not node.children, "a chain is let go from its end"
            self._forget(node)
            pages.append(node.page)
        self.evictions += len(pages)
        return pages

    def give_up(self, node: Node) -> list[int]:
        """``evict`` of one node, and what lies behind it, if nobody uses it."""
        if node.users or self._nodes.get(node.key) is not node:
            return []
        pages = [
            page
            for siblings in list(node.children.values())
            for child in list(siblings)
            for page in self.give_up(child)
        ]
        self._unused.pop(node.key, None)
        self._forget(node)
        return [*pages, node.page]

    def drop(self, chain: Sequence[Node]) -> tuple[list[int], int]:
        """Removes the end of a chain that is neither used nor continued: ``(pages to unpin, tokens in them)``."""
        pages: list[int] = []
        tokens = 0
        for node in reversed(chain):
            if node.users or node.children:
                break
            tokens += len(node.tokens)
            pages += self.give_up(node)
        return pages, tokens

    def _forget(self, node: Node) -> None:
        del self._nodes[node.key]
        same = node.siblings[node.tokens[0]]
        same.remove(node)
        if not same:
            del node.siblings[node.tokens[0]]
        if node.parent is None and not node.siblings:
            del self._roots[node.root]
