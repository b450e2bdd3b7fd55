"""Formats of answers, derived from chat templates: what a template renders is parsed back to itself."""

from __future__ import annotations

import json

import pytest
from chat_format_kit import ARGUMENTS, TOOLS, call, derive, parse, render_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxpaged_model.text.chat import BUILTIN_TEMPLATES, ChatTemplateError
from jaxpaged_model.text.chat_format import ChatFormat
from template_sources import read_templates

HERMES = (
    "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = HERMES.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
LLAMA = (
    "{{ tools | tojson if tools }}{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}"
    "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ ', ' if not loop.first }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% endfor %}]{% endif %}</s>{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content }}"
    "{% if m.tool_calls %}<|calls_begin|>{% for c in m.tool_calls %}{{ '\n' if not loop.first }}"
    "<|call_begin|>function<|sep|>{{ c.function.name }}\n```json\n{{ c.function.arguments + '' }}\n```<|call_end|>"
    "{% endfor %}<|calls_end|>{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
TAGS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '\n' }}<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PYTHON = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}<|call|>["
    "{% for c in m.tool_calls %}{{ ', ' if not loop.first }}{{ c.function.name }}("
    "{% for k, v in c.function.arguments.items() %}{{ ', ' if not loop.first }}{{ k }}={{ v | tojson }}{% endfor %})"
    "{% endfor %}]<|/call|>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|><|start|>assistant"
    "{% endif %}{% if m.tool_calls %}<|channel|>commentary to=functions.{{ m.tool_calls[0].function.name }} "
    "<|constrain|>json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}"
    "{% else %}<|channel|>final<|message|>{{ m.content }}{% endif %}{% else %}<|message|>{{ m.content }}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OWN = {
    "hermes": HERMES, "thinks": THINKS, "llama": LLAMA, "mistral": MISTRAL, "deepseek": DEEPSEEK, "tags": TAGS,
    "python": PYTHON, "harmony": HARMONY,
}  # fmt: skip
STEPS = (10**6, 1, 7)


def answers(template: str) -> dict[str, dict]:
    """Messages that a template can render."""
    chat_format = derive(template)
    found = {
        "a call": {"content": "", "tool_calls": [call(0)]},
        "another call": {"content": "", "tool_calls": [call(1)]},
        "text": {"content": 'Just text, {"a": 1} <b>.'},
        "text and a call": {"content": "Let me see.", "tool_calls": [call(1)]},
    }
    if chat_format.calls is not None and chat_format.calls.parallel:
        found["two calls"] = {"content": "", "tool_calls": [call(0), call(1)]}
    if chat_format.reasoning is not None or chat_format.is_harmony:
        found["thoughts and a call"] = {
            "content": "",
            "reasoning_content": "They ask.",
            "tool_calls": [call(1)],
        }
    return {name: {"role": "assistant", **message} for name, message in found.items()}


def check(template: str, message: dict) -> bool:
    """Parses a rendered message, whole and in pieces; False if the template does not render all of it."""
    prompt, text = render_answer(template, message)
    wanted = [
        (one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", [])
    ]
    content, thoughts = message["content"], message.get("reasoning_content", "")
    if content not in text or thoughts not in text or text.count("city") < len(wanted):
        return False
    if content and wanted and text.index(content) > text.index(wanted[0][0]):
        return False  # the template writes the text behind the call
    for step in STEPS:
        parsed = parse(derive(template), prompt, text, step)
        assert parsed[2] == wanted, (step, text)
        assert thoughts in parsed[0] and (content in parsed[1] if content else not parsed[1].strip()), parsed
    return True


@pytest.mark.parametrize("name", OWN)
def test_what_a_template_renders_is_parsed_back(name):
    for message in answers(OWN[name]).values():
        if name != "harmony" or not (message["content"] and message.get("tool_calls")):
            assert check(OWN[name], message) or message.get("reasoning_content") or message["content"]


def test_formats_are_derived():
    hermes, llama, mistral = derive(HERMES), derive(LLAMA).calls, derive(MISTRAL).calls
    assert hermes.reasoning == ("<think>\n", "\n</think>\n\n") and hermes.thinking_ends == ()
    assert derive(THINKS).thinking_ends == ("<think>\n",) and derive(THINKS).thinks("x<think>\n")
    assert hermes.calls.style == "json" and hermes.calls.parallel and hermes.trigger == "<tool_call>"
    assert llama.arguments_path == ("parameters",) and not llama.parallel and derive(LLAMA).trigger is None
    assert mistral.style == "list" and mistral.id_path == ("id",)
    assert derive(DEEPSEEK).calls.arguments_as_text and derive(DEEPSEEK).calls.style == "named"
    assert (derive(TAGS).calls.style, derive(PYTHON).calls.style) == ("tags", "tags")
    assert {"<tool_call>", "</tool_call>", "<think>", "</think>"} <= set(hermes.special_markers)


@pytest.mark.parametrize("template", [*BUILTIN_TEMPLATES.values(), "{{ broken", "{{ 1 / 0 }}", "", "fixed"])
def test_a_template_without_tools_has_no_format(template):
    chat_format = ChatFormat.derive(template)
    assert chat_format.calls is None
    parser = chat_format.parser(tools=TOOLS, prompt="")
    assert (
        parser.push("{").content + parser.push('"name": 1}\n').content + parser.finish().content
        == '{"name": 1}\n'
    )


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "thoughts", "content", "calls"),
    [
        ("Hello", "", "Hello", []),
        ("  Hello\n\n", "", "  Hello\n\n", []),
        ("<think>a</think>b", "a", "b", []),
        ("<think>a", "a", "", []),
        ("<think>\n\n</think>\n\nb", "", "b", []),
        ("a <think> b", "", "a <think> b", []),
        ("<thin", "", "<thin", []),
        (f"a\n\n{CALL}\n", "", "a", ["Rome"]),
        (f"{CALL}{CALL}", "", "", ["Rome", "Rome"]),
        (f"{CALL}\n and more", "", "and more", ["Rome"]),
        (CALL.replace("\n", ""), "", "", ["Rome"]),
        (CALL.replace("\n", "\n\n "), "", "", ["Rome"]),
        (CALL.removesuffix("\n</tool_call>"), "", "", ["Rome"]),
        (CALL.replace('{"name', '[{"name').replace("}}", "}}]"), "", "", ["Rome"]),
        (
            '<tool_call>\n{"arguments": {"city": "Rome"}, "name": "get_weather"}\n</tool_call>',
            "",
            "",
            ["Rome"],
        ),
        ('<tool_call>\n{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}', "", "", ["Rome"]),
        ("<tool_call>\nno JSON\n</tool_call>", "", "<tool_call>\nno JSON\n</tool_call>", []),
        ('<tool_call>\n{"other": 1}\n</tool_call>', "", '<tool_call>\n{"other": 1}\n</tool_call>', []),
        ("use <tool_call", "", "use <tool_call", []),
    ],
)
def test_answers_of_all_kinds(text, thoughts, content, calls):
    for step in STEPS:
        parsed = parse(derive(HERMES), "", text, step)
        assert parsed == (thoughts, content, [("get_weather", {"city": city}) for city in calls]), step


def test_an_object_is_a_call_only_if_it_names_a_tool():
    chat_format = derive(LLAMA)
    for text in ('{"name": "other", "parameters": {}}', '{"a": 1} and', "{"):
        for step in STEPS:
            assert parse(chat_format, "", text, step) == ("", text, [])
    text = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
    assert parse(chat_format, "", text, 3) == ("", "", [("get_weather", {"city": "Rome"})])


def test_arguments_stream_as_they_arrive():
    parser = derive(HERMES).parser(tools=TOOLS, prompt="")
    begun = parser.push('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ro').tool_calls
    assert (begun[0].name, begun[0].arguments, begun[1].arguments) == ("get_weather", "", '{"city": "Ro')
    (more,) = parser.push("me").tool_calls
    assert (more.id, more.name, more.arguments) == (None, None, "me")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(set(OWN) - {"llama"})),
    st.lists(
        st.sampled_from(["<think>", "</think>", "<tool_call>", "\n", "x", "{", "}", '"', CALL, " ", "<"])
    ),
    st.integers(1, 9),
)
def test_pieces_change_nothing(name, parts, step):
    chat_format, text = derive(OWN[name]), "".join(parts)

    def parsed(step):
        parser = chat_format.parser(tools=TOOLS, prompt="")
        deltas = [parser.push(text[i : i + step]) for i in range(0, len(text), step)] + [parser.finish()]
        calls = [(new.index, new.name, new.arguments) for delta in deltas for new in delta.tool_calls]
        arguments = ["".join(a for i, _, a in calls if i == k) for k in {i for i, _, _ in calls}]
        return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas), arguments

    assert parsed(step) == parsed(10**6)


KNOWN_GAPS = {
    (
        "Apriel-1.6-15b-Thinker-fixed",
        "thoughts and a call",
    ): "the prompt begins thoughts with words of its own",
    ("Kimi-K3", "two calls"): "calls are numbered in a place where no other template has a number",
    ("MiniMax-M3", None): "arguments that are objects are nested tags",
    ("NVIDIA-Nemotron-Nano-v2", "text"): "the template opens thoughts before an answer that has none",
    ("NVIDIA-Nemotron-Nano-v2", "text and a call"): "the same",
    ("muse-glimmer", None): "the recipient of a message stands before its marker",
    ("openai-gpt-oss-120b", "text and a call"): "the template writes the text as thoughts",
}


@pytest.mark.slow
def test_calls_that_published_templates_render_are_parsed_back():
    templates = read_templates()
    if not templates:
        pytest.skip("the templates cannot be downloaded")
    exact, failures, without = 0, {}, []
    for name, template in templates.items():
        chat_format = derive(template)
        if chat_format.calls is None and not chat_format.is_harmony:
            without.append(name)
            continue
        for kind, message in answers(template).items():
            if (name, kind) in KNOWN_GAPS or (name, None) in KNOWN_GAPS:
                continue
            try:
                exact += check(template, message)
            except ChatTemplateError:
                pass  # the template refuses such a message
            except (AssertionError, json.JSONDecodeError) as error:
                failures[name, kind] = str(error)[:300]
    print(f"{exact} answers of {len(templates) - len(without)} templates exact; without tools: {without}")
    assert not failures
    assert exact > 200 and len(without) < 15


def test_arguments_of_the_kit_are_of_all_kinds():
    assert {type(value).__name__ for value in ARGUMENTS[0].values()} == {"str", "int", "bool", "dict", "list"}
