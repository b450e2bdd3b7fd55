"""JSON schemas of the JSON Schema Test Suite: what a grammar lets through is valid.

JAXPAGED_JSON_SUITE=FOLDER names ``draft2020-12`` of the suite, which jsonschema's source distribution has, too.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.text.grammar import Grammar, GrammarError
from test_grammar import accepts, random_text

SUITE = os.environ.get("JAXPAGED_JSON_SUITE")


@pytest.mark.skipif(SUITE is None, reason="JAXPAGED_JSON_SUITE names no folder")
def test_what_a_grammar_lets_through_is_valid():
    assert SUITE is not None
    tokenizer, rng, counts = load_model(tiny.PATH).tokenizer, np.random.default_rng(0), Counter()
    for path in sorted(Path(SUITE).glob("*.json")):
        for group in json.loads(path.read_text("utf-8")):
            counts["schemas"] += 1
            try:
                grammar = Grammar.from_json_schema(group["schema"], tokenizer)
            except GrammarError:
                continue  # refused: it has keywords that no grammar enforces
            counts["compiled"] += 1
            name, validator = group["description"], jsonschema.Draft202012Validator(group["schema"])
            for _ in range(4):
                text = random_text(grammar.matcher(), tokenizer, rng, 400)
                if text is not None:
                    counts["random texts"] += 1
                    assert validator.is_valid(json.loads(text)), (name, text)
            for case in group["tests"]:
                if not case["valid"]:
                    counts["invalid, refused"] += 1
                    text = json.dumps(case["data"], separators=(",", ":"))
                    assert not accepts(grammar, text), (name, text)
    print(dict(counts))
    assert counts["compiled"] > 100
