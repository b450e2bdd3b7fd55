"""Checks the flags of beam search and prompt-lookup decoding."""

from __future__ import annotations

from jaxpaged.app.errors import InputError
from jaxpaged.app.options import GenerateOptions


def check_methods(options: GenerateOptions, *, prompted: bool) -> None:
    """Refuses flags that exclude ``--beams`` or ``--lookup`` or would have no effect on them.

    Args:
      options: of the run.
      prompted: True if there is a prompt and no chat.

    Raises:
      InputError: there is such a flag.
    """
    o = options
    clashes = {
        "--context-shift": o.context_shift,
        "--prompt-cache": o.prompt_cache is not None,
        "-np": o.parallel > 1,
    }
    if o.lookup:
        name = f"--lookup {o.lookup}"
        _refuse(name, {**clashes, "--beams": o.beams > 1})
        if o.temp > 0:
            raise InputError(f"{name} is greedy decoding: it needs --temp 0")
        if (o.repeat_penalty, o.presence_penalty, o.frequency_penalty) != (1, 0, 0):
            raise InputError(f"{name} knows no penalties")
    if o.beams > 1:
        name = f"--beams {o.beams}"
        _refuse(name, {**clashes, "--page-map": o.page_map is not None})
        if not prompted:
            raise InputError(f"{name} continues a prompt (-p or -f) and does not chat")
        if o.predict == 0:
            raise InputError(f"{name} and -n 0: there is nothing to search for")
        if flags := [flag for flag in o.sampling_flags if not (flag == "--temp" and o.temp <= 0)]:
            raise InputError(f"{name} samples no tokens: {', '.join(flags)} would have no effect")


def _refuse(name: str, clashes: dict[str, bool]) -> None:
    for flag, given in clashes.items():
        if given:
            raise InputError(f"{name} and {flag} exclude each other")
