"""The commands of ``jaxpaged``. JAX is imported inside them, so that --help and --version answer at once."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NoReturn

import click

from jaxpaged import __version__
from jaxpaged.app import interrupt
from jaxpaged.app.bench_serve.options import BenchServeOptions
from jaxpaged.app.errors import say
from jaxpaged.app.flags import flags_of, take
from jaxpaged.app.llama_flags import LlamaCommand, ignored_flags
from jaxpaged.app.measure_options import BenchOptions, ExplainOptions, PerplexityOptions
from jaxpaged.app.options import GenerateOptions
from jaxpaged.app.processes import ProcessOptions, exit_with_others, start
from jaxpaged.app.server.options import ServeOptions

_BROKEN_PIPE = 141


class Application(click.Group):
    """The group of commands: every bad input is one line and exit status 2, an interrupt is 130."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        sys.exit(self.status(*args, **kwargs))

    def status(self, *args: Any, **kwargs: Any) -> int:
        """Runs the command and returns its exit status; arguments as of ``main``."""
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except click.ClickException as error:
            say(f"error: {_one_line(error)}")
            return 2
        except (click.Abort, KeyboardInterrupt):
            return interrupt.STATUS
        except SystemExit:  # click's answer to a closed pipe
            return _BROKEN_PIPE
        except OSError as error:  # such as a full disk
            with suppress(OSError):
                say(f"error: {error.filename or 'output'}: {error.strerror or error}")
            return 1
        return status if isinstance(status, int) else 0


def _one_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message += f"{'' if message.endswith(('.', '?')) else '.'} See '{error.ctx.command_path} --help'."
    return message


def _print_versions(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"jaxpaged {__version__}, jax {version('jax')}, Python {platform.python_version()}")
        context.exit()


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group("jaxpaged", cls=Application, context_settings=_CONTEXT, invoke_without_command=True)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_versions,
    help="Show the versions of jaxpaged, jax and Python, and exit.",
)
@click.pass_context
def application(context: click.Context) -> None:
    """Text generation on JAX with a paged KV cache.

    \b
    jaxpaged generate -p "class Counter:" -n 64            continue a prompt with the embedded model
    jaxpaged generate -m model.gguf -cnv                   chat with a model in a GGUF file
    jaxpaged serve -m model.gguf                           serve it over HTTP
    jaxpaged bench -m model.gguf -b 1,8 -d 0,2048          measure its speed
    jaxpaged bench-serve -m model.gguf --kv-memory 256M    measure it as a server, paged and contiguous
    jaxpaged explain -m model.gguf --platform tpu          show its attention kernel, and why
    jaxpaged perplexity -ctk q8_0 -ctv q8_0 -ub 1          measure what a page format costs in quality
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _filled(text: str) -> str:
    """Wraps a list of flags without breaking inside them."""
    return textwrap.fill(text, 76, break_on_hyphens=False)


_GENERATE_EPILOG = f"""\b
Examples:
  jaxpaged generate -p "class Counter:\\n    def __init__(self):" -n 64 --seed 7
  jaxpaged generate -m model.gguf -f prompt.txt -n 200 --temp 0
  git diff | jaxpaged generate -m model.gguf -f - -np 4 --json
  jaxpaged generate -hf user/repo:Q8_0 -cnv -sys "You are brief."
  jaxpaged generate -m model.gguf -f book.txt -ctk q8_0 -ctv q8_0
  jaxpaged generate -m model.gguf -p "Once" -np 8 --mesh data=2,tensor=4

Text goes to stdout, all else to stderr. Exit status: 0, 1 if output cannot be written, 2 for bad input, 130 when
interrupted. Compiled programs are cached in the user's cache folder (JAXPAGED_CACHE names another one).

\b
{_filled("Flags of llama.cpp that are accepted and have no effect: " + ", ".join(ignored_flags()))}
"""


@application.command(cls=LlamaCommand, context_settings=_CONTEXT, epilog=_GENERATE_EPILOG)
@flags_of(GenerateOptions, ProcessOptions)
def generate(**flags: Any) -> None:
    """Continue a prompt, or chat. The flags are llama.cpp's.

    \b
    -c is the context of each sequence; it is not divided by -np.
    The pool has the pages that this run can fill, not those of the whole context.
    """
    processes = take(ProcessOptions, flags)
    options = GenerateOptions(**flags, sampling_flags=_written("Sampling"))
    _prepare(options.threads, processes)
    from jaxpaged.app.generate import run

    with exit_with_others():
        click.get_current_context().exit(run(options))


@application.command(cls=LlamaCommand, context_settings=_CONTEXT)
@flags_of(BenchOptions, ProcessOptions)
def bench(**flags: Any) -> None:
    """Measure tokens per second, as llama-bench does.

    \b
    pp<N> is a prefill of N tokens, tg<N> generates N tokens, @ d<D> with D tokens already in the context.
    Repetitions alternate between caches, so that a noisy machine affects all alike. Compiling is not counted.
    Lists of formats are paired: -ctk f16,q8_0 -ctv f16,q4_0 are two caches; a single -ctv goes with every -ctk.
      jaxpaged bench -m model.gguf -p 512 -n 128 -b 1,8 -d 0,2048 --kv paged,contiguous -r 5 -o json
      jaxpaged bench -m model.gguf -b 8 -d 2048 --kv paged -ctk f32,f16,q8_0,q4_0
      jaxpaged bench -m model.gguf -b 64 --mesh data=2,tensor=4
    """
    processes, options = take(ProcessOptions, flags), BenchOptions(**flags)
    _prepare(options.threads, processes)
    from jaxpaged.app.bench import run

    with exit_with_others():
        run(options)


@application.command(cls=LlamaCommand, context_settings=_CONTEXT)
@flags_of(ExplainOptions)
def explain(**flags: Any) -> None:
    """Show which attention kernel a model gets, and why.

    \b
    Prints implementation, block sizes, memory and bytes per step on a platform.
    Reads no weights, and needs no device of that platform.
      jaxpaged explain -m model.gguf --platform tpu -b 1,64 -c 32768
      jaxpaged explain -m model.gguf --platform gpu -ctk q8_0 -ctv q4_0
    """
    _prepare(None)
    from jaxpaged.app.explain import run

    run(ExplainOptions(**flags))


_PERPLEXITY_EPILOG = """\b
Examples:
  jaxpaged perplexity -m model.gguf -f wiki.test.raw
  jaxpaged perplexity -m model.gguf -f wiki.test.raw -ctk q8_0 -ctv q4_0 --kl-divergence --chunks 40
  jaxpaged perplexity -ctk q4_0 -ctv q4_0 --hadamard off -ub 1 --kl-divergence --json

The text is split into chunks of -c tokens, and the second half of each is scored, as in llama-perplexity. If the
model has a BOS token, it replaces the first token of each chunk. Errors (+/-) are one standard error over tokens.

--kl-divergence computes every chunk twice, with exact products through f32 pages and with the given flags, and
compares the predictions over the whole vocabulary; no file of logits is needed. It shows differences long before the
perplexity does. With --exact it measures pages alone, with f32 pages products alone.

-ub matters: some formats store the newest page of a sequence in 16 bits until it is full, so predictions depend on
the tokens per step. -ub 512 is as in prefill, -ub 1 as in decoding.
"""


@application.command(cls=LlamaCommand, context_settings=_CONTEXT, epilog=_PERPLEXITY_EPILOG)
@flags_of(PerplexityOptions)
def perplexity(**flags: Any) -> None:
    """Measure the perplexity of a text, as llama-perplexity does.

    \b
    Shows what a page format of keys and values costs in quality.
    Prints the perplexity after each chunk, and at the end that of all.
      jaxpaged perplexity -m model.gguf -f wiki.test.raw -c 512
    """
    options = PerplexityOptions(**flags)
    _prepare(options.threads)
    from jaxpaged.app.perplexity import run

    run(options)


_SERVE_EPILOG = f"""\b
Examples:
  jaxpaged serve -m model.gguf
  jaxpaged serve -m model.gguf -np 32 -c 8192 --kv-memory 50% --metrics
  JAXPAGED_API_KEY=a-long-secret jaxpaged serve -m model.gguf --host 0.0.0.0 --port 80
  jaxpaged serve -m model.gguf -ctk q8_0 -ctv q8_0 --slot-save-path slots/
  jaxpaged serve -m model.gguf --mesh data=2,tensor=4

\b
Clients, and metrics of the pool:
  curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'
  OPENAI_BASE_URL=http://localhost:8080/v1 OPENAI_API_KEY=none python my_openai_program.py
  curl localhost:8080/metrics

-np sequences run at once and share one pool of pages. A sequence gets pages as it grows, so the pool (--kv-memory)
may be much smaller than -np contexts; when it is full, the newest sequence is preempted and continues later.
Requests beyond --max-queue are refused with 429, those that can never fit with 400. Flags of generation and sampling
are defaults of requests.

SIGTERM and Ctrl-C let running requests end (--drain-seconds); the second one stops at once. Exit status: 0, 2 for
bad input.

\b
{_filled("Flags of llama.cpp that are accepted and have no effect: " + ", ".join(ignored_flags()))}
"""


@application.command(cls=LlamaCommand, context_settings=_CONTEXT, epilog=_SERVE_EPILOG)
@flags_of(ServeOptions, ProcessOptions)
def serve(**flags: Any) -> None:
    """Serve a model over HTTP.

    It has OpenAI's API, llama-server's, and a page for the browser.

    \b
    /v1/chat/completions, /v1/completions, /v1/models      any OpenAI client
    /completion, /tokenize, /slots, /props, /health ...    llama-server's clients
    /                                                      a chat, and the pool of pages
    """
    processes = take(ProcessOptions, flags)
    options = ServeOptions.of_flags(environment=os.environ, **flags)
    _prepare(options.threads, processes)
    from jaxpaged.app.server.serve import run

    with exit_with_others():
        click.get_current_context().exit(run(options))


@application.command(cls=LlamaCommand, context_settings=_CONTEXT)
def devices() -> None:
    """List the devices that JAX computes on."""
    _prepare(None)
    from jaxpaged.app.devices import describe

    for line in describe():
        click.echo(line)


_BENCH_SERVE_EPILOG = """\b
Examples:
  jaxpaged bench-serve --kv-memory 8M -c 1024
  jaxpaged bench-serve -m model.gguf --kv-memory 256M -c 2048 -r 3 -o serve.json --plot serve.svg
  jaxpaged bench-serve -m model.gguf --compare prefix,no-prefix --shared-prefix 512 --lengths fixed:64:64
  jaxpaged bench-serve --url http://127.0.0.1:8080 --rate 0.5,1,2,4 --goodput 'ttft:500 tpot:50'
  jaxpaged bench-serve --url http://127.0.0.1:8000 --vocab 32000 --clients 1,8,32 --lengths uniform:16:256

Prompts are random token ids without a common prefix, except --shared-prefix. Every request generates exactly as
many tokens as its sampled length (ignore_eos, temperature 0), so that all servers do the same work.

TTFT counts from the planned arrival, waiting and retries included. TPOT is (last token - first) / (tokens - 1) of a
request. ITL: a chunk of k tokens that comes g ms after the one before counts as k gaps of g / k. Throughput is that
of the whole level, including its end. KV waste is the share of token slots in used pages (of a contiguous cache: in
used slots) that hold no token, sampled 5 times per second.

Without --goodput, throughput at equal latency is compared within the p95 TTFT and TPOT of the second server at its
largest throughput.
"""


@application.command("bench-serve", cls=LlamaCommand, context_settings=_CONTEXT, epilog=_BENCH_SERVE_EPILOG)
@flags_of(BenchServeOptions)
def bench_serve(**flags: Any) -> None:
    """Measure servers under load.

    \b
    Prints throughput, latencies, goodput and memory at several levels of load.
    Starts jaxpaged serve with a paged and with a contiguous cache, or measures any OpenAI-compatible server (--url).
      jaxpaged bench-serve -m model.gguf --kv-memory 256M -c 2048 --plot serve.svg
    """
    options = BenchServeOptions(**flags)
    options.check(_written)
    from jaxpaged.app.bench_serve.run import run

    run(options)


def _written(group: str) -> tuple[str, ...]:
    """Flags under a heading of ``--help`` that were given."""
    context = click.get_current_context()
    return tuple(
        next(name for name in parameter.opts if name.startswith("--"))
        for parameter in context.command.params
        if getattr(parameter, "group", None) == group
        and context.get_parameter_source(str(parameter.name)) is click.core.ParameterSource.COMMANDLINE
    )


def _prepare(threads: int | None, processes: ProcessOptions | None = None) -> None:
    from jaxpaged.app.environment import prepare

    prepare(threads)
    if processes is not None:
        start(processes)
