"""Checks flags of methods that exclude others: beam search, Mirostat."""

from __future__ import annotations

from jaxpaged.app.errors import InputError
from jaxpaged.app.options import GenerateOptions


def check_methods(options: GenerateOptions, *, prompted: bool) -> None:
    """Refuses flags that exclude each other, or would have no effect on ``--beams``.

    Args:
      options: of the run.
      prompted: True if there is a prompt and no chat.

    Raises:
      InputError: there is such a flag.
    """
    o = options
    if o.mirostat and o.num_draft:
        raise InputError(
            "--mirostat and --lookup exclude each other: mirostat samples one token after the other"
        )
    if o.beams <= 1:
        return
    name = f"--beams {o.beams}"
    clashes = {
        "--context-shift": o.context_shift,
        "--prompt-cache": o.prompt_cache is not None,
        "-np": o.parallel > 1,
        "--lookup": o.num_draft > 0,
        "--page-map": o.page_map is not None,
    }
    for flag, given in clashes.items():
        if given:
            raise InputError(f"{name} and {flag} exclude each other")
    if not prompted:
        raise InputError(f"{name} continues a prompt (-p or -f) and does not chat")
    if o.predict == 0:
        raise InputError(f"{name} and -n 0: there is nothing to search for")
    if flags := [flag for flag in o.sampling_flags if not (flag == "--temp" and o.temp <= 0)]:
        raise InputError(f"{name} samples no tokens: {', '.join(flags)} would have no effect")
