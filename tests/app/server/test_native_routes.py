"""llama-server's API: what its clients and its own tests rely on."""

from __future__ import annotations

import pytest
from http_server import TOKENIZER, check_error

from jaxpaged import __version__
from jaxpaged.app.server.native_schema import NativeRequest

PROMPT = "def main(path):\n    return path"
IDS = TOKENIZER.encode(PROMPT)


def test_a_completion_has_all_fields(server):
    server.runner.cached = 2
    body = server.post(
        "/completion", {"prompt": PROMPT, "n_predict": 4, "return_tokens": True, "seed": 9}
    ).json()
    assert body["content"] == TOKENIZER.decode(IDS[:4]) and body["tokens"] == IDS[:4]
    assert body["stop"] is True and body["stop_type"] == "limit" and body["stopping_word"] == ""
    assert (
        body["tokens_predicted"] == 4 and body["tokens_evaluated"] == len(IDS) and body["tokens_cached"] == 2
    )
    assert body["truncated"] is False and body["model"] == "tiny"
    assert body["has_new_line"] is ("\n" in body["content"])
    assert body["prompt"] == PROMPT and body["index"] == 0
    assert body["generation_settings"]["n_predict"] == 4 and body["generation_settings"]["seed"] == 9
    timings = body["timings"]
    assert timings["cache_n"] == 2 and timings["prompt_n"] == len(IDS) - 2 and timings["predicted_n"] == 4
    assert timings["prompt_ms"] == pytest.approx(1, abs=0.1)
    assert {
        f"{name}_{what}" for name in ("prompt", "predicted") for what in ("per_second", "per_token_ms")
    } <= set(timings)
    assert server.post("/completions", {"prompt": PROMPT, "n_predict": 4}).json()["tokens"] == []


def test_how_it_ended(server):
    def end(**body):
        answer = server.post("/completion", {"prompt": PROMPT} | body).json()
        return answer["stop_type"], answer["stopping_word"], answer["content"]

    assert end() == ("eos", "", PROMPT)
    assert end(stop=["path", ""]) == ("word", "path", "def main(")
    assert end(n_predict=0) == ("limit", "", "")
    assert end(n_predict=-1, max_tokens=2)[0] == "eos"


def test_a_stream_equals_the_whole(server):
    whole = server.post("/completion", {"prompt": PROMPT, "stop": ["return"]}).json()
    *chunks, last = server.stream("/completion", {"prompt": PROMPT, "stop": ["return"]})
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert all(chunk["stop"] is False and chunk["tokens"] for chunk in chunks)
    assert last["stop"] is True and last["content"] == "" and last["stopping_word"] == "return"
    assert last["generation_settings"]["stream"] is True


def test_prompts_of_every_shape(server):
    def contents(prompt):
        body = server.post("/completion", {"prompt": prompt}).json()
        return [one["content"] for one in body] if isinstance(body, list) else body["content"]

    assert contents(IDS) == PROMPT
    assert contents([IDS[0], PROMPT, IDS[0]]) == TOKENIZER.decode([IDS[0], *IDS, IDS[0]])
    assert contents(["a", "b"]) == ["a", "b"]
    assert contents([IDS, "b", [IDS[0], "c"]]) == [PROMPT, "b", TOKENIZER.decode([IDS[0]]) + "c"]
    assert len(server.post("/completion", {"prompt": "a", "n_cmpl": 3}).json()) == 3
    assert (
        contents({"prompt_string": PROMPT})
        == contents({"prompt_string": PROMPT, "multimodal_data": []})
        == PROMPT
    )
    assert contents([IDS, {"prompt_string": "b"}]) == [PROMPT, "b"]
    image = {"prompt_string": "a <__media__>", "multimodal_data": ["iVBORw0KGgo="]}
    for prompt in (image, [IDS, image], {}, {"prompt_string": 5}, [5, {"prompt_string": "a"}]):
        check_error(server.post("/completion", {"prompt": prompt}), 400)


def test_probabilities(server):
    body = server.post("/completion", {"prompt": PROMPT, "n_probs": 3, "n_predict": 5}).json()
    assert len(body["completion_probabilities"]) == 5
    for entry in body["completion_probabilities"]:
        assert entry["logprob"] <= 0 and isinstance(entry["token"], str) and isinstance(entry["bytes"], list)
        assert [set(top) for top in entry["top_logprobs"]] == [{"id", "token", "bytes", "logprob"}] * 3
    for chunk in server.stream("/completion", {"prompt": PROMPT, "n_probs": 3, "n_predict": 5})[:-1]:
        assert len(chunk["completion_probabilities"]) == 1


@pytest.mark.parametrize("stop", [[], ["return"], ["path"]])
def test_each_token_has_its_chunk_where_probabilities_are_asked_for(server, stop):
    body = {"prompt": PROMPT, "stop": stop, "n_predict": 9}
    whole = server.post("/completion", body | {"return_tokens": True}).json()
    server.runner.burst = 4
    assert (
        server.post("/completion", body | {"n_probs": 1, "return_tokens": True}).json()["tokens"]
        == whole["tokens"]
    )
    *chunks, last = server.stream("/completion", body | {"n_probs": 1})
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [chunk["tokens"] for chunk in chunks if not stop] == [
        [token] for token in whole["tokens"] if not stop
    ]
    assert all(len(chunk["completion_probabilities"]) == len(chunk["tokens"]) for chunk in chunks)
    assert last["stop_type"] == whole["stop_type"]
    *chunks, _ = server.stream("/completion", body)
    assert len(chunks) < len(whole["tokens"]) and "".join(c["content"] for c in chunks) == whole["content"]


def test_biases_of_every_shape(server):
    def bias(given):
        assert server.post("/completion", {"prompt": "a", "logit_bias": given}).status_code == 200
        return dict(server.runner.requests[-1].logit_bias)

    word = TOKENIZER.encode("return", add_special=False)
    assert bias([[5, 1.5], [6, False]]) == {5: 1.5, 6: float("-inf")}
    assert bias([["return", -1]]) == dict.fromkeys(word, -1.0)
    assert bias({"5": 2, "return": False}) == {5: 2.0} | dict.fromkeys(word, float("-inf"))
    for wrong in ([[5]], [[5, "x"]], [[5, True]], [[-1, 1]], {"5": True}, [[99999, 1]]):
        check_error(server.post("/completion", {"prompt": "a", "logit_bias": wrong}), 400)


def test_ignored_ends_are_not_drawn(server):
    def biases(**body):
        return server.post("/completion", {"prompt": "a"} | body).json()["generation_settings"]["logit_bias"]

    ends = TOKENIZER.stop_ids
    assert biases(ignore_eos=True) == [{"token": token, "bias": None} for token in ends]
    assert server.runner.requests[-1].stop_ids == frozenset()
    assert biases(ignore_eos=False) == [] and server.runner.requests[-1].stop_ids == ends
    one = min(ends)
    assert {"token": one, "bias": None} not in biases(ignore_eos=True, stop_token_ids=[one])
    assert biases(logit_bias=[[5, 1.5], [6, False]]) == [
        {"token": 5, "bias": 1.5},
        {"token": 6, "bias": None},
    ]


def test_settings_name_what_is_off(server):
    chosen = server.post("/completion", {"prompt": "a"}).json()["generation_settings"]
    shown = server.get("/props").json()["default_generation_settings"]["params"]
    for params in (chosen, shown):
        assert params["mirostat"] == 0 and params["typical_p"] == 1 and params["adaptive_target"] == -1
    # and may be sent back as they are
    names = set(NativeRequest.model_fields) - {"max_tokens", "logit_bias"}
    again = {name: value for name, value in chosen.items() if name in names}
    assert server.post("/completion", {"prompt": "a"} | again).status_code == 200


SAMPLERS = {
    "typical_p": 0.7, "top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.2, "dynatemp_range": 0.25,
    "dynatemp_exponent": 2.0, "dry_multiplier": 0.75, "dry_base": 2.0, "dry_allowed_length": 3,
    "dry_penalty_last_n": 100, "mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_samplers_reach_the_engine(server, path):
    body = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    assert server.post(path, body | SAMPLERS | {"dry_sequence_breakers": ["\n", ""]}).status_code == 200
    (request,) = server.runner.requests
    assert {name: getattr(request, name) for name in SAMPLERS} == SAMPLERS
    lines = {token for token in range(TOKENIZER.vocab_size) if b"\n" in TOKENIZER.token_bytes(token)}
    assert request.dry_breakers == lines
    # llama-server's default in place of a base that means nothing; breakers are looked for where they matter
    server.post(path, body | {"dry_multiplier": 1, "dry_base": 0.5})
    server.post(path, body)
    first, second = server.runner.requests[1:]
    assert first.dry_base == 1.75 and first.dry_breakers > lines and not second.dry_breakers


def test_settings_show_the_samplers(server):
    breakers = {"dry_sequence_breakers": ["x"]}
    chosen = server.post("/completion", {"prompt": "a"} | SAMPLERS | breakers).json()["generation_settings"]
    assert {name: chosen[name] for name in SAMPLERS} == SAMPLERS and chosen["dry_sequence_breakers"] == ["x"]
    assert chosen["samplers"][1:4] == ["dry", "top_n_sigma", "top_k"]
    server = server.with_options(typical_p=0.5, mirostat_tau=3.0, dry_sequence_breakers=("y",))
    shown = server.get("/props").json()["default_generation_settings"]["params"]
    assert (
        shown["typical_p"] == 0.5 and shown["mirostat_tau"] == 3.0 and shown["dry_sequence_breakers"] == ["y"]
    )
    server.post("/completion", {"prompt": "a"})
    assert server.runner.requests[-1].typical_p == 0.5


@pytest.mark.parametrize("name", [*SAMPLERS, "dry_sequence_breakers"])
@pytest.mark.parametrize("wrong", ["much", -2e9, [1], True])
def test_values_that_no_sampler_has_are_refused(server, name, wrong):
    assert name in check_error(server.post("/completion", {"prompt": "a", name: wrong}), 400)["message"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("xtc_probability", 1.01),
        ("typical_p", -0.1),
        ("mirostat", 3),
        ("mirostat", 1.0),
        ("dry_allowed_length", -1),
    ],
)
def test_values_outside_a_samplers_range_are_refused(server, name, wrong):
    assert name in check_error(server.post("/completion", {"prompt": "a", name: wrong}), 400)["message"]


def test_the_rate_is_that_of_the_tokens_behind_the_first(server):
    timings = server.post("/completion", {"prompt": PROMPT, "n_predict": 1}).json()["timings"]
    assert timings["predicted_n"] == 1
    assert timings["predicted_per_second"] == timings["predicted_per_token_ms"] == 0
    timings = server.post("/completion", {"prompt": PROMPT, "n_predict": 4}).json()["timings"]
    if timings["predicted_ms"]:
        assert timings["predicted_per_second"] == pytest.approx(3e3 / timings["predicted_ms"])


def test_chosen_fields(server):
    body = {
        "prompt": PROMPT,
        "response_fields": ["content", "generation_settings/n_predict", "nothing"],
        "n_predict": 2,
    }
    assert set(server.post("/completion", body).json()) == {"content", "generation_settings/n_predict"}


def test_neutral_settings_are_accepted_and_others_are_not(server):
    neutral = {
        "mirostat": 0,
        "typical_p": 1.0,
        "dry_multiplier": 0.0,
        "grammar": "",
        "min_keep": 0,
        "id_slot": 1,
    }
    assert (
        server.post("/completion", {"prompt": "a"} | neutral | {"temperature": -1, "top_p": 0}).status_code
        == 200
    )
    for extra in (
        {"mirostat": 3},
        {"samplers": ["top_k"]},
        {"lora": [{"id": 0}]},
        {"what": 1},
    ):
        error = check_error(server.post("/completion", {"prompt": "a"} | extra), 400)
        assert next(iter(extra)) in error["message"]


def test_tokens_and_back(server):
    text = "hé 🤗"
    ids = server.post("/tokenize", {"content": text}).json()["tokens"]
    assert ids == TOKENIZER.encode(text, add_special=False)
    assert server.post("/detokenize", {"tokens": ids}).json() == {"content": text}
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    data = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert data.decode() == text
    assert server.post("/detokenize", {"tokens": []}).json() == {"content": ""}
    check_error(server.post("/detokenize", {"tokens": [4096]}), 400)
    check_error(server.post("/tokenize", {"content": 5}), 400)


def test_a_template_applied(server):
    body = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}
    prompt = server.post("/apply-template", body).json()["prompt"]
    assert prompt == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    prompt = server.post("/apply-template", body | {"add_generation_prompt": False}).json()["prompt"]
    assert prompt.endswith("U<|im_end|>\n")
    assert server.post("/apply-template", body | {"tools": None}).status_code == 200
    assert server.post("/apply-template", body | {"tools": []}).status_code == 200
    check_error(server.post("/apply-template", body | {"tools": [{"type": "function"}]}), 400)


def test_an_answer_is_continued_or_not(server):
    def prompt(*messages, **body):
        body["messages"] = [{"role": role, "content": content} for role, content in messages]
        return server.post("/apply-template", body)

    begun = [("user", "U"), ("assistant", "A")]
    opened = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    for body in (
        {},
        {"add_generation_prompt": True},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        assert prompt(*begun, **body).json()["prompt"] == opened + "A", body
    closed = opened + "A<|im_end|>\n"
    assert prompt(*begun, add_generation_prompt=False).json()["prompt"] == closed
    assert prompt(*begun, continue_final_message=False).json()["prompt"] == closed + "<|im_start|>assistant\n"
    both = prompt(*begun, continue_final_message=True, add_generation_prompt=True)
    assert "exclude each other" in check_error(both, 400)["message"]
    check_error(prompt(("user", "U"), continue_final_message=True), 400)


@pytest.mark.parametrize(
    "path",
    [
        "/lora-adapters",
        "/cors-proxy",
        "/predict",
        "/v1/audio/transcriptions",
        "/v1/stream",
    ],
)
def test_what_is_not_offered_is_not_there(server, path):
    for answer in (server.post(path, {"input": "a", "prompt": "a"}), server.get(path)):
        assert "no such path" in check_error(answer, 404)["message"]


def test_props_and_health(server):
    props = server.get("/props").json()
    assert props["total_slots"] == 2 and props["model_path"].endswith(".gguf")
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert props["default_generation_settings"]["params"]["temperature"] == 0.8
    assert __version__ in props["build_info"] and "im_start" in props["chat_template"]
    assert server.get("/health").json() == server.get("/v1/health").json() == {"status": "ok"}
    check_error(server.post("/props", {}), 501)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/slots", "/nowhere", "/v1/completions"])
def test_head_is_answered_as_get(server, path):
    got, head = server.get(path), server.ask("HEAD", path)
    assert (head.status_code, head.headers["content-type"]) == (got.status_code, got.headers["content-type"])


def test_503_until_the_model_is_there_and_when_the_server_ends(server):
    model, server.hosted.model = server.hosted.model, None
    for path in ("/health", "/v1/models", "/props", "/slots"):
        assert check_error(server.get(path), 503)["message"] == "Loading model"
    check_error(server.post("/v1/completions", {"prompt": "a"}), 503)
    server.hosted.model, server.state.draining = model, True
    check_error(server.get("/health"), 503)
    check_error(server.post("/completion", {"prompt": "a"}), 503)


def test_slots(server):
    busy, idle = server.get("/slots").json()
    assert busy["is_processing"] and busy["next_token"][0]["n_decoded"] == 2 and busy["n_ctx"] == 512
    assert "params" not in idle and not idle["is_processing"]
    assert "prompt" not in busy  # another client's
    assert server.get("/slots?fail_on_no_slot=1").status_code == 200
    server.runner.busy = True
    check_error(server.get("/slots?fail_on_no_slot=1"), 503)
    check_error(server.with_options(slots=False).get("/slots"), 501)


def test_slots_in_files(server, slots_folder):
    check_error(server.post("/slots/0?action=save", {"filename": "a"}), 501)
    server = server.with_options(slot_save_path=slots_folder)
    body = server.post("/slots/0?action=save", {"filename": "a.bin"}).json()
    assert body["n_saved"] == 7 and body["n_written"] == 70 and body["timings"]["save_ms"] >= 0
    assert (slots_folder / "a.bin").exists()
    assert server.post("/slots/1?action=restore", {"filename": "a.bin"}).json()["n_restored"] == 7
    for nothing in (None, {}):
        assert server.post("/slots/1?action=erase", nothing).json() == {"id_slot": 1, "n_erased": 7}
        assert "filename" in check_error(server.post("/slots/1?action=save", nothing), 400)["message"]
    (slots_folder / "b.bin").write_text("1")
    for slot, action, body in (
        (0, "restore", {"filename": "b.bin"}),
        (0, "restore", {"filename": "none"}),
        (0, "save", None),
        (2, "erase", None),
        (-1, "erase", None),
        (10**30, "erase", None),
        (0, "burn", None),
    ):
        error = check_error(server.post(f"/slots/{slot}?action={action}", body), 400)
        assert str(slots_folder) not in error["message"]
    check_error(server.post("/slots/0"), 400)


@pytest.mark.parametrize(
    "name", ["../a", "..", ".", "a/b", "/etc/passwd", "a\\b", "", "a" * 129, ".a", "a\n", "a\0", "é"]
)
def test_a_file_name_is_no_path(server, slots_folder, name):
    server = server.with_options(slot_save_path=slots_folder)
    check_error(server.post("/slots/0?action=save", {"filename": name}), 400)
    assert not list(slots_folder.iterdir())


def test_metrics(server):
    check_error(server.get("/metrics"), 501)
    server = server.with_options(metrics=True)
    server.post("/completion", {"prompt": PROMPT, "n_predict": 3})
    server.get("/nowhere")
    response = server.get("/metrics")
    assert int(response.headers["process-start-time-unix"]) <= server.state.started
    text = response.text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name in (
        "prompt_tokens_total",
        "prompt_tokens_cached_total",
        "prompt_seconds_total",
        "tokens_predicted_total",
        "n_decode_total",
    ):
        assert float(values[f"llamacpp:{name}"]) >= 0
    assert float(values["jaxpaged_kv_pages_used"]) == 1 and float(values["jaxpaged_kv_usage_ratio"]) == 0.25
    assert float(values["jaxpaged_time_to_first_token_seconds_count"]) == 1
    assert float(values["jaxpaged_inter_token_seconds_count"]) == 2
    assert float(values['jaxpaged_finished_total{reason="limit"}']) == 1
    assert float(values['jaxpaged_http_errors_total{status="404"}']) == 1


def test_the_pool(server):
    pool = server.get("/pool").json()
    assert pool["state"] == "1300" and pool["owner"] == [0, -1, -1, -1] and pool["prefix_hit_rate"] == 0.5
    assert pool["sequences"] == [{"slot": 0, "request_id": "1", "tokens": 16, "state": "decode"}]


def test_the_page_and_its_headers(server):
    response = server.get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert server.get("/", headers={"If-None-Match": response.headers["etag"]}).status_code == 304
    check_error(server.with_options(webui=False).get("/"), 404)
    check_error(server.get("/../options.py"), 404)
