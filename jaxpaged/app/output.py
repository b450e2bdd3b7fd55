"""Output of a run on stdout."""

from __future__ import annotations

import json
from typing import Any

import click

from jaxpaged.app.kv_report import CachePlan
from jaxpaged.app.run import Run
from jaxpaged.app.session import Session


def text_of(session: Session, tokens: list[int]) -> str:
    """Text of generated tokens."""
    decoder = session.ready.loaded.tokenizer.stream(at_start=False)
    return "".join(map(decoder.push, tokens)) + decoder.flush()


def choices_of(session: Session, run: Run) -> list[dict[str, Any]]:
    """Tokens, text and finish reason of each sequence, for JSON."""
    return [
        {"tokens": tokens, "text": text_of(session, tokens), "finish_reason": run.reason(row)}
        for row, tokens in enumerate(run.tokens)
    ]


def print_json(session: Session, prompt: list[int], run: Run, plan: CachePlan) -> None:
    """Prints one JSON object: the fields of the first sample, and ``choices`` if there are several."""
    choices = choices_of(session, run)
    result: dict[str, Any] = {
        "prompt_tokens": prompt,
        **choices[0],
        "timings": session.timings.as_dict(),
        "kv": session.report(plan).as_dict(),
    }
    if session.options.num_draft:
        result["lookup"] = {"drafted": run.drafted, "accepted": run.accepted}
    if len(choices) > 1:
        result["choices"] = [{"index": i, "seed": session.seed_of(i), **c} for i, c in enumerate(choices)]
    click.echo(json.dumps(result))
