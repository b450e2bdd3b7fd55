"""Where the prompt comes from: -p, -f or a pipe."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from jaxpaged.app.errors import InputError
from jaxpaged.app.options import GenerateOptions

_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|[ntr'\"\\])")
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "'": "'", '"': '"', "\\": "\\"}


def unescape(text: str) -> str:
    r"""The text with ``\n \t \r \' \" \\ \xHH`` read as llama.cpp does; all else stays as it is."""
    return _ESCAPE.sub(lambda m: _NAMED.get(m[1]) or chr(int(m[1][1:], 16)), text)


def read_prompt(options: GenerateOptions) -> str | None:
    """The prompt, or None where neither -p nor -f is given."""
    if options.prompt is not None and options.file is not None:
        raise InputError("-p and -f both give a prompt; give one of them")
    if options.prompt is not None:
        return unescape(options.prompt) if options.escape else options.prompt
    if options.file is None:
        return None
    return read_file(options.file).removesuffix("\n")


def read_file(file: str) -> str:
    """The text of ``-f``; - is stdin.

    Raises:
      InputError: no such file, or one that is not UTF-8.
    """
    name = "stdin" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except OSError as error:
        raise InputError(f"-f {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"-f {name}: not UTF-8 text, byte {error.start} is 0x{data[error.start]:02x}"
        ) from error
