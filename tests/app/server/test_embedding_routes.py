"""Embeddings, ranks and gaps: their forms, and what is refused."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
import pytest
from http_server import TOKENIZER, Server, check_error
from jaxpaged_model.checkpoint.pooling import Reranker
from jaxpaged_model.text.tokenizer import Tokenizer

from jaxpaged.app.server.embedding_routes import _normalized
from jaxpaged.app.server.native_schema import NativeRequest

PATHS = ("/v1/embeddings", "/embedding", "/embeddings")


def with_model(server: Server, **changes) -> Server:
    server.state.host.models[0].model = dataclasses.replace(server.state.host.models[0].model, **changes)
    return server


def vectors(server: Server, given, **extra) -> list[list[float]]:
    answer = server.post("/v1/embeddings", {"input": given, **extra})
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


def test_texts_and_tokens_in_every_form(server):
    ids = TOKENIZER.encode("ab")
    one = vectors(server, "ab")
    assert (
        vectors(server, ids) == vectors(server, ["ab"]) == vectors(server, [{"prompt_string": "ab"}]) == one
    )
    assert vectors(server, {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}) == one
    assert vectors(server, ["ab", "cd", ids]) == [one[0], vectors(server, "cd")[0], one[0]]
    before = server.state.metrics.embedded_tokens
    body = server.post("/v1/embeddings", {"input": ["ab", "cd"], "model": "x", "user": "y"}).json()
    count = len(ids) + len(TOKENIZER.encode("cd"))
    assert body["usage"] == {"prompt_tokens": count, "total_tokens": count} and body["object"] == "list"
    assert server.state.metrics.embedded_tokens == before + count


def test_norms_dimensions_and_base64(server):
    (plain,) = vectors(server, "ab", embd_normalize=-1)
    (unit,) = vectors(server, "ab")
    assert np.linalg.norm(unit) == pytest.approx(1) and np.allclose(unit, plain / np.linalg.norm(plain))
    assert np.abs(vectors(server, "ab", embd_normalize=1)[0]).sum() == pytest.approx(1)
    assert max(np.abs(vectors(server, "ab", embd_normalize=0)[0])) == pytest.approx(32767)
    large = np.float32(3e30) * np.ones(3, np.float32)
    assert np.linalg.norm(_normalized(large, 64), 64) == pytest.approx(1)
    assert _normalized(np.zeros(3, np.float32), 2).tolist() == [0, 0, 0]
    (short,) = vectors(server, "ab", dimensions=2)
    assert np.allclose(short, plain[:2] / np.linalg.norm(plain[:2]))
    (text,) = vectors(server, "ab", encoding_format="base64")
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == pytest.approx(unit)


@pytest.mark.parametrize(
    ("pooling", "of"), [("last", lambda h: h[-1]), ("cls", lambda h: h[0]), ("mean", np.mean)]
)
def test_poolings(server, pooling, of):
    hidden = server.runner.hidden_states(TOKENIZER.encode("abc"))
    with_model(server, pooling=pooling)
    expected = hidden.mean(axis=0) if pooling == "mean" else of(hidden)
    assert np.allclose(vectors(server, "abc", embd_normalize=-1)[0], expected)


def test_without_pooling_there_is_a_vector_for_each_token(server):
    with_model(server, pooling="none")
    (entry,) = server.post("/embedding", {"content": "abc"}).json()
    assert np.allclose(entry["embedding"], server.runner.hidden_states(TOKENIZER.encode("abc")))
    assert "pooling" in check_error(server.post("/v1/embeddings", {"input": "abc"}), 400)["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": [[]]},
        {"input": 5},
        {"input": "a", "content": "b"},
        {"input": "a", "encoding_format": "hex"},
        {"input": "a", "dimensions": 0},
        {"input": "a", "dimensions": 10**6},
        {"input": "a", "embd_normalize": 10**400},
        {"input": [99999]},
        {"input": {"what": 1}},
    ],
)
def test_what_is_no_text_is_refused(server, path, body):
    check_error(server.post(path, body), 400)


def test_a_text_beyond_the_context_is_refused(server):
    error = check_error(server.post("/v1/embeddings", {"input": [["a"] * 600]}), 400)
    assert error["type"] == "exceed_context_size_error"


def test_documents_are_ranked(server):
    weight = np.zeros((1, server.runner.hidden_states([1]).shape[1]), np.float32)
    weight[0, 0] = 1.0
    with_model(server, reranker=Reranker(weight, None, "{query} ? {document}", False))
    texts = ["a", "c", "b"]
    scores = [
        server.runner.hidden_states(TOKENIZER.encode(f"q ? {t}", add_special=False))[-1, 0] for t in texts
    ]
    order = sorted(range(3), key=lambda i: -scores[i])
    body = {"query": "q", "documents": texts}
    answer = server.post("/v1/rerank", body).json()
    assert [entry["index"] for entry in answer["results"]] == order
    assert [entry["relevance_score"] for entry in answer["results"]] == pytest.approx(
        [scores[i] for i in order]
    )
    assert [e["index"] for e in server.post("/rerank", body | {"top_n": 2}).json()["results"]] == order[:2]
    other = server.post("/rerank", {"query": "q", "texts": texts, "return_text": True}).json()
    assert [entry["text"] for entry in other] == [texts[i] for i in order]
    for wrong in ({"query": "q"}, {"query": "q", "documents": []}, {"query": 1, "documents": ["a"]}):
        check_error(server.post("/rerank", wrong), 400)


def test_a_model_without_a_head_ranks_nothing(server):
    assert (
        "cls.output"
        in check_error(server.post("/v1/rerank", {"query": "q", "documents": ["a"]}), 501)["message"]
    )


def test_a_softmax_of_scores_is_that_of_yes_and_no():
    head = Reranker(np.eye(2, dtype=np.float32), np.array([0.0, 1.0], np.float32), None, True)
    assert head.score(np.array([1.0, 0.0], np.float32)) == pytest.approx(0.5)


class WithGaps(Tokenizer):
    """The embedded vocabulary with tokens for gaps, which it lacks."""

    def __init__(self) -> None:
        self.__dict__.update(TOKENIZER.__dict__)
        self.fim_ids = {"pre": 1, "suf": 2, "mid": 3}


def test_a_gap_is_between_its_prefix_and_its_suffix(server):
    with_model(server, tokenizer=WithGaps())

    def plain(text):
        return TOKENIZER.encode(text, add_special=False)

    body = {"input_prefix": "def f(", "input_suffix": "return x", "prompt": "a, "}
    answer = server.post("/infill", body | {"n_predict": 4})
    assert answer.status_code == 200 and answer.json()["tokens_predicted"] == 4
    prefix = TOKENIZER.encode("")
    expected = [*prefix, 1, *plain("def f("), *plain("a, "), 2, *plain("return x"), 3]
    assert list(server.runner.requests[-1].prompt) == expected
    extra = {"input_extra": [{"filename": "x.py", "text": "y = 1"}]}
    server.post("/infill", body | extra)
    assert TOKENIZER.decode(server.runner.requests[-1].prompt).startswith("\n\n--- snippet ---\n\ny = 1")
    for wrong in ({}, {"filename": "ok"}, {"filename": 1, "text": "a"}):
        check_error(server.post("/infill", body | {"input_extra": [wrong]}), 400)
    check_error(server.post("/infill", {"input_prefix": "a"}), 400)


def test_a_model_without_tokens_for_gaps_fills_none(server):
    check_error(server.post("/infill", {"input_prefix": "a", "input_suffix": "b"}), 501)
    assert "prompt" in NativeRequest.model_fields
