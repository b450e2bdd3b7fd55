"""A newcomer: an empty home, an interpreter, the wheel that `make dist` built, and nothing else on the path."""

from __future__ import annotations

import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import jaxpaged

ROOT = Path(__file__).parents[2]
WHEEL = ROOT / "dist" / f"jaxpaged-{jaxpaged.__version__}-py3-none-any.whl"
PYTHONS = ("3.11", "3.12", "3.13")
SECONDS = 900
"""For one step; a busy machine compiles for minutes."""
_TIMES = pytest.StashKey[list[str]]()


def pytest_configure() -> None:
    """Lets children take Ctrl-C: what a shell starts in the background ignores it, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interpreter(version: str) -> str | None:
    """Path of a Python of this version that can make environments, on PATH or among pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    code = "import ensurepip, sys, venv; print(sys.version.startswith(sys.argv[1]), sys.executable)"
    for found in (f"python{version}", *sorted(root.glob(f"{version}.*/bin/python{version}")), sys.executable):
        try:
            done = subprocess.run([found, "-c", code, f"{version}."], capture_output=True, text=True)
        except OSError:
            continue
        if done.stdout.startswith("True "):
            return done.stdout.split(maxsplit=1)[1].strip()
    return None


@dataclass(frozen=True)
class Shown:
    """What a command has shown, and what it took."""

    status: int
    stdout: str
    stderr: str

    @property
    def refusal(self) -> str:
        """The one line that a refused command says."""
        assert (self.status, self.stdout) == (2, ""), self
        line = self.stderr.splitlines()[-1]
        assert line.startswith("jaxpaged: error: "), self.stderr
        return line.removeprefix("jaxpaged: error: ")


@dataclass
class Newcomer:
    """Runs commands in an empty folder, with an empty home; programs are those of the environment ``venv`` alone."""

    folder: Path
    python: str
    times: list[str]
    venv: str = "venv"
    offline: tuple[str, ...] = field(default=())
    """Words that take the network from a command, where the system has them."""

    @property
    def environment(self) -> dict[str, str]:
        bin = self.folder / self.venv / "bin"
        return {"HOME": str(self.folder / "home"), "PATH": str(bin), "LANG": "C.UTF-8", "TERM": "xterm"}

    def program(self, name: str) -> str:
        return str(self.folder / self.venv / "bin" / name)

    def make_venv(self) -> None:
        subprocess.run(
            [self.python, "-m", "venv", str(self.folder / self.venv)],
            check=True,
            env={"HOME": str(self.folder)},
        )

    def install(self, *what: str) -> Shown:
        """pip, with its settings: an index may be named by its variables."""
        settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        return self.run("python", "-m", "pip", "install", "-q", *what, variables=settings, online=True)

    def run(
        self,
        *command: str,
        stdin: str = "",
        note: str = "",
        variables: dict[str, str] | None = None,
        online: bool = False,
    ) -> Shown:
        """Runs a command to its end; ``note`` names it in the table of times."""
        program, *arguments = command
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [*(() if online else self.offline), self.program(program), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment | (variables or {}),
            timeout=SECONDS,
        )
        if note:
            self.took(note, start, before)
        return Shown(done.returncode, done.stdout, done.stderr)

    def took(self, note: str, start: float, before: resource.struct_rusage) -> None:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
        self.times.append(f"{note:<40} {time.perf_counter() - start:7.1f} s, {cpu:6.1f} s of processors")

    def on_a_terminal(self, *command: str, interrupt_at: str | None = None) -> tuple[int, str]:
        """Status and all that a terminal shows; Ctrl-C is pressed once ``interrupt_at`` is there."""
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [self.program(command[0]), *command[1:]],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )
        os.close(slave)
        shown, pressed = "", False
        late = threading.Timer(SECONDS, process.kill)  # a program that takes no notice of Ctrl-C
        late.start()
        try:
            while data := os.read(master, 4096):
                shown += data.decode(errors="replace")
                if interrupt_at is not None and interrupt_at in shown and not pressed:
                    process.send_signal(signal.SIGINT)
                    pressed = True
        except OSError:  # how Linux says that the other side is closed
            pass
        finally:
            late.cancel()
            os.close(master)
        return process.wait(SECONDS), re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


@pytest.fixture(scope="session", params=PYTHONS)
def newcomer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"no Python {request.param} here (looked on PATH and among pyenv's)")
    assert WHEEL.is_file(), f"{WHEEL} is missing: make dist"
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "home").mkdir()
    times = request.config.stash.setdefault(_TIMES, [])
    times.append(f"Python {request.param}, {python}")
    alone = shutil.which("unshare")
    offline = (alone, "--net", "--map-root-user") if alone is not None else ()
    if offline and subprocess.run([*offline, sys.executable, "-c", ""], capture_output=True).returncode:
        offline = ()
    new = Newcomer(folder, python, times, offline=offline)
    new.make_venv()
    yield new
    shutil.rmtree(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(_TIMES, []):
        terminalreporter.write_line(line)
