"""Wrong input of every kind: the right 4xx with the one error body, and nothing changes."""

from __future__ import annotations

import asyncio
import json
import logging

import httpx
import pytest
from http_server import Server, check_error
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxpaged.app.server.encoding import MAX_DEPTH, JsonError, parse_json
from jaxpaged.app.server.security import LimitBody

KEY = "a-very-secret-key"
JSON = {"Content-Type": "application/json"}
POSTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/completion",
    "/tokenize",
    "/detokenize",
    "/apply-template",
)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"nonsense",
        b"[]",
        b'"x"',
        b"5",
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 1_000_000,
        b'{"prompt": "a", "user": ' + b'{"a":' * 1000,
        b'{"prompt": "a' + b'\\"' * 100_000,
        b'{"prompt": "a\nb"}',
        b'{"prompt": "a",}',
        b'{"prompt": "a"} x',
        b'{"' + b"n" * 100_000 + b'": 1, "prompt": "a", "messages": []}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
def test_bad_json_is_400(server, path, body):
    check_error(server.ask("POST", path, content=body, headers=JSON), 400)
    assert not server.runner.requests


def test_lone_surrogates_become_replacement_characters(server):
    body = server.ask("POST", "/completion", content=b'{"prompt": "a\\ud800b"}', headers=JSON).json()
    assert body["content"] == "a\ufffdb"
    error = check_error(
        server.ask("POST", "/completion", content=b'{"\\udc00": 1, "prompt": "a"}', headers=JSON), 400
    )
    assert "\ufffd" in error["message"]
    assert parse_json(b'"\\ud83e\\udd17"') == "🤗"


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(_JSON, st.booleans())
def test_json_that_is_right_is_read_as_python_reads_it(value, ascii):
    assert parse_json(json.dumps(value, ensure_ascii=ascii).encode()) == value


@given(st.integers(1, 80), st.sampled_from(["[", '{"a":']), st.text(alphabet='[]{}"\\', max_size=10))
def test_depth_counts_brackets_outside_strings(depth, opening, noise):
    body = opening * depth + json.dumps(noise) + ("]" if opening == "[" else "}") * depth
    if depth <= MAX_DEPTH:
        parse_json(body.encode())
    else:
        with pytest.raises(JsonError, match="levels"):
            parse_json(body.encode())


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "",
        "application/json; charset=latin-1",
    ],
)
def test_only_json_is_taken(server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    check_error(server.ask("POST", "/completion", content=b'{"prompt": "a"}', headers=headers), 415)
    ok = {"Content-Type": "application/json; charset=UTF-8"}
    assert server.ask("POST", "/completion", content=b'{"prompt": "a"}', headers=ok).status_code == 200


def test_paths_and_methods(server):
    check_error(server.get("/v1/nothing"), 404)
    check_error(server.get("/health/"), 404)
    response = server.get("/v1/completions")
    check_error(response, 405)
    assert "POST" in response.headers["allow"]
    check_error(server.ask("DELETE", "/health"), 405)


def test_limits_of_body_and_headers(server):
    server = server.with_options(max_body=1000)
    exact = b'{"prompt": "' + b"a " * 400 + b'"}'
    check_error(
        server.ask("POST", "/tokenize", content=exact + b" " * (1000 - len(exact)), headers=JSON), 400
    )
    check_error(server.ask("POST", "/completion", content=exact + b" " * 1000, headers=JSON), 413)

    async def chunks():
        for _ in range(100):
            yield b" " * 100

    check_error(server.ask("POST", "/completion", content=chunks(), headers=JSON), 413)
    check_error(server.get("/health", headers={"X-Large": "x" * 33_000}), 431)
    check_error(server.get("/health", headers=[(f"X-{i}", "x") for i in range(120)]), 431)
    check_error(server.get("/v1/models?" + "x" * 33_000), 431)


def test_a_slow_body_is_not_waited_for():
    sent = []

    async def app(scope, receive, send):
        raise AssertionError("not to be reached")

    async def receive():
        await asyncio.sleep(10)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": [], "query_string": b""}
    asyncio.run(LimitBody(app, 100, seconds=0.01)(scope, receive, send))
    assert sent[0]["status"] == 408


def test_every_path_asks_for_the_key_but_health_and_the_page():
    server = Server(api_keys=(KEY, "another-key"), metrics=True)
    for path in ("/v1/models", "/props", "/slots", "/metrics", "/pool", "/openapi.json", "/nothing"):
        response = server.get(path)
        assert check_error(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in POSTS:
        check_error(server.post(path, {"prompt": "a"}), 401)
    for value in (
        "",
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        b"Bearer \xff\xfe",
    ):
        check_error(server.get("/v1/models", headers={"Authorization": value}), 401)
    for headers in (
        {"Authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"X-Api-Key": "another-key"},
    ):
        assert server.get("/v1/models", headers=headers).status_code == 200
    assert server.get("/health").status_code == 200
    assert "error" not in server.get("/").text[:20]
    assert not server.runner.requests


def test_other_sites_may_use_it_only_where_they_are_named():
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    check_error(Server().ask("OPTIONS", "/completion", headers=preflight), 405)
    server = Server(cors_origins=("https://a.example",), api_keys=(KEY,))
    response = server.ask("OPTIONS", "/completion", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    openai = preflight | {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    response = server.ask("OPTIONS", "/v1/chat/completions", headers=openai)
    assert response.status_code == 200
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    response = server.ask("OPTIONS", "/completion", headers=openai | {"Origin": "https://b.example"})
    assert response.status_code == 400 and "access-control-allow-origin" not in response.headers


def test_localhost_stands_for_the_pages_of_this_machine():
    def allowed(origin):
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        response = server.ask("OPTIONS", "/completion", headers=preflight)
        return response.headers.get("access-control-allow-origin")

    server = Server(cors_origins=("localhost", "https://a.example"))
    for host in ("localhost", "127.0.0.1", "[::1]"):
        for origin in (f"http://{host}", f"http://{host}:3000", f"https://{host}"):
            assert allowed(origin) == origin
    assert allowed("https://a.example") == "https://a.example"
    for host in (
        "evil.example",
        "notlocalhost",
        "localhost.evil.example",
        "localhost:1.evil.example",
        "localhost@evil",
    ):
        assert allowed(f"http://{host}") is None
    server = Server(cors_origins=("https://a.example",))
    assert allowed("http://localhost") is None


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _schemas():
    openapi = Server().app.openapi()
    found = []
    for path in POSTS:
        schema = openapi["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = schema["$ref"].rsplit("/", 1)[1]
        found.append((path, sorted(openapi["components"]["schemas"][name]["properties"])))
    return found


_SCHEMAS = _schemas()
_GOOD = {"prompt": "a b", "messages": [{"role": "user", "content": "x"}], "content": "a", "tokens": [1]}


@st.composite
def _bodies(draw):
    """A request that is right, with some parameters of its schema, or others, set to anything."""
    path, names = draw(st.sampled_from(_SCHEMAS))
    body = {name: _GOOD[name] for name in names if name in _GOOD}
    chosen = st.dictionaries(st.sampled_from(names) | st.text(max_size=8), _VALUES, max_size=4)
    return path, body | draw(chosen)


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(_bodies())
@example(("/completion", {"prompt": "a", "logit_bias": {"": 1}}))
@example(("/v1/completions", {"prompt": "\x00", "stop": "\x00"}))
def test_any_value_of_any_parameter_is_served_or_refused(case):
    path, body = case
    server = Server()
    server.runner.n_ctx = 64
    response = server.ask("POST", path, content=json.dumps(body).encode(), headers=JSON)
    if response.status_code == 200:
        assert path not in ("/completion", "/v1/completions") or server.runner.requests
    else:
        check_error(response, 400)
        assert not server.runner.streams
    assert not server.state.generations


@settings(max_examples=150)
@given(
    st.sampled_from(POSTS),
    st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")),
)
def test_any_bytes_are_refused(path, body):
    response = Server().ask("POST", path, content=body, headers=JSON)
    if response.status_code != 200:  # {} is a right body of /detokenize
        check_error(response, 400)


def test_a_bug_has_the_same_body_and_no_traceback(server, caplog):
    def broken():
        raise ZeroDivisionError("secret detail")

    server.runner.pool_state = broken
    caplog.set_level(logging.CRITICAL)

    async def ask():
        transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/pool")

    response = asyncio.run(ask())
    assert "secret" not in response.text
    check_error(response, 500)
