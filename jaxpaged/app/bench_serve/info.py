"""Model, context and vocabulary of a server, from its own endpoints."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from jaxpaged.app.errors import InputError

_SECONDS = 30.0


@dataclass(frozen=True)
class ServerInfo:
    """Properties of a server; None if it does not report them."""

    model: str | None
    context: int | None
    """Tokens of a sequence, at most."""
    vocab: int | None
    slots: int | None
    """Sequences at once, at most."""
    build: str | None


async def ask(http: httpx.AsyncClient) -> ServerInfo:
    """Requests ``/v1/models``, which every OpenAI-compatible server has, and llama-server's ``/props``.

    Raises:
      InputError: there is no answer, or it is not an OpenAI-compatible server's.
    """
    models = await _get(http, "/v1/models", needed=True)
    entries = models.get("data")
    first = entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}
    meta = _object(first.get("meta"))
    props = await _get(http, "/props", needed=False)
    settings = _object(props.get("default_generation_settings"))
    name, build = first.get("id"), props.get("build_info")
    return ServerInfo(
        model=name if isinstance(name, str) else None,
        # llama-server's n_ctx_train is not the context of a slot; its /props have that.
        context=_count(first.get("max_model_len")) or _count(settings.get("n_ctx")),
        vocab=_count(meta.get("n_vocab")),
        slots=_count(props.get("total_slots")),
        build=build if isinstance(build, str) else None,
    )


async def _get(http: httpx.AsyncClient, path: str, *, needed: bool) -> dict[str, Any]:
    try:
        response = await http.get(path, timeout=_SECONDS)
        if response.status_code == httpx.codes.OK:
            return _object(response.json())
        reason = f"status {response.status_code}"
        if response.status_code in (401, 403):
            reason += "; --api-key gives a key"
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
    except ValueError:
        reason = "the answer is not JSON"
    if needed:
        raise InputError(f"{http.base_url}: no answer from {path}: {reason}")
    return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def check_url(url: str, *, allow_remote: bool) -> str:
    """Base address of a server, without /v1.

    Raises:
      InputError: it is malformed, holds a password, or is on another machine without ``allow_remote``.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"--url {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"--url {url!r} is not an address such as http://127.0.0.1:8080")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            "--url holds a name or a password, which results would repeat; --api-key is for secrets"
        )
    if parts.query or parts.fragment:
        raise InputError(f"--url {url!r}: only a host and a port, such as http://127.0.0.1:8080")
    path = parts.path.rstrip("/").removesuffix("/v1")  # the base URL of OpenAI clients ends so
    if not allow_remote and not _is_loopback(host):
        raise InputError(
            f"--url {url!r} is another machine: a load test of a server that is not yours is an attack; "
            "--allow-remote says that it may be done"
        )
    return f"{parts.scheme}://{parts.netloc}{path}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, of any machine
        return False
