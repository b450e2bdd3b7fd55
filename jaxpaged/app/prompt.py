"""The prompt of ``-p``, ``-f`` or a pipe, and text files in general."""

from __future__ import annotations

import codecs
import re
import sys
from pathlib import Path

from jaxpaged.app.errors import InputError
from jaxpaged.app.options import GenerateOptions

_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|[ntr'\"\\])")
_LINE_END = re.compile(r"(\r\n|\r|\n)\Z")
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "'": "'", '"': '"', "\\": "\\"}


def unescape(text: str) -> str:
    r"""Replaces the escapes ``\n \t \r \' \" \\ \xHH`` as llama.cpp does; all else stays as it is."""
    return _ESCAPE.sub(lambda m: _NAMED.get(m[1]) or chr(int(m[1][1:], 16)), text)


def read_prompt(options: GenerateOptions) -> str | None:
    """The prompt; None if neither -p nor -f is given."""
    if options.prompt is not None and options.file is not None:
        raise InputError("-p and -f both give a prompt; give one of them")
    if options.prompt is not None:
        return unescape(options.prompt) if options.escape else options.prompt
    if options.file is None:
        return None
    return _LINE_END.sub("", read_text("-f", options.file))


def read_text(flag: str, file: str | Path) -> str:
    """Text of the file that ``flag`` names, without a byte order mark; "-" is stdin.

    Raises:
      InputError: no such file, or one that is not UTF-8.
    """
    name = "stdin" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise InputError(f"{flag} {name}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{flag} {name}: not UTF-8 text, byte {error.start} is 0x{byte:02x}") from error
