"""Grammars that an answer must follow: JSON schemas, GBNF, Lark, regular expressions, choices.

Parsing and masks are llguidance's. A `Grammar` is compiled once; a `Matcher` is its state in one sample, and a
`Constraint` of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from jaxpaged_model.text.tokenizer import Tokenizer

try:
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark
except ModuleNotFoundError as error:
    if error.name != "llguidance":
        raise
    raise ImportError("grammars need the package 'llguidance': pip install 'jaxpaged[model]'") from error

MAX_LENGTH = 2**17
"""Characters of a grammar or schema, at most."""
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,  # about 100 MB
    max_grammar_size=100_000,
    verbose_errors=False,
)
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between the parts of a JSON text; without a bound, a weak model writes nothing else."""
_TRIGGER_TOKENS = 256
"""Tokens in which a trigger is searched for."""


class GrammarError(ValueError):
    """A grammar that cannot be used, or a text that it does not allow; one line."""


class Grammar:
    """A compiled grammar for one tokenizer. Immutable; safe to share between threads.

    Compiling may take a second, for the first grammar of a large vocabulary or for a large schema, and does
    not hold Python's lock.

    Example:
        >>> from jaxpaged_model import tiny
        >>> from jaxpaged_model.checkpoint.loading import load_model
        >>> tokenizer = load_model(tiny.PATH).tokenizer
        >>> matcher = Grammar.from_choices(["yes", "no"], tokenizer).matcher()
        >>> matcher.accept(tokenizer.encode("yes"))
        >>> matcher.is_finished
        True
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Use the methods `from_...`."""
        self.tokenizer = tokenizer
        self._state = llguidance.LLMatcher(_vocabulary(tokenizer), source, log_level=0, limits=_LIMITS)
        # The first mask takes longest, and shows what the parser's limits refuse.
        self.matcher().allowed(np.zeros(-(-tokenizer.vocab_size // 32), np.int32))

    @classmethod
    def from_json_schema(
        cls, schema: Mapping[str, Any], tokenizer: Tokenizer, *, strict: bool = True
    ) -> Grammar:
        """JSON texts that are valid by a schema; `{"type": "object"}` allows any object.

        Args:
            strict: refuse keywords that cannot be enforced; otherwise they are ignored, and `oneOf` is `anyOf`.

        Raises:
            GrammarError: it is not a schema, cannot be satisfied, or is too large.
        """
        if not isinstance(schema, Mapping):
            raise GrammarError(f"not a JSON schema: it must be an object, not {json.dumps(schema)[:100]}")
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"not a JSON schema: {_one_line(str(error))}") from None
        options: Any = {"whitespace_pattern": _WHITESPACE, "lenient": not strict, "coerce_one_of": not strict}
        make = partial(llguidance.LLMatcher.grammar_from_json_schema, defaults=options)
        return cls._compiled("JSON schema", make, text, tokenizer)

    @classmethod
    def from_gbnf(cls, text: str, tokenizer: Tokenizer) -> Grammar:
        """Texts of a grammar in llama.cpp's notation, from its rule `root`; one in Lark's is taken as well.

        Raises:
            GrammarError: it cannot be parsed, or is too large.
        """
        _check_length("grammar", text)
        try:
            lark = any_to_lark(text)
        except Exception as error:  # nothing narrower is raised by the converter
            raise GrammarError(f"grammar: {_one_line(str(error))}") from None
        return cls.from_lark(lark, tokenizer)

    @classmethod
    def from_lark(cls, text: str, tokenizer: Tokenizer) -> Grammar:
        """Texts of a grammar in llguidance's dialect of Lark, from its rule `start`.

        Raises:
            GrammarError: it cannot be parsed, or is too large.
        """
        return cls._compiled("grammar", llguidance.LLMatcher.grammar_from_lark, text, tokenizer)

    @classmethod
    def from_regex(cls, pattern: str, tokenizer: Tokenizer) -> Grammar:
        """Texts that a regular expression matches as a whole.

        Raises:
            GrammarError: it cannot be parsed, or is too large.
        """
        make = llguidance.LLMatcher.grammar_from_regex
        return cls._compiled("regular expression", make, pattern, tokenizer)

    @classmethod
    def from_choices(cls, choices: Sequence[str], tokenizer: Tokenizer) -> Grammar:
        """One of several texts.

        Raises:
            GrammarError: there are none, or they are too long.
        """
        if not choices or "" in choices:
            raise GrammarError("choices: give at least one text, and none that is empty")
        return cls.from_lark("start: " + " | ".join(map(json.dumps, choices)), tokenizer)

    @classmethod
    def _compiled(cls, kind: str, make: Callable[[str], str], text: str, tokenizer: Tokenizer) -> Grammar:
        """The grammar that ``make`` writes of a text; errors begin with the text's kind."""
        _check_length(kind, text)
        try:
            return cls(make(text), tokenizer)
        except ValueError as error:
            raise GrammarError(f"{kind}: {error}") from None

    def matcher(self, triggers: Sequence[str] = ()) -> Matcher:
        """The state at the beginning of a sample.

        Args:
            triggers: texts at which it begins, and which belong to it; without any, it begins at once.
        """
        return Matcher(self._state.deep_copy(), self.tokenizer, triggers)


class Matcher:
    """A grammar's state in one sample: a `jaxpaged.engine.constraint.Constraint`."""

    def __init__(self, state: Any, tokenizer: Tokenizer, triggers: Sequence[str] = ()) -> None:
        """Use `Grammar.matcher`."""
        self._state, self._tokenizer = state, tokenizer
        self._triggers = tuple(text.encode() for text in triggers)
        self._tail: list[int] = []
        """The latest tokens, in which a trigger may have begun."""
        self._is_off = False
        self._check()

    @property
    def is_active(self) -> bool:
        """False while the grammar has not begun."""
        return not self._triggers and not self._is_off

    @property
    def is_finished(self) -> bool:
        """True if only the end of the text may come next."""
        return self.is_active and self._state.is_stopped() and not self._state.is_error()

    def allowed(self, out: np.ndarray) -> None:
        """Writes a packed mask of the tokens that may come next, of a text's end if that may come.

        Args:
            out: i32[W], W at least `ceil(vocab_size / 32)`; bit i of word w stands for token 32 w + i.

        Raises:
            GrammarError: a limit of the parser.
        """
        words = out[: -(-self._tokenizer.vocab_size // 32)]
        self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()

    def accept(self, tokens: Sequence[int]) -> None:
        """Advances by tokens.

        Raises:
            GrammarError: one that is not allowed, or a limit of the parser.
        """
        for i, token in enumerate(tokens):
            if self._is_off:
                return
            if self.is_active:
                rest = list(tokens[i:])
                if i and self._state.validate_tokens(rest) < len(rest):
                    # Sampled in the step of the trigger, before a mask was asked for: the text goes on freely.
                    self._is_off = True
                    return
                self._state.consume_tokens(rest)
                return self._check()
            self._wait(token)

    def _wait(self, token: int) -> None:
        """Searches the latest tokens for the text at which the grammar begins."""
        self._tail = [*self._tail, token][-_TRIGGER_TOKENS:]
        pieces = [self._tokenizer.token_bytes(t) for t in self._tail]
        text = b"".join(pieces)
        places = [place for trigger in self._triggers if (place := text.find(trigger)) >= 0]
        if not places:
            return
        # The tokens from the trigger on, whose first may begin before it.
        begin, num_before, first = min(places), 0, 0
        while num_before < begin:
            num_before += len(pieces[first])
            first += 1
        middle = text[begin:num_before]
        begun = [*_vocabulary(self._tokenizer).tokenize_bytes(middle), *self._tail[first:]]
        if self._state.validate_tokens(begun) == len(begun):
            self._triggers, self._tail = (), []
            self._state.consume_tokens(begun)
        else:  # a text that only looks like it
            self._tail = self._tail[-1:]

    def forced(self) -> list[int]:
        """Tokens that alone may come next, in order; there may be none."""
        return self._state.compute_ff_tokens() if self.is_active else []

    def copy(self) -> Matcher:
        """An independent matcher in the same state."""
        other = Matcher(self._state.deep_copy(), self._tokenizer)
        other._triggers, other._tail, other._is_off = self._triggers, self._tail, self._is_off
        return other

    def _check(self) -> None:
        if self._state.is_error():
            raise GrammarError(_one_line(self._state.get_error()))


def _check_length(kind: str, text: str) -> None:
    if len(text) > MAX_LENGTH:
        raise GrammarError(f"{kind}: {len(text)} characters; at most {MAX_LENGTH} are allowed")


def _one_line(message: str) -> str:
    """A message without the backtrace of a panic."""
    return " ".join(message.partition("<backtrace>")[0].partition("<state>")[0].split())[:300]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """llguidance's tokenizer; building it takes up to a second."""
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
    stops = sorted(tokenizer.stop_ids) or None
    return llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=stops)


class _Vocabulary:
    """The attributes that llguidance reads of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.stop_ids:
            raise GrammarError("the vocabulary has no token that ends a text, so no grammar could end it")
        self._encode = tokenizer.encode
        self.eos_token_id = min(tokenizer.stop_ids) if tokenizer.eos_id is None else tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.stop_ids)
        self._adds_space = self._bytes(self._encode("a", add_special=False)).startswith(b" ")

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text inside another one."""
        if not isinstance(text, str):  # llguidance tries both
            raise TypeError("text must be a string")
        if not self._adds_space:
            return self._encode(text, add_special=False)
        # A SentencePiece vocabulary puts a space before the first word; that of a byte no word merges with.
        ids, begin = self._encode("\x02" + text, add_special=False), 1
        while not self._bytes(ids[:begin]).endswith(b"\x02"):
            begin += 1
        return ids[begin:]
