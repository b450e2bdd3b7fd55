"""OpenAI's API: shapes, usage, streams, and what is refused."""

from __future__ import annotations

import pytest
from http_server import TOKENIZER, Server, check_error

PROMPT = "def main(path):\n    return path"
IDS = TOKENIZER.encode(PROMPT)
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def test_a_completion_and_its_usage(server):
    server.runner.cached = 2
    body = server.post("/v1/completions", {"prompt": PROMPT}).json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["model"] == "tiny" and body["system_fingerprint"].startswith("b")
    (choice,) = body["choices"]
    assert choice == {"index": 0, "text": PROMPT, "logprobs": None, "finish_reason": "stop"}
    assert body["usage"] == {
        "prompt_tokens": len(IDS),
        "completion_tokens": len(IDS),
        "total_tokens": 2 * len(IDS),
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_prompts_of_every_shape_in_prompt_major_order(server):
    for prompt in ([PROMPT, "x = 1"], [IDS, TOKENIZER.encode("x = 1")]):
        body = server.post("/v1/completions", {"prompt": prompt, "n": 2}).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in body["choices"]] == [PROMPT, PROMPT, "x = 1", "x = 1"]
        assert body["usage"]["prompt_tokens"] == len(IDS) + len(TOKENIZER.encode("x = 1"))
    assert server.post("/v1/completions", {"prompt": IDS}).json()["choices"][0]["text"] == PROMPT


def test_echo_repeats_the_prompt(server):
    body = {"prompt": PROMPT, "echo": True, "max_tokens": 0}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == PROMPT
    events = server.stream("/v1/completions", body | {"prompt": IDS, "max_tokens": 2})
    text = "".join(event["choices"][0]["text"] for event in events[:-1])
    assert text == PROMPT + TOKENIZER.decode(IDS[:2])


@pytest.mark.parametrize("stop", ["return", ["never", "return", "ret"]])
def test_a_stop_string_ends_the_text_before_it_and_the_sample_at_once(server, stop):
    body = server.post("/v1/completions", {"prompt": PROMPT, "stop": stop}).json()
    assert body["choices"][0]["text"] == PROMPT[: PROMPT.index("ret")]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert server.runner.aborted[0][1] == 0
    events = server.stream("/v1/completions", {"prompt": PROMPT, "stop": stop})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == PROMPT[: PROMPT.index("ret")]
    assert not server.runner.streams and not server.state.generations


@pytest.mark.parametrize("burst", [1, 3, 64])
def test_tokens_that_come_together_with_a_stop_string_do_not_count_behind_it(server, burst):
    server.runner.burst = burst
    body = {"prompt": PROMPT, "stop": "return", "logprobs": 0, "stream_options": {"include_usage": True}}
    up_to_stop = len(TOKENIZER.encode(PROMPT[: PROMPT.index("return") + 6]))
    *_, last, _ = server.stream("/v1/completions", body)
    for answer in (last, server.post("/v1/completions", {"prompt": PROMPT, "stop": "return"}).json()):
        assert (
            answer["usage"]["completion_tokens"] == answer["timings"]["predicted_n"] == up_to_stop < len(IDS)
        )
    chunks = server.stream("/completion", {"prompt": PROMPT, "stop": ["return"]})
    assert [chunk["tokens_predicted"] for chunk in chunks][-1] == up_to_stop
    assert [token for chunk in chunks for token in chunk["tokens"]] == IDS[:up_to_stop]
    assert server.state.metrics.predicted_tokens == 3 * (up_to_stop - 1)


def test_a_stop_string_may_be_the_text_of_a_special_token(server):
    end = TOKENIZER.token_bytes(TOKENIZER.eos_id).decode()
    body = {"prompt": PROMPT, "stop": [end], "ignore_eos": True}
    answer = server.post("/completion", body).json()
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == (PROMPT, "word", end)
    assert server.post("/v1/completions", body).json()["choices"][0]["finish_reason"] == "stop"
    assert all(request.stop_ids == {TOKENIZER.eos_id} for request in server.runner.requests)
    assert not any(request.logit_bias for request in server.runner.requests)


def test_nan_ends_its_own_request_with_500(server):
    server.runner.nan = True
    assert "NaN" in check_error(server.post("/v1/completions", {"prompt": PROMPT}), 500)["message"]
    *_, error, done = server.stream("/v1/chat/completions", CHAT)
    assert (error["error"]["code"], done) == (500, "[DONE]")
    server.runner.nan = False
    assert server.post("/v1/completions", {"prompt": PROMPT}).json()["choices"][0]["text"] == PROMPT


def test_a_stream_has_one_id_and_ends_once(server):
    body = {"prompt": PROMPT, "max_tokens": 3, "n": 2, "stream_options": {"include_usage": True}}
    *chunks, usage, done = server.stream("/v1/completions", body)
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, usage]}) == 1
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]


def test_a_chat_and_its_stream(server):
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    body = server.post("/v1/chat/completions", CHAT).json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    first, *rest, last, done = server.stream("/chat/completions", CHAT)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in rest) == text
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [first, *rest])
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert done == "[DONE]"


def test_parts_of_text_and_an_answer_that_is_begun(server):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Good"}]
    body = server.post("/v1/chat/completions", {"messages": messages}).json()
    assert body["choices"][0]["message"]["content"].endswith(
        "user\nHel\nlo<|im_end|>\n<|im_start|>assistant\nGood"
    )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
def test_what_llama_servers_clients_always_send(server, path):
    body = CHAT if "chat" in path else {"prompt": PROMPT}
    off = {
        "dynatemp_range": 0, "dynatemp_exponent": 1, "typical_p": 1, "xtc_probability": 0, "xtc_threshold": 0.1,
        "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1, "mirostat": 0,
        "return_progress": True, "timings_per_token": True, "min_keep": 0, "grammar": "", "adaptive_target": -1,
    }  # fmt: skip
    assert server.post(path, body | off).status_code == 200
    for name, value in {
        "xtc_probability": 1.5,
        "dry_multiplier": "much",
        "mirostat": 3,
        "lora": [{"id": 0}],
    }.items():
        assert name in check_error(server.post(path, body | {name: value}), 400)["message"]


def test_tokens_of_a_conversation_are_counted(server):
    answer = server.post("/v1/chat/completions", CHAT | {"max_tokens": 1}).json()
    for path in ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"):
        assert server.post(path, CHAT).json()["input_tokens"] == answer["usage"]["prompt_tokens"]
    check_error(server.post("/v1/chat/completions/input_tokens", {"messages": []}), 400)


def test_the_prompt_is_shown_to_whoever_asks(server):
    answer = server.post("/v1/chat/completions", CHAT | {"verbose": True, "max_tokens": 3}).json()
    assert answer["__verbose"]["prompt"] == server.post("/apply-template", CHAT).json()["prompt"]
    assert answer["__verbose"]["generation_settings"]["n_predict"] == 3
    assert "__verbose" not in server.post("/v1/chat/completions", CHAT | {"verbose": False}).json()


def test_logprobs_add_up_to_the_text(server):
    body = server.post("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 3}).json()
    entries = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == body["choices"][0]["message"]["content"]
    assert (
        bytes(b for entry in entries for b in entry["bytes"]).decode()
        == body["choices"][0]["message"]["content"]
    )
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    body = server.post("/v1/completions", {"prompt": PROMPT, "logprobs": 2}).json()
    logprobs = body["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == PROMPT
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]


@pytest.mark.parametrize("burst", [1, 64])
def test_parts_of_characters_have_names_of_their_own_and_offsets_in_the_text(server, burst):
    server.runner.burst = burst
    text = "a🙂<|endoftext|>é🙂b"
    ids = TOKENIZER.encode(text, parse_special=True)
    ask = {"prompt": ids, "logprobs": 20, "ignore_eos": True}
    logprobs = server.post("/v1/completions", ask).json()["choices"][0]["logprobs"]
    chunks = [chunk["choices"][0]["logprobs"] for chunk in server.stream("/v1/completions", ask)[:-1]]
    chunks = [chunk for chunk in chunks if chunk]
    assert logprobs == {name: [x for chunk in chunks for x in chunk[name]] for name in logprobs}
    spelled = b"".join(
        bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
        if name.startswith("bytes:")
        else name.encode()
        for name in logprobs["tokens"]
    )
    assert spelled.decode() == text
    assert [len(top) for top in logprobs["top_logprobs"]] == [20 + (token >= 20) for token in ids]
    shown = text.replace("<|endoftext|>", "")
    for i, offset in enumerate(logprobs["text_offset"]):
        assert shown.startswith(TOKENIZER.decode(ids[:i]).rstrip("\ufffd"))
        assert offset == len(TOKENIZER.decode(ids[:i]).rstrip("\ufffd"))


def test_parameters_reach_the_engine(server):
    sent = {
        "prompt": PROMPT, "temperature": 0.5, "top_p": 0.0, "top_k": 3, "min_p": 0.1, "seed": 2**40 + 5,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.25, "logit_bias": {"5": -100},
        "stop_token_ids": [7], "ignore_eos": True, "cache_salt": "mine", "priority": -3, "max_tokens": 4, "n": 2,
    }  # fmt: skip
    assert server.post("/v1/completions", sent).status_code == 200
    (request,) = server.runner.requests
    assert request.temperature == 0.5 and 0 < request.top_p < 1e-20 and request.top_k == 3
    assert request.min_p == 0.1 and request.seed == 5 and request.repeat_penalty == 1.25
    assert request.presence_penalty == 1.0 and request.frequency_penalty == -1.0
    ends = dict.fromkeys(TOKENIZER.stop_ids, float("-inf"))  # ignored, so they must not be sampled
    assert request.logit_bias == {5: -100.0} | ends and request.stop_ids == {7}
    assert request.cache_salt == "mine" and request.priority == -3
    assert request.max_new_tokens == 4 and request.n == 2


def test_the_server_gives_what_a_request_leaves_out(server):
    server = server.with_options(temp=0.0, seed=11, predict=3, prefix_cache=False)
    server.post("/v1/chat/completions", CHAT)
    (request,) = server.runner.requests
    assert request.temperature == 0.0 and request.seed == 11 and request.max_new_tokens == 3
    assert not request.cache_prompt


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"user": "me", "store": False},
        {"metadata": {"a": "b"}},
        {"stream": None, "n": None, "stop": None, "temperature": None},
        {"modalities": ["text"]},
        {"service_tier": "auto"},
        {"parallel_tool_calls": True},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"max_tokens": -1},
        {"max_completion_tokens": -1},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"model": "gpt-4o"},
        {"model": None},
    ],
)
def test_what_clients_send_along_is_accepted(server, extra):
    assert server.post("/v1/chat/completions", CHAT | extra).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
def test_minus_one_is_no_limit(server, path):
    server.post(path, {"prompt": PROMPT, "max_tokens": -1})
    assert server.runner.requests[0].max_new_tokens is None


def test_an_answer_can_be_sent_back(server):
    ours = server.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]
    extras = {"name": "a", "annotations": [{"type": "url_citation"}], "audio": None, "tool_calls": None}
    answers = [
        (ours, ours["content"]),
        (ours | extras | {"function_call": None, "reasoning_content": "Hm."}, ours["content"]),
        ({"role": "assistant", "content": None, "refusal": "No."}, "No."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
    ]
    for answer, text in answers:
        messages = [*CHAT["messages"], answer, {"role": "user", "content": "And?"}]
        prompt = server.post("/apply-template", {"messages": messages}).json()["prompt"]
        assert f"<|im_start|>assistant\n{text}<|im_end|>" in prompt
        assert server.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    for wrong in ({"role": "user", "content": None}, {"role": "assistant"}, ours | {"tool_calls": [{}]}):
        check_error(server.post("/v1/chat/completions", {"messages": [wrong, *CHAT["messages"]]}), 400)


def test_two_bos_are_warned_of(server, capsys):
    for prompt, lines in (([0, 5], 0), ([5, 0, 0], 0), ([0, 0, 5], 1)):
        assert server.post("/v1/completions", {"prompt": prompt}).status_code == 200
        assert capsys.readouterr().err.count("two BOS") == lines


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function", "function": {"description": "f"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "type"),
        ({"json_schema": {}, "grammar": 'root ::= "x"'}, "exclude"),
        ({"structured_outputs": {"regex": "["}}, "regex"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"grammar": "root ::= x"}, "'x' not found"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 513}, "stop"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"chat_template_kwargs": {"messages": True}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": [{}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
        ),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"seed": 2**65}, "seed"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(server, extra, param):
    error = check_error(server.post("/v1/chat/completions", CHAT | extra), 400)
    assert param in error["message"] or param in (error["param"] or "")
    assert not server.runner.requests and not server.state.generations


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ""},
        {"prompt": [4096]},
        {"prompt": [-1]},
        {"prompt": [1, "a"]},
        {"prompt": [True]},
        {"prompt": {"a": 1}},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "best_of": 2},
        {"prompt": "a", "echo": True, "logprobs": 1},
        {"prompt": ["a"] * 129},
        {"prompt": ["a"] * 65, "n": 2},
    ],
)
def test_prompts_that_are_none_are_refused(server, body):
    check_error(server.post("/v1/completions", body), 400)


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
@pytest.mark.parametrize("prompt", [[], [[]], [[1], []]])
def test_an_empty_list_is_named(server, path, prompt):
    assert "at least one" in check_error(server.post(path, {"prompt": prompt}), 400)["message"]


def test_a_prompt_that_is_too_long_says_how_long(server):
    error = check_error(server.post("/v1/completions", {"prompt": [1] * 512}), 400)
    assert error["type"] == "exceed_context_size_error"
    assert error["n_prompt_tokens"] == 512 and error["n_ctx"] == 512


def test_a_list_of_prompts_is_taken_whole_or_not_at_all(server):
    check_error(server.post("/v1/completions", {"prompt": [[1], [1] * 512, [2]]}), 400)
    assert not server.runner.streams and not server.state.generations


def test_overload_says_come_back_later(server):
    server.runner.full = 0
    assert check_error(server.post("/v1/completions", {"prompt": "a"}), 429)["type"] == "rate_limit_error"
    response = server.post("/v1/completions", {"prompt": "a", "stream": True})
    check_error(response, 429)


def test_a_dead_engine_is_told_before_and_in_the_middle_of_a_stream():
    server = Server()
    server.runner.failed = True
    check_error(server.post("/v1/completions", {"prompt": "a"}), 503)
    check_error(server.get("/health"), 503)
    server = Server()
    real = server.runner.submit

    async def submit(request):
        server.runner.failed = True
        return await real(request)

    server.runner.submit = submit
    events = server.stream("/v1/chat/completions", CHAT)
    assert events[-2]["error"]["code"] == 503 and events[-1] == "[DONE]"
    assert not server.state.generations


def test_models(server):
    body = server.get("/v1/models").json()
    assert [model["id"] for model in body["data"]] == ["tiny"] and body["object"] == "list"
    assert server.get("/models").json() == body
    assert server.get("/v1/models/tiny").json() == body["data"][0]
    check_error(server.get("/v1/models/other/name"), 404)
