"""``jaxpaged serve`` in many replicas behind Ray Serve, and a router that knows who has the beginning of a prompt.

    python docs/examples/ray_serve.py --replicas 2 --port 8000 -m model.gguf -np 32 --kv-memory 50%
    PYTHONPATH=docs/scaling serve run ray_serve:build replicas=2 gpus=1 flags="-m model.gguf -np 32"

``Ingress`` takes HTTP requests, cuts the beginning of their text into blocks, and names each block by a hash chain.
It hands them to a ``Replica``, which is the application of ``jaxpaged serve`` with an engine of its own, and passes on
what that answers, streams too. Which replica it is, ``PrefixRouter`` decides: the one that was given the longest
beginning of this text before, for its pool still has the pages; where none was, or that one has much more to do than
others, the less busy one of two.

Made for Ray 2.60; its request routers are an alpha API.

References:
  Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001.
  Ray's PrefixCacheAffinityRouter and SGLang's cache-aware router, which route on a tree of characters.
"""
# Ray reads the annotations of `build`: they must be classes, not text (no `from __future__ import annotations`).

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
"""Of every answer: the replica that gave it."""
_LONGEST_PREFIX = 64 * 1024
"""Characters of a text that are looked at."""
_CHARS_PER_TOKEN = 4
_BLOCKS_AT_FIRST = 4096
"""Remembered of a replica that has not told yet how large its pool is."""
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "root_path", "query_string")
_UNKNOWN = sys.maxsize
"""Requests of a replica that does not answer: nobody is sent there for its prefixes."""
_SECONDS_TO_LEAVE = 5
"""Beyond --drain-seconds, until Ray ends a replica that still answers."""


class Arguments(BaseModel):
    """What ``build`` takes."""

    model_config = ConfigDict(extra="forbid")

    flags: str = ""
    """Flags of ``jaxpaged serve``, as one would type them; --host and --port are without effect."""
    replicas: int = Field(1, ge=1)
    ingress_replicas: int = Field(1, ge=1)
    """Each remembers for itself which texts it sent where."""
    cpus: float = Field(1.0, ge=0)
    """Of a replica, and so are gpus and tpus: what Ray keeps for it. --mesh makes use of more than one."""
    gpus: int = Field(0, ge=0)
    tpus: int = Field(0, ge=0)
    imbalance: int = Field(8, ge=0)
    """So many requests more than the least busy one a replica may have, and still get another for its prefix."""
    block_chars: int = Field(64, ge=8)
    """Characters of a block: a beginning is known in whole blocks only."""


def serve_options(flags: Sequence[str]) -> ServeOptions:
    """The options that flags of ``jaxpaged serve`` stand for.

    Raises:
      click.ClickException: unknown ones, or such that contradict each other or a replica of one process.
    """
    from jaxpaged.app.commands import serve as command

    context = command.make_context("jaxpaged serve", list(flags))
    given = context.params
    if {given.pop("coordinator"), given.pop("num_processes"), given.pop("process_id")} != {None}:
        raise click.UsageError("a replica is one process: --mesh spreads it over the devices of one host")
    return ServeOptions.of_flags(environment=os.environ, **given)


# What is known of texts


def prefix_keys(body: bytes, block_chars: int) -> list[bytes]:
    """A key for each whole block of characters of a request's text, each naming its block and all before it.

    A body that is no request has none: the replica will say what is wrong with it.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(request, dict):
        return []
    text = request.get("messages", request.get("prompt", ""))
    if not isinstance(text, str):  # as JSON, too, conversations that go on begin alike, and lists of tokens
        text = json.dumps(text)
    text = text[:_LONGEST_PREFIX]
    key = json.dumps(request.get("cache_salt")).encode()  # others' pages are not shared
    keys = []
    for end in range(block_chars, len(text) + 1, block_chars):
        block = text[end - block_chars : end].encode("utf-8", "surrogatepass")
        key = blake2b(key + block, digest_size=16).digest()
        keys.append(key)
    return keys


class KnownPrefixes:
    """For each replica, the keys of the beginnings that it was given last.

    As in the pools of pages, the last block of a beginning goes before the first one does: who has a key has all that
    come before it.
    """

    def __init__(self) -> None:
        self._keys: dict[Hashable, OrderedDict[bytes, None]] = {}

    def keep(self, replicas: Iterable[Hashable]) -> None:
        """Forgets all other replicas."""
        self._keys = {replica: self._keys.get(replica, OrderedDict()) for replica in replicas}

    def add(self, replica: Hashable, keys: Sequence[bytes], limit: int) -> None:
        """``replica`` was given a text with these keys; of those least recently used, all beyond ``limit`` go."""
        known = self._keys.get(replica)
        if known is None:  # it died meanwhile
            return
        for key in reversed(keys):
            known[key] = None
            known.move_to_end(key)
        while len(known) > limit:
            known.popitem(last=False)

    def length(self, replica: Hashable, keys: Sequence[bytes]) -> int:
        """How many blocks of a text the replica was given before."""
        known = self._keys.get(replica, ())
        return sum(1 for _ in itertools.takewhile(known.__contains__, keys))

    def size(self, replica: Hashable) -> int:
        """How many blocks are known of a replica."""
        return len(self._keys.get(replica, ()))


class PrefixRouter(RequestRouter):
    """See the module. There is one in every process that has a handle to the replicas: in every ``Ingress``."""

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
        """Ranks of replicas: Ray takes the least busy one of the first rank that has one with room."""
        keys = _keys_of(pending_request)
        # Of two that are equally busy, Ray takes the first: the one with fewer texts to forget for a new one.
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
            limit = tokens * _CHARS_PER_TOKEN // self._block_chars or _BLOCKS_AT_FIRST
            self._known.add(replica_id, keys, limit)

    async def _requests(self, replicas: list[RunningReplica]) -> dict[ReplicaID, int]:
        """What each of them has to do; those that have not said so lately are asked."""
        told = [(replica, self.replica_queue_len_cache.get(replica.replica_id)) for replica in replicas]
        silent = [replica for replica, requests in told if requests is None]
        asked = await self._probe_queue_lens(silent, 0)
        busy = {replica.replica_id: _UNKNOWN for replica in replicas}
        return busy | {replica.replica_id: n for replica, n in (*told, *asked) if n is not None}


def _keys_of(pending_request: PendingRequest | None) -> Sequence[bytes]:
    return () if pending_request is None else pending_request.kwargs.get("keys", ())


# The deployments


class Replica:
    """The application of ``jaxpaged serve`` and its engine; Ray Serve is its HTTP server."""

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
        """The ASGI messages that answer a request; when nobody reads on, it leaves the engine.

        Args:
          scope: ASGI's.
          body: all of it.
          keys: of its text, for the router.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return parts.pop() if parts else await asyncio.Future()  # a client that leaves cancels everything

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
        """Ray asks; it replaces a replica that raises."""
        if not self._runner.healthy:
            raise RuntimeError("the engine has failed")

    def record_routing_stats(self) -> dict[str, int]:
        """For routers: the tokens that the pool holds. A constant, for Ray tells everyone whatever changes."""
        return {"tokens": self._runner.stats().pages_total * self._runner.page_size}


class Ingress:
    """Reads requests, and passes them on to a replica, and its answers back."""

    def __init__(self, replicas: DeploymentHandle, max_body: int, block_chars: int) -> None:
        self._replicas = replicas.options(method_name="answer", stream=True)
        self._max_body, self._block_chars = max_body, block_chars

    async def __call__(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body:  # the replica sees that it is too large, and says so
                break
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        scope |= {"headers": list(request.scope["headers"]), "client": None, "server": None}
        data = bytes(body)
        return _PassedOn(self._replicas, scope, data, prefix_keys(data, self._block_chars))


class _PassedOn(Response):
    """An answer that a replica gives."""

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
            if begun:  # the connection breaks: half an answer must not look like a whole one
                raise
            full = isinstance(error, BackPressureError)
            refused = _error(429, "rate_limit_error") if full else _error(503, "unavailable_error")
            await refused(scope, receive, send)
        finally:
            answer.cancel()  # where the client is gone it still runs


def _error(status: int, kind: str) -> Response:
    message = "all replicas are full" if status == 429 else "the replica has failed; others serve"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers={"Retry-After": "1"})


def build(args: Arguments) -> serve.Application:
    """The application for ``serve.run``, ``serve run`` and KubeRay's RayService.

    Raises:
      click.ClickException: ``args.flags`` are no flags of ``jaxpaged serve``.
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
        # Those that wait, wait in the engine, which knows best when a sequence is free.
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
    """Starts a cluster on this machine, or joins one, and serves until a signal."""
    parser = argparse.ArgumentParser(
        description="jaxpaged serve in many replicas.",
        epilog="All other flags are those of `jaxpaged serve`, for every replica.",
        add_help=False,  # -h would be taken out of -hf
        allow_abbrev=False,
    )
    parser.add_argument("--help", action="help")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="a Ray cluster to join; default: a new one here",
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
        serve.delete("default")  # running requests may end; shutdown alone would break their connections
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
