"""GrammarProcessor: a grammar for `jaxpaged.generate`."""

from __future__ import annotations

import functools
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpaged.generation.sampling_params import unpack_tokens
from jaxpaged_model.text.grammar import Grammar, GrammarError, Matcher

_MOST_TEXTS = 4096
"""Texts whose place in the grammar is kept."""


class GrammarProcessor:
    """A `logits_processor` that allows the texts of a grammar; every sample begins at its start.

    Masks are computed on the host, a call for each step of the loop, and stay packed until they are applied.

    Args:
        grammar: the grammar.

    Example:
        >>> from jaxpaged import PagedKVCache, generate
        >>> from jaxpaged_model import load_model, tiny
        >>> loaded = load_model(tiny.PATH)
        >>> cache = PagedKVCache.create(**loaded.config.cache_spec, num_pages=4, max_seqs=1)
        >>> processor = GrammarProcessor(Grammar.from_choices(["red", "blue"], loaded.tokenizer))
        >>> result, _ = generate(loaded.function, loaded.params, cache, [loaded.tokenizer.encode("color = ")],
        ...     max_new_tokens=8, stop_ids=sorted(loaded.tokenizer.stop_ids), logits_processor=processor)
        >>> loaded.tokenizer.decode(result.token_lists()[0]) in ("red", "blue")
        True
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._matchers: OrderedDict[tuple[int, ...], Matcher | None] = OrderedDict({(): grammar.matcher()})

    def __call__(self, logits: Array, tokens: Array, num_tokens: Array) -> Array:
        """Logits in which tokens that may not come next are -inf; see `LogitsProcessor`."""
        rows, vocab_size = logits.shape
        shape = jax.ShapeDtypeStruct((rows, -(-vocab_size // 32)), jnp.int32)
        call = functools.partial(self._masks, shape.shape)
        masks = jax.pure_callback(call, shape, tokens, num_tokens, vmap_method="sequential")
        return jnp.where(unpack_tokens(masks, vocab_size), logits, -jnp.inf)

    def _masks(self, shape: tuple[int, ...], tokens: Array, num_tokens: Array) -> np.ndarray:
        """i32[R, W]: packed masks of the tokens behind each text. A text that is none has all of them: it is that
        of a row that is done."""
        texts, lengths = np.asarray(tokens), np.asarray(num_tokens)
        masks = np.zeros(shape, np.int32)
        for mask, text, length in zip(masks, texts.tolist(), lengths.tolist(), strict=True):
            matcher = self._matcher(tuple(text[:length]))
            try:
                if matcher is not None:
                    matcher.allowed(mask)
                    continue
            except GrammarError:  # a limit of the parser
                pass
            mask[:] = -1
        return masks

    def _matcher(self, text: tuple[int, ...]) -> Matcher | None:
        """The place in the grammar behind a text."""
        if text in self._matchers:
            self._matchers.move_to_end(text)
            return self._matchers[text]
        before, new = self._matchers.get(text[:-1]), text[-1:]
        if text[:-1] not in self._matchers:  # dropped meanwhile
            before, new = self._grammar.matcher(), text
        matcher = None if before is None or min(new) < 0 else before.copy()  # -1: padding
        try:
            if matcher is not None:
                matcher.accept(new)
        except GrammarError:
            matcher = None
        self._matchers[text] = matcher
        if len(self._matchers) > _MOST_TEXTS:
            self._matchers.popitem(last=False)
        return matcher
