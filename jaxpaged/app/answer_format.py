"""The grammar of ``--json-schema`` and ``--grammar``."""

from __future__ import annotations

import json
from typing import Any

from jaxpaged_model.text.tokenizer import Tokenizer

from jaxpaged.app.errors import InputError
from jaxpaged.app.options import GenerateOptions
from jaxpaged.app.prompt import read_text

_FLAGS = {
    "json_schema": "-j",
    "json_schema_file": "-jf",
    "grammar": "--grammar",
    "grammar_file": "--grammar-file",
}


def check_format(options: GenerateOptions) -> None:
    """Checks the flags before a model is loaded.

    Raises:
      InputError: several of them, or one together with what cannot follow a grammar.
    """
    given = [flag for name, flag in _FLAGS.items() if getattr(options, name) is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} both say what an answer looks like; give one of them")
    if given and options.beams > 1:
        raise InputError(f"{given[0]} works with samples, not with --beams")
    if given and options.ignore_eos:
        raise InputError(f"{given[0]} says where the text ends, and --ignore-eos that it never does")


def grammar_processor(options: GenerateOptions, tokenizer: Tokenizer) -> Any:
    """The ``logits_processor`` of a run; None without a grammar.

    Raises:
      InputError: a file that cannot be read, or a schema or grammar that is none.
    """
    name = next((name for name in _FLAGS if getattr(options, name) is not None), None)
    if name is None:
        return None
    from jaxpaged_model.grammar_processor import GrammarProcessor
    from jaxpaged_model.text.grammar import Grammar, GrammarError

    flag, text = _FLAGS[name], getattr(options, name)
    if name.endswith("_file"):
        text = read_text(flag, text)
    try:
        if name.startswith("json"):
            return GrammarProcessor(Grammar.from_json_schema(_schema(flag, text), tokenizer))
        return GrammarProcessor(Grammar.from_gbnf(text, tokenizer))
    except GrammarError as error:
        raise InputError(f"{flag}: {error}") from None


def _schema(flag: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{flag}: not JSON: {error}") from None
