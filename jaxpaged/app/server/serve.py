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
from jaxpaged_model.checkpoint.gguf_file import split_parts
from jaxpaged_model.embedding import Embedder
from jaxpaged_model.text.chat import BUILTIN_TEMPLATES

from jaxpaged.app import interrupt, processes
from jaxpaged.app.chat import template_of
from jaxpaged.app.errors import InputError, say
from jaxpaged.app.loading import ReadyModel, open_model
from jaxpaged.app.memory import free_memory, trim_memory
from jaxpaged.app.server.application import create_application
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.hosting import Hosted, ModelHost
from jaxpaged.app.server.lockstep import LockstepEngine
from jaxpaged.app.server.model_folder import models_in, name_of
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.app.server.runner import EngineRunner
from jaxpaged.app.server.state import ServedModel, ServerState

_LAST_SECONDS = 3
"""Time for the last responses to be sent at shutdown."""
_LARGEST_HEADERS = 128 * 1024
"""Header bytes that the HTTP parser accepts; the application's limit is lower."""
_ROOM = 2
"""Free memory for a model to be loaded beside others, in sizes of its file: it also has a cache."""


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
    if processes.count() > 1 and (options.models_dir is not None or options.sleep_idle_seconds >= 0):
        raise InputError("--models-dir and --sleep-idle-seconds are for a server of one process")
    if not processes.is_main():
        return _follow(options)
    models, first = _host(options)
    with contextlib.ExitStack() as open_sockets:
        sockets: list[socket.socket] = []
        for host in options.host.split(","):
            port = sockets[0].getsockname()[1] if sockets else options.port
            sockets.append(open_sockets.enter_context(_listen(host.strip(), port)))
        return asyncio.run(_serve(ServerState(options, host=models), first, sockets))


def _host(options: ServeOptions) -> tuple[ModelHost, Hosted | None]:
    """The models of a server, none loaded yet: ``(host, the one to load at once)``.

    Raises:
      InputError: ``--models-dir`` has no models, or ``-m`` names none.
    """
    sleep_seconds = options.sleep_idle_seconds
    if options.models_dir is None:
        only = Hosted("")
        return ModelHost([only], lambda _: load_engine(options), sleep_seconds=sleep_seconds), only
    paths = models_in(options.models_dir)
    first = None
    if options.model is not None:
        first = name_of(options.model)
        if first not in paths:
            if not options.model.exists():
                raise InputError(f"-m {options.model}: no such model; --models-dir has {', '.join(paths)}")
            paths[first] = options.model
    models = {name: Hosted(name, path) for name, path in paths.items()}
    host = ModelHost(
        list(models.values()),
        lambda hosted: load_engine(replace(options, model=hosted.path, alias=(hosted.name,))),
        by_name=True,
        max_loaded=options.models_max,
        has_room=_has_room,
        sleep_seconds=sleep_seconds,
    )
    return host, models[first] if first is not None else None


def _has_room(hosted: Hosted) -> bool:
    path = hosted.path
    assert path is not None
    files = path.iterdir() if path.is_dir() else map(path.with_name, split_parts(path.name)[1])
    size = sum(file.stat().st_size for file in files)
    return free_memory() >= _ROOM * size


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
        sock.listen(2048)  # before the address is announced; uvicorn's backlog
    except OSError as error:
        sock.close()
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    sock.setblocking(False)
    return sock


async def _serve(state: ServerState, first: Hosted | None, sockets: list[socket.socket]) -> int:
    options, host = state.options, state.host
    state.metrics.watch(state.stats)
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
    try:
        if first is not None:
            await _load_first(options, host, first, asked)
        _announce(options, sockets)
        await _until(asked, host)
        if not asked.is_set():
            for hosted in host.loaded:
                if isinstance(hosted.runner, EngineRunner) and hosted.runner.failure is not None:
                    processes.exit_if_lost(hosted.runner.failure)
            if options.log:
                say("error: the engine has failed")
        await _drain(state)
    finally:
        server.should_exit = True
        await asyncio.wait((serving,))
        if host.is_loading:
            os._exit(0 if asked.is_set() else 1)  # a compilation cannot be stopped
        await host.close()
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


async def _load_first(options: ServeOptions, host: ModelHost, first: Hosted, asked: asyncio.Event) -> None:
    """Loads and starts an engine; a signal ends the process at once.

    Raises:
      InputError: the model cannot be loaded.
    """
    if options.log:
        say(
            "loading and compiling, minutes the first time, then seconds; until then requests are answered 503"
        )
    loading = asyncio.create_task(host.load(first))
    signalled = asyncio.create_task(asked.wait())
    await asyncio.wait((loading, signalled), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        if sys.stderr.isatty():
            click.echo("\033[?25h", err=True)  # progress bars hide the cursor
        os._exit(0)  # a compilation cannot be stopped, and no request is waiting
    signalled.cancel()
    try:
        await loading
    except ApiError as error:
        raise InputError(first.failure or error.message) from error


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
    embedder = Embedder(ready.loaded, chunk=options.step_tokens) if ready.loaded.mesh is None else None
    return EngineRunner(engine, embedder), model


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
        options.pooling or loaded.pooling or "last",
        loaded.reranker,
        loaded.config.hidden_size,
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


async def _until(asked: asyncio.Event, host: ModelHost) -> None:
    """Returns on a signal, or when the engine of the only model has failed."""
    while not asked.is_set():
        if not host.by_name and any(not hosted.runner.healthy for hosted in host.loaded if hosted.runner):
            return
        await host.discard_failed()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), 0.5)


async def _drain(state: ServerState) -> None:
    """Refuses new requests, and lets running ones finish within a time limit."""
    state.draining = True
    num_running = len(state.generations) + state.host.num_waiting
    if state.options.log and num_running:
        say(f"{num_running} requests are finishing; press again to stop at once")
    loop = asyncio.get_running_loop()
    deadline = loop.time() + state.options.drain_seconds
    while (state.generations or state.host.num_waiting) and loop.time() < deadline:
        await asyncio.sleep(0.05)
    for generation in list(state.generations):
        generation.fail(ApiError(503, "the server is shutting down"))
    state.host.refuse_waiting()
