"""Thoughts, tool calls and text of an answer, in the formats of the three chat APIs."""

from __future__ import annotations

import dataclasses
import json

import pytest
from http_server import TOKENIZER, Server, check_error
from jaxpaged_model.text.tools_as_text import TEMPLATE

THINKING = TEMPLATE.replace(
    "{{ message.content or '' }}",
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content or '' }}",
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "The weather", "parameters": PARAMETERS}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SAID = f"<think>\nThey ask.\n</think>\n\nLet me see.\n{CALL}\n{CALL.replace('Rome', 'Oslo')}"
CHAT = {
    "messages": [{"role": "user", "content": "Weather?"}],
    "tools": [{"type": "function", "function": FUNCTION}],
}
RESPONSES = {"input": "Weather?", "tools": [{"type": "function", **FUNCTION}]}
MESSAGES = {
    "messages": [{"role": "user", "content": "Weather?"}],
    "max_tokens": 500,
    "tools": [{"name": "get_weather", "input_schema": PARAMETERS}],
}


@pytest.fixture
def server() -> Server:
    server = Server()
    server.hosted.model = dataclasses.replace(server.hosted.model, chat_template=THINKING)
    say(server, SAID)
    return server


def say(server: Server, text: str) -> None:
    server.runner.says = TOKENIZER.encode(text, add_special=False)


def named(server: Server, path: str, body: dict) -> list[dict]:
    """The events of a stream whose names are their types."""
    text = server.post(path, body | {"stream": True}).text
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_a_chat_with_thoughts_and_calls(server):
    (choice,) = server.post("/v1/chat/completions", CHAT).json()["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["reasoning_content"], message["content"]) == ("They ask.", "Let me see.")
    first, second = message["tool_calls"]
    assert (
        first["type"] == "function"
        and first["id"] != second["id"]
        and first["function"]["name"] == "get_weather"
    )
    assert [json.loads(call["function"]["arguments"])["city"] for call in (first, second)] == ["Rome", "Oslo"]


@pytest.mark.parametrize("burst", [1, 7, 500])
def test_a_streamed_chat_has_the_same_parts(server, burst):
    server.runner.burst = burst
    whole = server.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]
    *events, last, done = server.stream("/v1/chat/completions", CHAT)
    assert done == "[DONE]" and last["choices"][0]["finish_reason"] == "tool_calls"
    deltas = [event["choices"][0]["delta"] for event in events]
    for key in ("reasoning_content", "content"):
        assert "".join(delta.get(key) or "" for delta in deltas) == whole[key]
    calls: dict[int, dict] = {}
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["type"] == "function" and call["index"] not in calls
                calls[call["index"]] = call["function"] | {"arguments": ""}
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
    assert [calls[i] for i in sorted(calls)] == [call["function"] for call in whole["tool_calls"]]


def test_thoughts_stay_in_the_content_if_asked(server):
    message = server.post("/v1/chat/completions", CHAT | {"reasoning_format": "none"}).json()["choices"][0][
        "message"
    ]
    assert "reasoning_content" not in message and "They ask.\n</think>" in message["content"]


def test_without_tools_a_call_is_text(server):
    say(server, CALL)
    (choice,) = server.post("/v1/chat/completions", {"messages": CHAT["messages"]}).json()["choices"]
    assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"


def test_what_is_said_can_be_sent_back(server):
    message = server.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in message["tool_calls"]
    ]
    body = CHAT | {"messages": [*CHAT["messages"], message, *results]}
    prompt = server.post("/apply-template", body).json()["prompt"]
    assert SAID in prompt and prompt.count("sunny") == 2


def test_a_template_without_tools_is_told_of_them_as_text():
    server = Server()  # chatml knows no tools
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}],
    }
    history = [*CHAT["messages"], message, {"role": "tool", "tool_call_id": "x", "content": "sunny"}]
    prompt = server.post("/apply-template", CHAT | {"messages": history}).json()["prompt"]
    assert prompt.startswith("<|im_start|>system\n") and '"get_weather"' in prompt
    assert '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' in prompt
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>" in prompt
    say(server, CALL)
    (choice,) = server.post("/v1/chat/completions", CHAT).json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


def test_a_response_and_its_events(server):
    whole = server.post("/v1/responses", RESPONSES).json()
    assert (whole["object"], whole["status"], whole["store"]) == ("response", "completed", False)
    assert [item["type"] for item in whole["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    thoughts, message, first, second = whole["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "They ask."}]
    assert message["content"][0]["text"] == "Let me see." and message["role"] == "assistant"
    assert json.loads(first["arguments"]) == {"city": "Rome"} and first["call_id"] != second["call_id"]
    assert 0 < whole["usage"]["output_tokens_details"]["reasoning_tokens"] < whole["usage"]["output_tokens"]

    events = named(server, "/v1/responses", RESPONSES)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    runs = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    call = [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
    ]  # fmt: skip
    assert runs == [
        "created", "in_progress",
        "output_item.added", "reasoning_text.delta", "reasoning_text.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        *call, *call, "completed",
    ]  # fmt: skip
    final = events[-1]["response"]
    assert [without_ids(item) for item in final["output"]] == [without_ids(item) for item in whole["output"]]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]


def without_ids(item: dict) -> dict:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


def test_a_response_that_is_cut_is_incomplete(server):
    whole = server.post("/v1/responses", RESPONSES | {"max_output_tokens": 3}).json()
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (
        named(server, "/v1/responses", RESPONSES | {"max_output_tokens": 3})[-1]["type"]
        == "response.incomplete"
    )


def test_a_message_and_its_events(server):
    server.runner.cached = 5
    whole = server.post("/v1/messages", MESSAGES).json()
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "tool_use")
    thoughts, text, first, second = whole["content"]
    assert thoughts == {"type": "thinking", "thinking": "They ask.", "signature": ""}
    assert text == {"type": "text", "text": "Let me see."}
    assert (first["input"], second["input"]) == ({"city": "Rome"}, {"city": "Oslo"})
    usage = whole["usage"]
    count = server.post("/v1/messages/count_tokens", MESSAGES).json()["input_tokens"]
    assert (
        usage["input_tokens"] + usage["cache_read_input_tokens"] == count
        and usage["cache_read_input_tokens"] == 5
    )

    events = named(server, "/v1/messages", MESSAGES)
    assert (
        events[0]["type"] == "message_start" and events[0]["message"]["usage"]["cache_read_input_tokens"] == 5
    )
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    blocks: list[dict] = []
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"] | {"input_text": ""})
            case "content_block_delta":
                (key,) = event["delta"].keys() - {"type"}
                to = "input_text" if key == "partial_json" else key
                blocks[event["index"]][to] += event["delta"][key]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    assert blocks[0]["thinking"] == "They ask." and blocks[1]["text"] == "Let me see."
    assert json.loads(blocks[3]["input_text"]) == {"city": "Oslo"}


def test_why_a_message_ended(server):
    say(server, "one two three")
    body = {key: MESSAGES[key] for key in ("messages", "max_tokens")}
    ends = [({}, "end_turn", None), ({"max_tokens": 1}, "max_tokens", None)]
    for extra, reason, stop in [*ends, ({"stop_sequences": ["two"]}, "stop_sequence", "two")]:
        whole = server.post("/v1/messages", body | extra).json()
        assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stop)


def test_errors_are_in_the_dialect_of_the_path(server):
    answer = server.post("/v1/messages", {"messages": []})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == "invalid_request_error"
    check_error(server.post("/v1/responses", {"input": "x", "previous_response_id": "r"}), 400)
    server.runner.full = 0
    answer = server.post("/v1/messages", MESSAGES)
    assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error"


def test_an_error_within_a_stream_is_in_its_dialect(server):
    server.runner.nan = True
    events = named(server, "/v1/messages", MESSAGES)
    assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "api_error"
    assert named(server, "/v1/responses", RESPONSES)[-1]["type"] == "response.failed"


def test_effort_none_and_a_budget_of_none_switch_thoughts_off(server):
    template = (
        "{{ 'no' if enable_thinking is false else 'yes' }} {{ reasoning_effort }} {{ messages[0].content }}"
    )
    server.hosted.model = dataclasses.replace(server.hosted.model, chat_template=template)

    def begin(**extra):
        return server.post("/apply-template", {"messages": CHAT["messages"], **extra}).json()["prompt"]

    assert begin() == "yes  Weather?"
    assert begin(reasoning_effort="none") == "no  Weather?"
    assert begin(reasoning_effort="high") == "yes high Weather?"
    assert begin(chat_template_kwargs={"enable_thinking": False, "reasoning_effort": "x"}) == "no x Weather?"
    server.state.options = dataclasses.replace(server.state.options, reasoning_budget=0)
    assert begin() == "no  Weather?"


def test_a_template_without_instructions_has_them_in_the_users_words(server):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    server.hosted.model = dataclasses.replace(server.hosted.model, chat_template=template)

    def prompt(*given):
        messages = [{"role": role, "content": content} for role, content in given]
        return server.post("/apply-template", {"messages": messages}).json()["prompt"]

    assert prompt(("system", "a"), ("user", "b")) == "<user>a\n\nb"
    late = ("user", "a"), ("assistant", "b"), ("user", "c"), ("system", "d")
    assert prompt(*late) == "<user>a<assistant>b<user>c\n\nd"
