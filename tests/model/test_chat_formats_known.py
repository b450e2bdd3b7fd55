"""Formats that stand in a table, for templates that render no calls."""

from __future__ import annotations

import json

import pytest
from chat_format_kit import QUESTION, TOOLS, call, parse
from jaxpaged_model.text.call_grammar import CallGrammar
from jaxpaged_model.text.chat import render_chat
from jaxpaged_model.text.chat_format import ChatFormat
from jaxpaged_model.text.known_formats import KNOWN_FORMATS, calls_as_content, known_calls
from template_sources import read_templates
from test_chat_formats import OWN, STEPS

LFM2, GRANITE = "List of tools: <|tool_list_start|>[", "<|tool_call|> <|start_of_role|> available_tools"


def written(template: str, *calls, content: str = "") -> str:
    message = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    plain = calls_as_content(message, known_calls(template))
    assert plain.keys() == {"role", "content"}
    return plain["content"]


@pytest.mark.parametrize("template", [LFM2, GRANITE], ids=["lfm2", "granite"])
def test_calls_that_are_written_are_parsed_back(template):
    chat_format = ChatFormat(None, known_calls(template))
    for calls, content in ([[call(0)], ""], [[call(1)], "Let me see."], [[call(0), call(1)], ""]):
        wanted = [(one["function"]["name"], one["function"]["arguments"]) for one in calls]
        text = written(template, *calls, content=content)
        for step in STEPS:
            assert parse(chat_format, "", text, step) == ("", content, wanted), (step, text)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (LFM2, "<|tool_call_start|>[get_weather(city='Rome', exact=True)]<|tool_call_end|>"),
        (LFM2, '<|tool_call_start|>[get_weather(city="Rome",exact=true)]<|tool_call_end|>'),
        (GRANITE, '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome", "exact": true}}]'),
        (GRANITE, '<|tool_call|> [{"arguments": {"city": "Rome", "exact": true}, "name": "get_weather"}]'),
    ],
)  # fmt: skip
def test_calls_as_models_write_them(template, text):
    chat_format = ChatFormat(None, known_calls(template))
    for step in STEPS:
        wanted = [("get_weather", {"city": "Rome", "exact": True})]
        assert parse(chat_format, "", text, step) == ("", "", wanted), step


@pytest.mark.parametrize("template", [LFM2, GRANITE], ids=["lfm2", "granite"])
def test_text_that_is_no_call_is_content(template):
    opening = known_calls(template).section_open
    for text in (opening, opening + "no call", "List of tools: [1]", "[get_weather()]", '[{"name": 1}]'):
        for step in STEPS:
            assert parse(ChatFormat(None, known_calls(template)), "", text, step) == ("", text, []), step


def test_a_message_without_calls_stays():
    message = {"role": "user", "content": "Question?"}
    assert calls_as_content(message, known_calls(LFM2)) == message
    assert (
        calls_as_content({**message, "content": None, "tool_calls": []}, known_calls(LFM2))["content"] is None
    )


def test_other_templates_are_not_in_the_table():
    assert not any(known_calls(template) for template in (*OWN.values(), "", "List of tools: "))


@pytest.mark.slow
def test_templates_of_the_table_list_tools_and_render_no_calls():
    templates = read_templates()
    if not templates:
        pytest.skip("the templates cannot be downloaded")
    found = {name: template for name, template in templates.items() if known_calls(template)}
    derived = {name for name, template in found.items() if ChatFormat.derive(template).calls is not None}
    assert not {
        name for name in derived if ChatFormat.derive(found[name]).calls != known_calls(found[name])
    }, derived
    assert {"LFM2-8B-A1B", "LFM2.5-Instruct", "ibm-granite-granite-3.3-2B-Instruct"} <= found.keys()
    assert {id(known_calls(template)) for template in found.values()} == {
        id(calls) for _, calls in KNOWN_FORMATS
    }
    for template in found.values():
        message = {"role": "assistant", "content": "", "tool_calls": [call(1)]}
        plain = calls_as_content(message, known_calls(template))
        text = render_chat(template, [*QUESTION, plain], bos_token="", eos_token="", tools=TOOLS)
        assert "find_place" in text and plain["content"] in text
        assert CallGrammar(known_calls(template), TOOLS, special={}, stops=()).write(parallel=True)
        assert json.dumps(TOOLS[0]["function"]["name"]) in text
