"""A grammar within `generate`, from Python."""

from __future__ import annotations

import json

import jsonschema
from jaxpaged_model import load_model, tiny
from jaxpaged_model.grammar_processor import GrammarProcessor
from jaxpaged_model.text.grammar import Grammar

from jaxpaged import PagedKVCache, SamplingParams, generate

SCHEMA = {"type": "array", "items": {"enum": ["red", "blue", 7]}, "minItems": 1, "maxItems": 3}


def test_samples_follow_a_schema_each_at_its_own_pace():
    loaded = load_model(tiny.PATH)
    tokenizer = loaded.tokenizer
    processor = GrammarProcessor(Grammar.from_json_schema(SCHEMA, tokenizer))
    cache = PagedKVCache.create(**loaded.config.cache_spec, num_pages=40, max_seqs=2)
    prompts = [tokenizer.encode(text) for text in ("colors = ", "x = 1\ny = ", "def f():")]
    options = {
        "max_new_tokens": 240,
        "sampling": SamplingParams.create(3, temperature=1.5, seed=[1, 2, 3]),
        "stop_ids": sorted(tokenizer.stop_ids),
        "logits_processor": processor,
    }
    first, cache = generate(loaded.function, loaded.params, cache, prompts, **options)
    again, _ = generate(loaded.function, loaded.params, cache, prompts, **options)
    texts = [tokenizer.decode(tokens) for tokens in first.token_lists()]
    assert texts == [tokenizer.decode(tokens) for tokens in again.token_lists()] and len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
