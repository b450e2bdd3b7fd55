"""Replicas of ``jaxpaged serve`` behind Ray Serve, with a prefix-aware router.

    python docs/examples/ray_serve.py --replicas 2 --port 8000 -m model.gguf -np 32 --kv-memory 50%
    PYTHONPATH=docs/examples serve run ray_serve:build replicas=2 gpus=1 flags="-m model.gguf -np
    32"

``Ingress`` receives HTTP requests, splits the beginning of their text into blocks, and identifies
each block by a hash chain. It forwards them to a ``Replica``, the application of ``jaxpaged serve``
with its own engine, and streams the response back. ``PrefixRouter`` chooses the replica: the one
that received the longest prefix of the text before, since its pool still has the pages; if there is
none, or it has many more requests than others, the less busy one of two.

Made for Ray 2.60; its request routers are an alpha API.

References: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001. Ray's
  PrefixCacheAffinityRouter and SGLang's cache-aware router, which route on a tree of characters.
"""
# Ray reads the annotations of `build`: they must be classes, not text (no `from __future__ import
# annotations`).

import argparse
import asyncio
import itertools
import json
import os
import random
import shlex
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import click
import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import BackpressureConfig, HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from jaxpaged.app.server.options import ServeOptions

REPLICA_HEADER = "x-jaxpaged-replica"
"""Header of each response, with the id of the replica."""
_LONGEST_PREFIX = 64 * 1024
"""Maximum number of characters of a text that the router reads."""
_CHARS_PER_TOKEN = 4
_INITIAL_BLOCKS = 4096
"""Blocks remembered for a replica that has not reported the size of its pool."""
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "root_path", "query_string")
_UNKNOWN = sys.maxsize
"""Assumed requests of a replica that does not respond, so that it is not chosen for its
prefixes."""
_SECONDS_TO_LEAVE = 5
"""Time after --drain-seconds until Ray ends a replica with running requests."""


class Arguments(BaseModel):
    """Arguments of ``build``."""

    model_config = ConfigDict(extra="forbid")

    flags: str = ""
    """Flags of ``jaxpaged serve``, as on its command line; --host and --port have no effect."""
    replicas: int = Field(1, ge=1)
    ingress_replicas: int = Field(1, ge=1)
    """Each has its own memory of prefixes."""
    cpus: float = Field(1.0, ge=0)
    """CPUs that Ray reserves for a replica, as ``gpus`` and ``tpus``; --mesh uses more than one."""
    gpus: int = Field(0, ge=0)
    tpus: int = Field(0, ge=0)
    imbalance: int = Field(8, ge=0)
    """Largest excess of requests over the least busy replica with which one is chosen for its
    prefix."""
    block_chars: int = Field(64, ge=8)
    """Characters of a block; prefixes are matched in whole blocks."""


def serve_options(flags: Sequence[str]) -> ServeOptions:
    """Parses flags of ``jaxpaged serve``.

    Raises:
      click.ClickException: unknown or contradictory flags, or those of several processes.
    """
    from jaxpaged.app.commands import serve as command

    context = command.make_context("jaxpaged serve", list(flags))
    given = context.params
    if {given.pop("coordinator"), given.pop("num_processes"), given.pop("process_id")} != {None}:
        raise click.UsageError("a replica is one process; --mesh shards it over the devices of one host")
    return ServeOptions.of_flags(environment=os.environ, **given)


# Prefixes


def prefix_keys(body: bytes, block_chars: int) -> list[bytes]:
    """Hash of each whole block of a request's text and of all text before it.

    Empty for an invalid body, which the replica will refuse.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(request, dict):
        return []
    text = request.get("messages", request.get("prompt", ""))
    if not isinstance(
        text, str
    ):  # continued conversations, and lists of tokens, have a common prefix as JSON too
        text = json.dumps(text)
    text = text[:_LONGEST_PREFIX]
    key = json.dumps(request.get("cache_salt")).encode()  # pages are shared within a salt only
    keys = []
    for end in range(block_chars, len(text) + 1, block_chars):
        block = text[end - block_chars : end].encode("utf-8", "surrogatepass")
        key = blake2b(key + block, digest_size=16).digest()
        keys.append(key)
    return keys


class KnownPrefixes:
    """Keys of the prefixes that each replica received last.

    As in prefix caches, the last block of a prefix is evicted before the first: a key that is
    present implies those before it.
    """

    def __init__(self) -> None:
        self._keys: dict[Hashable, OrderedDict[bytes, None]] = {}

    def keep(self, replicas: Iterable[Hashable]) -> None:
        """Removes all other replicas."""
        self._keys = {replica: self._keys.get(replica, OrderedDict()) for replica in replicas}

    def add(self, replica: Hashable, keys: Sequence[bytes], limit: int) -> None:
        """Records keys that a replica received; evicts the least recently used beyond ``limit``."""
        known = self._keys.get(replica)
        if known is None:  # the replica is gone
            return
        for key in reversed(keys):
            known[key] = None
            known.move_to_end(key)
        while len(known) > limit:
            known.popitem(last=False)

    def length(self, replica: Hashable, keys: Sequence[bytes]) -> int:
        """Number of leading blocks of a text that the replica received before."""
        known = self._keys.get(replica, ())
        return sum(1 for _ in itertools.takewhile(known.__contains__, keys))

    def size(self, replica: Hashable) -> int:
        """Number of blocks remembered for a replica."""
        return len(self._keys.get(replica, ()))


class PrefixRouter(RequestRouter):
    """Router in every process with a handle to the replicas, that is, in every ``Ingress``; see the
    module."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._imbalance: int = kwargs["imbalance"]
        self._block_chars: int = kwargs["block_chars"]
        self._known = KnownPrefixes()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        self._known.keep(replica.replica_id for replica in replicas)
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; Ray takes the least busy one of the first rank with capacity."""
        keys = _keys_of(pending_request)
        # Of two that are equally busy, Ray takes the first: the one with fewer blocks to evict.
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if keys:
            two.sort(key=lambda replica: self._known.size(replica.replica_id))
        lengths = [self._known.length(replica.replica_id, keys) for replica in candidate_replicas]
        if not any(lengths):
            return [two]
        best = [
            replica
            for replica, length in zip(candidate_replicas, lengths, strict=True)
            if length == max(lengths)
        ]
        busy = await self._requests(candidate_replicas)
        if min(busy[replica.replica_id] for replica in best) - min(busy.values()) > self._imbalance:
            return [two]
        return [best, two]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if (keys := _keys_of(pending_request)) and replica_id in self.curr_replicas:
            tokens = (self.curr_replicas[replica_id].routing_stats or {}).get("tokens", 0)
            limit = tokens * _CHARS_PER_TOKEN // self._block_chars or _INITIAL_BLOCKS
            self._known.add(replica_id, keys, limit)

    async def _requests(self, replicas: list[RunningReplica]) -> dict[ReplicaID, int]:
        """Number of requests of each replica, from the cache or else by a probe."""
        cached = [(replica, self.replica_queue_len_cache.get(replica.replica_id)) for replica in replicas]
        missing = [replica for replica, requests in cached if requests is None]
        probed = await self._probe_queue_lens(missing, 0)
        busy = {replica.replica_id: _UNKNOWN for replica in replicas}
        return busy | {replica.replica_id: n for replica, n in (*cached, *probed) if n is not None}


def _keys_of(pending_request: PendingRequest | None) -> Sequence[bytes]:
    return () if pending_request is None else pending_request.kwargs.get("keys", ())


# Deployments


class Replica:
    """Application of ``jaxpaged serve`` with its engine, under Ray Serve as HTTP server."""

    def __init__(self, flags: Sequence[str]) -> None:
        options = serve_options(flags)
        from jaxpaged.app.environment import prepare

        prepare(options.threads)  # before anything imports jax
        from jaxpaged.app.server.application import create_application
        from jaxpaged.app.server.serve import load_engine
        from jaxpaged.app.server.state import ServerState

        self._state = ServerState(options)
        self._runner, self._state.model = load_engine(options)
        self._runner.start()  # Ray calls this on the event loop of the requests
        self._state.metrics.watch(self._runner.stats)
        self._state.runner = self._runner
        self._app = create_application(self._state)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    async def answer(
        self, scope: dict[str, Any], body: bytes, keys: Sequence[bytes]
    ) -> AsyncIterator[Message]:
        """Yields the ASGI messages of a response; when the iterator is closed, the request is
        aborted.

        Args:
          scope: ASGI scope.
          body: complete body.
          keys: hashes of its text, for the router.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return parts.pop() if parts else await asyncio.Future()  # a disconnect cancels the task

        task = asyncio.create_task(self._app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA_HEADER.encode(), self._name)]
                yield message
            await task  # a bug is raised here, for Ray's log
        finally:
            task.cancel()

    async def check_health(self) -> None:
        """Raises if the engine has failed, so that Ray replaces the replica."""
        if not self._runner.healthy:
            raise RuntimeError("the engine has failed")

    def record_routing_stats(self) -> dict[str, int]:
        """Tokens of the pool, for routers; a constant, since Ray broadcasts changes."""
        return {"tokens": self._runner.stats().pages_total * self._runner.page_size}


class Ingress:
    """Forwards requests to a replica, and responses back."""

    def __init__(self, replicas: DeploymentHandle, max_body: int, block_chars: int) -> None:
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._max_body, self._block_chars = max_body, block_chars

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body:  # the replica refuses it as too large
                break
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        scope |= {"headers": list(request.scope["headers"]), "client": None, "server": None}
        data = bytes(body)
        return _ReplicaResponse(self._replicas, scope, data, prefix_keys(data, self._block_chars))


class _ReplicaResponse(Response):
    """Response streamed from a replica."""

    def __init__(
        self, replicas: DeploymentHandle, scope: dict[str, Any], body: bytes, keys: list[bytes]
    ) -> None:
        self._replicas, self._scope, self._data, self._keys = replicas, scope, body, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Any = self._replicas.remote(self._scope, self._data, keys=self._keys)
        begun = False
        try:
            async for message in answer:
                begun = True
                await send(message)
        except (BackPressureError, DeploymentUnavailableError, RayActorError) as error:
            if begun:  # the connection must break, so that the response is not taken for complete
                raise
            full = isinstance(error, BackPressureError)
            refused = _error(429, "rate_limit_error") if full else _error(503, "unavailable_error")
            await refused(scope, receive, send)
        finally:
            answer.cancel()  # still running after a disconnect


def _error(status: int, kind: str) -> Response:
    message = "all replicas are full" if status == 429 else "the replica has failed; others serve"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers={"Retry-After": "1"})


def build(args: Arguments) -> serve.Application:
    """Builds the application for ``serve.run``, ``serve run`` and KubeRay's RayService.

    Raises:
      click.ClickException: invalid ``args.flags``.
    """
    flags = shlex.split(args.flags)
    options = serve_options(flags)
    router = RequestRouterConfig(
        request_router_class=PrefixRouter,
        request_router_kwargs={"imbalance": args.imbalance, "block_chars": args.block_chars},
    )
    drain = options.drain_seconds + _SECONDS_TO_LEAVE
    replica = serve.deployment(
        num_replicas=args.replicas,
        ray_actor_options={
            "num_cpus": args.cpus,
            "num_gpus": args.gpus,
            "resources": {"TPU": args.tpus} if args.tpus else {},
        },
        # Requests wait in the engine, not in Ray.
        max_ongoing_requests=options.parallel + options.max_queue,
        max_queued_requests=options.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        request_router_config=router,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.5,
    )(Replica)
    ingress = serve.deployment(
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=args.replicas * (options.parallel + options.max_queue) + options.max_queue,
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.5,
    )(Ingress)
    return ingress.bind(replica.bind(flags), options.max_body, args.block_chars)


def main() -> None:
    """Serves on a new cluster on this machine, or on an existing one, until a signal."""
    parser = argparse.ArgumentParser(
        description="Replicas of jaxpaged serve behind Ray Serve.",
        epilog="All other flags are passed to `jaxpaged serve` on every replica.",
        add_help=False,  # -h would match -hf
        allow_abbrev=False,
    )
    parser.add_argument("--help", action="help")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="address of a Ray cluster; default: a new one on this machine",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    for name in ("replicas", "ingress_replicas", "cpus", "gpus", "tpus", "imbalance", "block_chars"):
        field = Arguments.model_fields[name]
        parser.add_argument("--" + name.replace("_", "-"), type=type(field.default), default=field.default)
    known, flags = parser.parse_known_args()
    chosen = {name: value for name, value in vars(known).items() if name in Arguments.model_fields}
    try:
        application = build(Arguments(flags=shlex.join(flags), **chosen))
    except (click.ClickException, ValueError) as error:
        parser.error(error.format_message() if isinstance(error, click.ClickException) else str(error))
    dashboard = None if known.address else False
    ray.init(known.address or "local", log_to_driver=False, include_dashboard=dashboard)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        serve.start(http_options=HTTPOptions(host=known.host, port=known.port))
        serve.run(application, name="default")
        print(f"cluster {ray.get_runtime_context().gcs_address}", flush=True)
        print(f"listening on http://{known.host}:{known.port}", flush=True)
        threading.Event().wait()
    finally:
        serve.delete("default")  # lets running requests end; shutdown alone would break their connections
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
