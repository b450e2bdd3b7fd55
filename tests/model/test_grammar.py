"""Grammars allow exactly their texts, whatever a model would rather say."""

from __future__ import annotations

import contextlib
import json
import re

import jsonschema
import numpy as np
import pytest
from jaxpaged_model import tiny
from jaxpaged_model.checkpoint.loading import load_model
from jaxpaged_model.text.grammar import MAX_LENGTH, Grammar, GrammarError, Matcher
from json_schemas import SCHEMAS


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(tiny.PATH).tokenizer


def allowed(matcher: Matcher, tokenizer) -> np.ndarray:
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    matcher.allowed(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False)


def random_text(matcher: Matcher, tokenizer, rng, most: int) -> str | None:
    """Text of tokens that are chosen with equal chances; None if it has no end within ``most``."""
    tokens: list[int] = []
    while len(tokens) < most and not matcher.is_finished:
        forced = matcher.forced()
        if forced:
            assert allowed(matcher, tokenizer).tolist() == forced[:1]
        choices = allowed(matcher, tokenizer)
        if not tokenizer.stop_ids.isdisjoint(choices.tolist()) and rng.random() < 0.3:
            return tokenizer.decode(tokens)
        token = int(rng.choice(choices[~np.isin(choices, list(tokenizer.stop_ids))]))
        matcher.accept([token])
        tokens.append(token)
    return tokenizer.decode(tokens) if matcher.is_finished else None


def accepts(grammar: Grammar, text: str) -> bool:
    """True if a text is one of the grammar's."""
    matcher, tokenizer = grammar.matcher(), grammar.tokenizer
    try:
        matcher.accept(ids(tokenizer, text))
    except GrammarError:
        return False
    return matcher.is_finished or bool(tokenizer.stop_ids & set(allowed(matcher, tokenizer).tolist()))


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_texts_are_valid(tokenizer, name):
    schema, rng = SCHEMAS[name], np.random.default_rng(3)
    grammar = Grammar.from_json_schema(schema, tokenizer)
    texts = [random_text(grammar.matcher(), tokenizer, rng, 2000) for _ in range(8)]
    finished = [text for text in texts if text is not None]
    assert finished
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for text in finished:
        validator.validate(json.loads(text))


def test_a_json_text_is_allowed_in_any_usual_layout(tokenizer):
    grammar = Grammar.from_json_schema(SCHEMAS["nested"], tokenizer)
    value = {"outer": {"inner": {"deep": True}}, "n": 3}
    for layout in ({}, {"indent": 2}, {"separators": (",", ":")}):
        assert accepts(grammar, json.dumps(value, **layout))
    assert not accepts(grammar, json.dumps(value)[:-1])
    assert not accepts(grammar, json.dumps(value | {"m": 1}))


def test_gbnf_regex_choices_and_lark_allow_their_texts(tokenizer):
    gbnf = Grammar.from_gbnf('root ::= "a" [0-9]{2,3} rest?\nrest ::= " ok" | "!"+', tokenizer)
    for text, good in (("a12", True), ("a123 ok", True), ("a12!!!", True), ("a1", False), ("b12", False)):
        assert accepts(gbnf, text) == good
    regex = Grammar.from_regex(r"[a-f]+-\d{2}", tokenizer)
    assert accepts(regex, "abc-12") and not accepts(regex, "abc-1") and not accepts(regex, "xyz-12")
    choices = Grammar.from_choices(["yes", 'no "way"', "ünïcode"], tokenizer)
    for text in ("yes", 'no "way"', "ünïcode"):
        assert accepts(choices, text)
    assert not accepts(choices, "ye") and not accepts(choices, "yesyes")
    lark = Grammar.from_lark('start: "<call>" %json {"type": "boolean"} "</call>"', tokenizer)
    assert accepts(lark, "<call>true</call>") and not accepts(lark, "<call>1</call>")


def test_a_finished_grammar_allows_only_the_end(tokenizer):
    matcher = Grammar.from_choices(["yes"], tokenizer).matcher()
    assert not matcher.is_finished and matcher.is_active
    matcher.accept(ids(tokenizer, "yes"))
    assert matcher.is_finished
    assert set(allowed(matcher, tokenizer).tolist()) == set(tokenizer.stop_ids)
    with pytest.raises(GrammarError, match="parser stopped"):
        matcher.accept(ids(tokenizer, "yes"))


def test_forced_tokens_are_those_of_the_text(tokenizer):
    text = '{"temperature_in_celsius":'
    schema = {"type": "object", "properties": {"temperature_in_celsius": {"type": "integer"}},
              "required": ["temperature_in_celsius"], "additionalProperties": False}  # fmt: skip
    matcher = Grammar.from_json_schema(schema, tokenizer).matcher()
    matcher.accept(ids(tokenizer, '{"'))
    forced = matcher.forced()
    assert forced and text.startswith('{"' + tokenizer.decode(forced))
    matcher.accept(forced)


def test_copies_are_independent(tokenizer):
    matcher = Grammar.from_choices(["!ab", "!ac"], tokenizer).matcher(triggers=("!",))
    other = matcher.copy()
    matcher.accept(ids(tokenizer, "!"))
    assert matcher.is_active and not other.is_active
    third = matcher.copy()
    matcher.accept(ids(tokenizer, "ab"))
    assert matcher.is_finished and not third.is_finished
    third.accept(ids(tokenizer, "ac"))
    assert third.is_finished


@pytest.mark.parametrize("before", ["Let me see. ", "x" * 300, "<call <cal ", ""])
def test_a_grammar_may_begin_at_a_trigger(tokenizer, before):
    grammar = Grammar.from_lark('start: "<call>" /[0-9]+/ "</call>"', tokenizer)
    matcher = grammar.matcher(triggers=("<call>", "[CALL]"))
    tokens = ids(tokenizer, before + "<call>")
    for token in tokens:
        assert not matcher.is_active
        matcher.accept([token])
    assert matcher.is_active
    matcher.accept(ids(tokenizer, "12</call>"))
    assert matcher.is_finished


@pytest.mark.parametrize(("trigger", "begins", "rest"), [(":", True, "7"), ('"', False, '"7')])
def test_a_trigger_within_a_token_takes_the_rest_of_it_which_must_be_allowed(
    tokenizer, trigger, begins, rest
):
    token = next(t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) == b'":')
    matcher = Grammar.from_regex(f"{trigger}[0-9]", tokenizer).matcher(triggers=(trigger,))
    matcher.accept([token])
    assert matcher.is_active == begins
    matcher.accept(ids(tokenizer, rest))
    assert matcher.is_finished


def test_what_came_in_the_step_of_a_trigger_and_does_not_belong_ends_the_grammar(tokenizer):
    matcher = Grammar.from_regex(r"<c>[0-9]+", tokenizer).matcher(triggers=("<c>",))
    matcher.accept(ids(tokenizer, "say <c>") + ids(tokenizer, "abc"))
    assert not matcher.is_active and not matcher.is_finished
    matcher.accept(ids(tokenizer, "<c>"))
    assert not matcher.is_active


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nope"}, "JSON schema: Invalid type: nope"),
        ({"properties": 3}, "JSON schema: properties must be an object"),
        ({"$ref": "#/x"}, "JSON schema: Pointer '/x' does not exist"),
        ({"pattern": "(", "type": "string"}, "JSON schema: regex parse error"),
        ({"not": {"type": "string"}}, r'JSON schema: Unimplemented keys: \["not"\]'),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "JSON schema: Unsatisfiable schema: minLength"),
        ({"enum": []}, "JSON schema: Unsatisfiable"),
        (False, "not a JSON schema: it must be an object, not false"),
        ([1], "not a JSON schema: it must be an object"),
        ({"const": object()}, "not a JSON schema: "),
        ({"enum": ["x" * MAX_LENGTH]}, f"schema: {MAX_LENGTH + 14} characters; at most {MAX_LENGTH} are"),
    ],
)
def test_a_bad_schema_is_named_in_one_line(tokenizer, schema, message):
    with pytest.raises(GrammarError, match=message) as caught:
        Grammar.from_json_schema(schema, tokenizer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_keywords_that_cannot_be_enforced_are_ignored_where_asked(tokenizer):
    schema = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 3}
    with pytest.raises(GrammarError, match="uniqueItems"):
        Grammar.from_json_schema(schema, tokenizer)
    assert accepts(Grammar.from_json_schema(schema, tokenizer, strict=False), "[true, true]")


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (Grammar.from_gbnf, "root ::= x", "grammar: Rule 'x' not found"),
        (Grammar.from_gbnf, 'foo ::= "a"', "grammar: No 'root' rule found"),
        (Grammar.from_gbnf, 'root ::= "a', "grammar: "),
        (Grammar.from_gbnf, "", "grammar: "),
        (Grammar.from_gbnf, "]" * 100, "grammar: "),
        (Grammar.from_lark, "start: x", "grammar: "),
        (Grammar.from_regex, "(", "regular expression: .*unclosed group"),
        (Grammar.from_regex, "(?=x)y", "regular expression: .*look-around"),
        (Grammar.from_choices, [], "choices: give at least one text"),
        (Grammar.from_choices, ["a", ""], "choices: give at least one text, and none that is empty"),
        (Grammar.from_gbnf, "x" * (MAX_LENGTH + 1), "grammar: 131073 characters; at most"),
    ],
)
def test_a_bad_grammar_is_named_in_one_line(tokenizer, make, source, message):
    with pytest.raises(GrammarError, match=message) as caught:
        make(source, tokenizer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def _pairs(count: int) -> dict:
    return {
        "allOf": [{"anyOf": [{"properties": {f"{c}{i}": {"const": 1}}} for c in "ab"]} for i in range(count)]
    }


def test_a_schema_that_explodes_is_refused(tokenizer):
    for schema in (_pairs(22), json.loads('{"items":' * 500 + "{}" + "}" * 500)):
        with pytest.raises(GrammarError) as caught:
            Grammar.from_json_schema(schema, tokenizer)
        message = str(caught.value)
        assert re.fullmatch(r"JSON schema: .*(too large|limit).*", message, re.I)


def test_a_pattern_that_explodes_ends_in_an_error_and_not_in_a_hang(tokenizer):
    rng = np.random.default_rng(0)
    for pattern in ("(.*a.{20}){3}", "(a?){200}a{200}", "(.*[a-z].{12}){8}x"):
        matcher = Grammar.from_regex(pattern, tokenizer).matcher()
        with contextlib.suppress(GrammarError):
            random_text(matcher, tokenizer, rng, 100)
