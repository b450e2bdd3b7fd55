"""A person at a terminal. Ctrl-C, at any moment: status 130, no traceback, and what there is by then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="POSIX signals and terminals")]

# A shell's background job ignores SIGINT, and so do its children; what has a handler here has the default there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SECONDS = 60
JAXPAGED = ("-m", "jaxpaged.app.cli", "generate")
ENDLESS = ("-n", "-1", "-c", "100000", "--no-kv-cache-paged", "--temp", "0", "--ignore-eos")


@contextmanager
def running(arguments: list[str], **kwargs) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, *arguments], **kwargs)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


@pytest.mark.parametrize("moment", [" click\n", " numpy\n", " flax\n", "computing in f32\n"])
def test_before_the_first_token(model_path, environment, moment):
    arguments = ["-X", "importtime", *JAXPAGED, "-m", model_path, "-p", "def f(x):", *ENDLESS]
    with running(arguments, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert any(line.endswith(moment) for line in process.stderr)
        process.send_signal(signal.SIGINT)
        left = [line for line in process.stderr if not line.startswith(("import time:", "jaxpaged: "))]
        assert (process.wait(SECONDS), left) == (130, [])


def test_before_the_command_line_is_there(environment):
    arguments = ["-X", "importtime", *JAXPAGED, "-p", "x"]
    with running(arguments, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert any(line.endswith(" jaxpaged.app.interrupt\n") for line in process.stderr)
        process.send_signal(signal.SIGINT)
        left = [line for line in process.stderr if not line.startswith("import time:")]
        assert process.wait(SECONDS) in (-signal.SIGINT, 130) and left == []


def test_prints_what_there_is(model_path, environment):
    arguments = [*JAXPAGED, "-m", model_path, "-p", "def f(x):", *ENDLESS]
    with running(arguments, stdout=-1, stderr=-1, env=environment) as process:
        # The echoed prompt comes before the first token, so wait for more than it.
        assert len(process.stdout.read(len("def f(x):") + 3)) == 12
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=SECONDS)
        assert process.returncode == 130
        assert b"eval time =" in stderr and b"KV cache =" in stderr and b"Traceback" not in stderr


class Terminal:
    """A command on a terminal of its own, and all that it has shown there."""

    def __init__(self, master: int, process: subprocess.Popen) -> None:
        self._master, self.process = master, process
        self.shown = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 4096):
                self.shown += data.decode(errors="replace")
        except OSError:  # how Linux says that the other side is closed
            pass

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait(self, done: Callable[[str], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not done(self.shown):
            assert time.monotonic() < end and self.process.poll() is None, self.shown
            time.sleep(0.02)


@contextmanager
def chatting(model_path, environment, *flags: str) -> Iterator[Terminal]:
    master, slave = os.openpty()
    arguments = [*JAXPAGED, "-m", model_path, "-cnv", *flags]
    env = environment | {"TERM": "dumb"}
    with running(arguments, stdin=slave, stdout=slave, stderr=slave, env=env) as process:
        os.close(slave)
        yield Terminal(master, process)
    os.close(master)


def asks(shown: str) -> bool:
    return shown.endswith("\n> ")


def test_an_answer_ends_and_the_chat_goes_on(model_path, environment):
    with chatting(model_path, environment, *ENDLESS) as terminal:
        for message in ("one", "two"):
            terminal.wait(asks)
            before = len(terminal.shown)
            terminal.type(f"{message}\n")
            terminal.wait(lambda shown, before=before: len(shown) > before + 100)
            terminal.process.send_signal(signal.SIGINT)
        terminal.wait(asks)
        while (
            terminal.process.poll() is None
        ):  # readline may miss a signal between its prompt and its waiting
            terminal.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert terminal.process.returncode == 130
        assert "KV cache = " in terminal.shown and "Traceback" not in terminal.shown


def test_a_message_too_long_is_refused_and_the_chat_goes_on(model_path, environment):
    with chatting(model_path, environment, "-c", "32") as terminal:
        terminal.wait(asks)
        terminal.type("x" * 100 + "\n")
        terminal.wait(lambda shown: "error: the prompt has " in shown and asks(shown))
        terminal.type("\x04")
        assert terminal.process.wait(SECONDS) == 0
