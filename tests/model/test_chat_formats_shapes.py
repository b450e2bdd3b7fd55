"""Shapes of calls that no published template has, and templates that are broken."""

from __future__ import annotations

import json

import pytest
from chat_format_kit import ARGUMENTS, TOOLS, call, derive, parse, render_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxpaged_model.text.chat_format import ChatFormat
from test_chat_formats import OWN, STEPS

NAME, ARGS = "{{ c.function.name }}", "{{ c.function.arguments | tojson }}"
EACH = "{% for k, v in c.function.arguments.items() %}"
TEXT_OR_JSON = "{{ v if v is string else v | tojson }}"
SHAPES = {
    "arguments before the name": f'<c>{{"arguments": {ARGS}, "name": "{NAME}"}}</c>',
    "id before the name": f'<c>{{"id": "{{{{ c.id }}}}", "name": "{NAME}", "arguments": {ARGS}}}</c>',
    "an object in an object": f'<c>{{"function": {{"name": "{NAME}", "arguments": {ARGS}}}}}</c>',
    "arguments as a string": f'<c>{{"name": "{NAME}", "arguments": {ARGS.replace("tojson", "tojson | tojson")}}}</c>',
    "a number": f"<c>{{{{ loop.index0 }}}}:{NAME} {ARGS}</c>",
    "an id on both sides": f"<c>{{{{ c.id }}}}<n>{NAME}<a>{{{{ c.id }}}}<b>{ARGS}</c>",
    "an id twice": f"<c id={{{{ c.id }}}} again={{{{ c.id }}}}>{NAME}\n{ARGS}</c>",
    "a name twice": f"<c>{NAME}<n>{NAME}<a>{ARGS}</c>",
    "characters of regular expressions": f"<c>*+?({NAME})|[{ARGS}]</c>",
    "lines": f"<c>{NAME}:{EACH}\n  {{{{ k }}}}: {{{{ v | tojson }}}}{{% endfor %}}\n</c>",
    "attributes": f'<invoke name="{NAME}">{EACH}<p name="{{{{ k }}}}">{TEXT_OR_JSON}</p>{{% endfor %}}</invoke>',
    "keys in tags": f"<c>{NAME}\n{EACH}<k>{{{{ k }}}}</k>\n<v>{TEXT_OR_JSON}</v>\n{{% endfor %}}</c>",
}


def template_of(shape: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        f"{shape}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize("name", SHAPES)
def test_calls_of_any_shape_are_parsed_back(name):
    template = template_of(SHAPES[name])
    chat_format = derive(template)
    for content, calls in (("", [call(0)]), ("Let me see.", [call(1)]), ("", [call(0), call(1)])):
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        prompt, text = render_answer(template, message)
        wanted = [(one["function"]["name"], one["function"]["arguments"]) for one in calls]
        for step in STEPS:
            assert parse(chat_format, prompt, text, step) == ("", content, wanted), (step, text)


def test_a_special_marker_with_brackets_is_whole():
    chat_format = derive(template_of(f"]<]minimax[>[<c>{NAME} {ARGS}]<]minimax[>[</c>"))
    assert set(chat_format.special_markers) == {"]<]minimax[>[", "<c>", "</c>"}


@pytest.mark.parametrize("name", OWN)
def test_an_answer_may_end_anywhere(name):
    chat_format = derive(OWN[name])
    prompt, text = render_answer(OWN[name], {"role": "assistant", "content": "", "tool_calls": [call(1)]})
    for end in range(len(text) + 1):
        parser = chat_format.parser(tools=TOOLS, prompt=prompt)
        delta = parser.push(text[:end]) + parser.finish()
        assert {one.index for one in delta.tool_calls} <= {0}
        assert [one.name for one in delta.tool_calls if one.name] == ["find_place"] * bool(delta.tool_calls)
    assert json.loads("".join(one.arguments for one in delta.tool_calls)) == ARGUMENTS[1]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(OWN)), st.integers(0, 10**6), st.integers(0, 60), st.text(max_size=4))
def test_any_text_is_a_template(name, at, length, between):
    template = OWN[name]
    at %= len(template)
    chat_format = ChatFormat.derive(template[:at] + between + template[at + length :])
    parser = chat_format.parser(tools=TOOLS, prompt="")
    parser.push("<tool_call>\n{}")
    parser.finish()


ODD = {"city": "  \U0001f600 </c> é\t\\ {{ x }} %}\n  ", "days": 10**20}
"""Indentation counts: tools that edit files get texts that begin and end with white space."""


@pytest.mark.parametrize("name", sorted(set(OWN) - {"harmony"}))
def test_arguments_may_have_any_characters(name):
    new = {**call(0), "function": {"name": "get_weather", "arguments": ODD}}
    prompt, text = render_answer(OWN[name], {"role": "assistant", "content": "", "tool_calls": [new]})
    for step in STEPS:
        assert parse(derive(OWN[name]), prompt, text, step) == ("", "", [("get_weather", ODD)]), step


@pytest.mark.parametrize("name", sorted(OWN))
def test_white_space_without_end_does_not_stop_the_parser(name):
    """A weak model writes nothing else within a call. (Patterns that divide it in all ways would take days.)"""
    prompt, text = render_answer(OWN[name], {"role": "assistant", "content": "", "tool_calls": [call(1)]})
    for end in range(0, len(text) + 1, 5):
        parser = derive(OWN[name]).parser(tools=TOOLS, prompt=prompt)
        parser.push(text[:end])
        parser.push(" \n" * 4000)
        parser.finish()


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        (
            "tags",
            "<tool_call>\n<function=get_weather>\n<parameter=place>\n{'a'}\n</parameter>",
            '{"place": "{\'a\'}"}',
        ),
        (
            "tags",
            "<tool_call>\n<function=get_weather>\n<parameter=days>\nNaN\n</parameter>",
            '{"days": "NaN"}',
        ),
        ("tags", "<tool_call>\n<function=get_weather>\n<parameter=days>\n1\n</parameter>", '{"days": 1}'),
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": "a\\q"}', "a\\q"),
        ("harmony", "<|channel|>commentary to=functions.get_weather<|message|>{}<|<|call|>", "{}<|"),
        ("python", f"<|call|>[get_weather(place={'[' * 1200})]<|/call|>", None),
    ],
)
def test_malformed_arguments_end_no_request(name, text, arguments):
    for step in STEPS:
        parser = derive(OWN[name]).parser(tools=TOOLS, prompt="")
        deltas = [parser.push(text[i : i + step]) for i in range(0, len(text), step)] + [parser.finish()]
        calls = [one for delta in deltas for one in delta.tool_calls]
        assert [one.name for one in calls if one.name] == ["get_weather"]
        assert arguments is None or "".join(one.arguments for one in calls) == arguments, step
