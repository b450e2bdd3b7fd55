"""Grammars of calls: they allow what templates render for valid calls, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from chat_format_kit import TOOLS, call, derive, render_answer
from jaxpaged_model.text.chat import ChatTemplateError
from jaxpaged_model.text.grammar import Grammar, GrammarError
from template_sources import read_templates
from test_chat_formats import OWN

STOPS = ("</s>", "<|eom_id|>", "<|eot_id|>")
"""Tokens at which `render_answer` ends an answer."""
KNOWN_GAPS = {
    "Cohere2MoE": "the number of a call stands in its object, and is no part of the format",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "the same",
    "muse-glimmer": "the recipient of a message stands before its marker",
    "openai-gpt-oss-120b": "the template writes the recipient before the channel; models write it behind",
}


class Bytes:
    """A tokenizer whose tokens are bytes, special tokens, and the end of a text."""

    bos_id = None

    def __init__(self, special: Sequence[str]) -> None:
        self.pieces = [bytes([byte]) for byte in range(256)]
        self.pieces += [text.encode() for text in special] + [b"<|the end|>"]
        self.vocab_size = len(self.pieces)
        self.special = {text: 256 + i for i, text in enumerate(special)}
        self.special_ids = frozenset(range(256, self.vocab_size))
        self.eos_id = self.vocab_size - 1
        self.stop_ids = frozenset({self.eos_id})

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        return list(text.encode())

    def ids(self, text: str) -> list[int]:
        """Tokens of an answer: special ones where their text stands."""
        words = sorted(self.special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, words))})", text) if words else [text]
        return [
            token
            for part in parts
            for token in ([self.special[part]] if part in self.special else self.encode(part))
        ]


class Answers:
    """The grammar of a template's calls.

    Args:
        tools: the tools that may be called.
        special: True: the template's markers are special tokens of the vocabulary.
    """

    def __init__(
        self, template: str, *, special: bool, parallel: bool = True, tools: Sequence[Any] = TOOLS
    ) -> None:
        self.template, self.format = template, derive(template)
        self.tokenizer: Any = Bytes(self.format.special_markers if special else ())
        source = self.format.call_grammar(
            tools, parallel=parallel, special=self.tokenizer.special, stops=STOPS
        )
        self.grammar = Grammar.from_lark(source, self.tokenizer)

    def render(self, *calls: dict[str, Any]) -> str:
        message = {"role": "assistant", "content": "", "tool_calls": list(calls)}
        text = render_answer(self.template, message)[1]
        if self.format.reasoning is not None:  # thoughts come before the grammar
            _, found, behind = text.partition(self.format.reasoning[1].strip())
            text = behind if found else text
        return text.strip()

    def allows(self, text: str) -> bool:
        matcher = self.grammar.matcher()
        try:
            matcher.accept(self.tokenizer.ids(text))
        except GrammarError:
            return False
        mask = np.zeros(-(-self.tokenizer.vocab_size // 32), np.int32)
        matcher.allowed(mask)
        return matcher.is_finished or bool(
            mask[self.tokenizer.eos_id // 32] >> self.tokenizer.eos_id % 32 & 1
        )

    def allows_calls(self, *calls: dict[str, Any]) -> bool:
        """True if calls are allowed, with the white space before or behind them that the format may have."""
        text = self.render(*calls)
        return any(
            self.allows(before + text + behind)
            for before in ("", "\n", "\n\n", " ")
            for behind in ("", "\n", "\n\n")
        )


def with_arguments(i: int, **changed: Any) -> dict[str, Any]:
    """A call of the i-th tool; None in place of an argument takes it out."""
    new = deepcopy(call(i))
    arguments = {"city": "Rome", "days": 2} | changed
    new["function"]["arguments"] = {key: value for key, value in arguments.items() if value is not None}
    return new


def named(name: str) -> dict[str, Any]:
    new = with_arguments(0)
    new["function"]["name"] = name
    return new


@pytest.mark.parametrize("special", [False, True], ids=["as text", "as tokens"])
@pytest.mark.parametrize("name", OWN)
def test_calls_are_allowed_and_others_are_not(name, special):
    answers = Answers(OWN[name], special=special)
    for i in (0, 1):
        assert answers.allows_calls(call(i)), answers.render(call(i))
    assert answers.allows_calls(with_arguments(0, days=None))
    assert not answers.allows_calls(named("other_tool"))
    assert not answers.allows_calls(with_arguments(0, days="many"))
    assert not answers.allows_calls(with_arguments(0, city=None))
    text = answers.render(with_arguments(0))
    assert not answers.allows("Let me see. " + text)
    assert not answers.allows(text.replace("Rome", "Rome" + text))
    assert not answers.allows(text[: text.index("Rome")])
    assert not answers.allows("")


@pytest.mark.parametrize("name", [name for name in OWN if name not in ("llama", "harmony")])
def test_several_calls_are_allowed_if_they_may_be(name):
    several, one = Answers(OWN[name], special=True), Answers(OWN[name], special=True, parallel=False)
    assert several.allows_calls(call(0), call(1)) and several.allows_calls(call(1))
    assert not one.allows_calls(call(0), call(1)) and one.allows_calls(call(1))


@pytest.mark.parametrize("name", OWN)
def test_a_named_tool_is_the_only_one(name):
    answers = Answers(OWN[name], special=True, tools=TOOLS[1:])
    assert answers.allows_calls(with_arguments(1)) and not answers.allows_calls(with_arguments(0))


def test_a_marker_that_is_a_token_is_not_allowed_as_text():
    answers = Answers(OWN["hermes"], special=True)
    text = answers.render(call(1))
    assert answers.allows_calls(call(1))
    for whole in (text, "\n" + text):
        matcher = answers.grammar.matcher()
        with pytest.raises(GrammarError):
            matcher.accept(answers.tokenizer.encode(whole))


PLACE = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
UNIT_AND_PLACE = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"], "type": "string"},
        "at": PLACE,
        "n": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["unit", "at"],
    "additionalProperties": False,
}
WITH_DEFINITION = {
    **UNIT_AND_PLACE,
    "properties": {**UNIT_AND_PLACE["properties"], "at": {"$ref": "#/$defs/place"}},
    "$defs": {"place": PLACE},
}
"""The same schema as pydantic writes it."""


@pytest.mark.parametrize("parameters", [UNIT_AND_PLACE, WITH_DEFINITION], ids=["plain", "with $defs"])
@pytest.mark.parametrize("name", OWN)
def test_arguments_follow_their_schema(name, parameters):
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    answers = Answers(OWN[name], special=True, tools=[tool])
    good = {"unit": "C", "at": {"x": 1.5}, "n": 7}
    bad: list[dict[str, Any]] = [{"unit": "K"}, {"at": {}}, {"at": {"x": "1"}}, {"n": 10}, {"m": 1}]

    def allows(arguments: dict[str, Any]) -> bool:
        new = call(0)
        return answers.allows_calls({**new, "function": {**new["function"], "arguments": arguments}})

    assert allows(good)
    for change in bad:
        assert not allows(good | change), change


@pytest.mark.parametrize("name", OWN)
def test_a_function_without_parameters_is_called_without_arguments(name):
    tool = {"type": "function", "function": {"name": "get_weather"}}
    new = call(0)
    new["function"] = {"name": "get_weather", "arguments": {}}
    assert Answers(OWN[name], special=True, tools=[tool]).allows_calls(new)


@pytest.mark.slow
def test_calls_that_published_templates_render_are_allowed():
    templates = read_templates()
    if not templates:
        pytest.skip("the templates cannot be downloaded")
    num_allowed, failures = 0, {}
    for name, template in templates.items():
        if name in KNOWN_GAPS or derive(template).calls is None:
            continue
        for special in (False, True):
            try:
                answers = Answers(template, special=special)
                text = answers.render(with_arguments(0))
                if "Rome" not in text:
                    continue  # the template renders no calls in the last message
                if not answers.allows_calls(with_arguments(0)):
                    failures[name, special] = text
                elif answers.allows_calls(named("other_tool")) or answers.allows_calls(
                    with_arguments(0, days="many")
                ):
                    failures[name, special] = "bad calls are allowed"
                else:
                    num_allowed += 1
            except ChatTemplateError:
                continue
            except GrammarError as error:
                failures[name, special] = str(error)
    print(f"{num_allowed} grammars; failures: {json.dumps([*map(str, failures)])}")
    assert not failures
    assert num_allowed > 100
