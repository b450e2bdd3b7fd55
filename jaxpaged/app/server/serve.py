"""``jaxpaged serve``: the server process, from opening the port to shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import click
import uvicorn
from jaxpaged_model.text.chat import BUILTIN_TEMPLATES

from jaxpaged.app import interrupt, processes
from jaxpaged.app.chat import template_of
from jaxpaged.app.errors import InputError, say
from jaxpaged.app.loading import ReadyModel, open_model
from jaxpaged.app.memory import trim_memory
from jaxpaged.app.server.application import create_application
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.lockstep import LockstepEngine
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.app.server.runner import EngineRunner
from jaxpaged.app.server.state import ServedModel, ServerState

_LAST_SECONDS = 3
"""Time for the last responses to be sent at shutdown."""
_LARGEST_HEADERS = 128 * 1024
"""Header bytes that the HTTP parser accepts; the application's limit is lower."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours let running requests finish."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(options: ServeOptions) -> int:
    """Serves until a signal; returns the exit status.

    Raises:
      InputError: the port is taken, or the model cannot be loaded.
    """
    if not processes.is_main():
        return _follow(options)
    with contextlib.ExitStack() as open_sockets:
        sockets: list[socket.socket] = []
        for host in options.host.split(","):
            port = sockets[0].getsockname()[1] if sockets else options.port
            sockets.append(open_sockets.enter_context(_listen(host.strip(), port)))
        return asyncio.run(_serve(options, sockets))


def _follow(options: ServeOptions) -> int:
    """Runs a process other than the first: computes with it until it ends."""
    from jaxpaged.app.server.building import build_engine, check_mesh

    check_mesh(options.mesh)
    quiet = replace(options, log=False)
    engine = build_engine(quiet, open_model(quiet, mesh=options.mesh, show_progress=False))
    engine.compile()
    assert isinstance(engine, LockstepEngine)
    engine.follow()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Opens the port, before anything slow."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


async def _serve(options: ServeOptions, sockets: list[socket.socket]) -> int:
    state = ServerState(options)
    config = uvicorn.Config(
        create_application(state),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_LARGEST_HEADERS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING if options.log else logging.CRITICAL)
    # It warns about every write to a disconnected client.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    server = _Server(config)
    asked = _watch_signals()
    serving = asyncio.create_task(server.serve(sockets=sockets))
    runner = None
    try:
        runner = await _load(options, state, asked)
        if runner is not None:
            _announce(options, sockets)
            await _until(asked, runner)
            if runner.failure is not None:
                processes.exit_if_lost(runner.failure)
            if options.log and not asked.is_set():
                say("error: the engine has failed")
            await _drain(state, runner)
    finally:
        server.should_exit = True
        await asyncio.wait((serving,))
        if runner is not None:
            await runner.close()
    return 0 if asked.is_set() else 1


def _watch_signals() -> asyncio.Event:
    """Sets an event at the first SIGTERM or SIGINT; the second one ends the process."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hear(status: int) -> None:
        if asked.is_set():
            os._exit(status)
        asked.set()

    for number, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, interrupt.STATUS)):
        # A background process ignores Ctrl-C.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, hear, status)
    return asked


async def _load(options: ServeOptions, state: ServerState, asked: asyncio.Event) -> EngineRunner | None:
    """Loads and starts the engine; None if a signal came first."""
    if options.log:
        say("loading; requests are answered 503 until the model is ready")
    loading = asyncio.create_task(asyncio.to_thread(load_engine, options))
    signalled = asyncio.create_task(asked.wait())
    await asyncio.wait((loading, signalled), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        if sys.stderr.isatty():
            click.echo("\033[?25h", err=True)  # progress bars hide the cursor
        os._exit(0)  # a compilation cannot be stopped, and no request is waiting
    signalled.cancel()
    runner, model = await loading
    runner.start()
    state.metrics.watch(runner.stats)
    state.model, state.runner = model, runner
    return runner


def load_engine(options: ServeOptions) -> tuple[EngineRunner, ServedModel]:
    """Loads a model and compiles its engine, which is not started yet: ``(runner, model)``.

    Raises:
      InputError: flags that do not fit the model, the mesh or the memory.
    """
    from jaxpaged.app.server.building import build_engine, check_mesh

    check_mesh(options.mesh)
    ready = open_model(options, mesh=options.mesh, show_progress=options.log)
    model = _served(options, ready)
    if options.log:
        say(f"model = {ready.loaded.path}, {ready.loaded.description}, computing in {ready.dtype}")
        if ready.loaded.mesh is not None:
            say(f"mesh = {processes.describe_mesh(ready.loaded.mesh)}")
    engine = build_engine(options, ready)
    with _compiling(options.log) as report:
        engine.compile(report)
    trim_memory()
    return EngineRunner(engine), model


@contextlib.contextmanager
def _compiling(show: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Progress bar on stderr, if it is a terminal."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("compiling {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _served(options: ServeOptions, ready: ReadyModel) -> ServedModel:
    loaded = ready.loaded
    template = template_of(options, loaded.tokenizer.chat_template)
    own = template is not None
    if template is None:  # as in llama-server: a model that was not trained to chat still answers
        template = BUILTIN_TEMPLATES["chatml"]
        if options.log:
            say("the model has no chat template; chats are written as chatml (--chat-template names another)")
    return ServedModel(
        loaded.tokenizer,
        template,
        own,
        options.alias or (options.hf or loaded.path.resolve().name.removesuffix(".gguf"),),
        str(loaded.path),
        loaded.config.context_length,
        loaded.description,
        loaded.size_bytes,
        loaded.fingerprint,
    )


def _announce(options: ServeOptions, sockets: list[socket.socket]) -> None:
    """Prints the addresses, even with --log-disable: with --port 0 they are not known otherwise."""
    urls = []
    for sock in sockets:
        host, port = sock.getsockname()[:2]
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        urls.append(f"http://{f'[{reached}]' if ':' in reached else reached}:{port}")
        click.echo(f"listening on {urls[-1]}", err=True)
    if not options.log:
        return
    if {sock.getsockname()[0] for sock in sockets} & {"0.0.0.0", "::"} and not options.api_keys:
        say("warning: everyone who can reach this machine can use the server; --api-key restricts it")
    key = ' -H "Authorization: Bearer $KEY"' if options.api_keys else ""
    path, body = "/v1/completions", '{"prompt": "def main():", "max_tokens": 32}'
    click.echo(
        f"try: curl {urls[0]}{path}{key} -H 'Content-Type: application/json' -d '{body}'"
        + (f"\n     or open {urls[0]}/ in a browser" if options.webui else ""),
        err=True,
    )
    sys.stderr.flush()


async def _until(asked: asyncio.Event, runner: EngineRunner) -> None:
    """Returns on a signal, or when the engine has failed."""
    while not asked.is_set() and runner.healthy:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), 0.5)


async def _drain(state: ServerState, runner: EngineRunner) -> None:
    """Refuses new requests, and lets running ones finish within a time limit."""
    state.draining = runner.draining = True
    if state.options.log and state.generations:
        say(f"{len(state.generations)} requests are finishing; press again to stop at once")
    loop = asyncio.get_running_loop()
    deadline = loop.time() + state.options.drain_seconds
    while state.generations and loop.time() < deadline:
        await asyncio.sleep(0.05)
    for generation in list(state.generations):
        generation.fail(ApiError(503, "the server is shutting down"))
