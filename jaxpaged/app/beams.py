"""``jaxpaged generate --beams``: the best continuation of a beam search."""

from __future__ import annotations

import json
import sys
import time

import click
import numpy as np

from jaxpaged.app.output import choices_of, text_of
from jaxpaged.app.run import Run
from jaxpaged.app.session import Session
from jaxpaged.generation.api import beam_request
from jaxpaged.generation.result import FINISH_NAN, BeamResult
from jaxpaged.generation.stream import GenerateStream
from jaxpaged.sharding.mesh import BatchSharding, num_shards


def complete(session: Session, prompt: str) -> int:
    """Continues the prompt and prints the best text when the search has ended; the exit status."""
    o, loaded = session.options, session.ready.loaded
    ids, new, plan = session.completion(prompt, o.beams)
    cache = plan.create()
    request = beam_request(
        cache,
        [ids],
        num_beams=o.beams,
        num_return_sequences=o.beams,
        max_new_tokens=new,
        length_penalty=o.length_penalty,
        stop_ids=sorted(loaded.tokenizer.stop_ids),
        batch_size=o.step_tokens,
    )
    mesh = loaded.mesh
    search = GenerateStream(
        session.model,
        loaded.params,
        cache,
        request,
        num_samples=o.beams,
        every=new,
        sharding=None if mesh is None else BatchSharding(num_shards(mesh), o.beams),
    )
    notice = "searching ..." if o.log and sys.stderr.isatty() else ""
    click.echo(notice, nl=False, err=True)
    start = time.perf_counter()
    if o.warmup:
        search.compile()
    compiled = time.perf_counter()
    chunks = iter(search)
    next(chunks)
    read = time.perf_counter()
    for _ in chunks:
        pass
    result = search.result
    ended = time.perf_counter()
    if notice:
        click.echo("\r\033[K", nl=False, err=True)

    timings, steps = session.timings, int(result.num_steps)
    timings.compile_ms = 1e3 * (compiled - start) if o.warmup else 0.0
    timings.prompt_n, timings.prompt_ms = len(ids), 1e3 * (read - compiled)
    session.end_start(timings, cache_hit=False)
    timings.predicted_n, timings.predicted_ms = steps, 1e3 * (ended - read)
    session.pages_peak = np.asarray(result.pages_peak)
    run, scores = _run_of(result)
    if o.as_json:
        choices = choices_of(session, run)
        document = {
            "prompt_tokens": ids,
            **choices[0],
            "timings": timings.as_dict(),
            "kv": {**session.report(plan).as_dict(), "pages_peak_unshared": int(result.unshared_peak)},
            "complete": bool(result.complete[0]),
            "choices": [{"index": i, "score": scores[i], **choice} for i, choice in enumerate(choices)],
        }
        click.echo(json.dumps(document))
    else:
        click.echo((prompt if o.display_prompt else "") + text_of(session, run.tokens[0]))
    if not bool(result.complete[0]) and FINISH_NAN not in run.finish_reason:
        session.note(
            f"out of pages: the search ends after {steps} tokens a beam, all {plan.num_pages[0]} pages of "
            f"{plan.page_size} tokens are in use (--kv-pages)"
        )
    if o.perf and o.log:
        click.echo(_sharing_line(o.beams, scores[0], result), err=True)
    session.print_report(plan, None)
    session.refuse_nan(run)
    return 0


def _run_of(result: BeamResult) -> tuple[Run, list[float]]:
    """The sequences found, best first, and their scores; one empty sequence if there is none."""
    tokens, counts = np.asarray(result.tokens)[0], np.asarray(result.num_tokens)[0]
    scores = np.asarray(result.score)[0]
    found = max(1, int(np.isfinite(scores).sum()))
    rows = [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
    return Run(rows[:found], np.asarray(result.finish_reason)[0][:found].tolist()), scores[:found].tolist()


def _sharing_line(beams: int, score: float, result: BeamResult) -> str:
    saved = 1 - float(result.pages_mean) / max(1.0, float(result.unshared_mean))
    return (
        f"{'beams':>16} = {beams}, the best scores {score:.4f}; sharing pages saves {saved:.0%} of them on average "
        f"({int(np.sum(result.pages_peak))} instead of {int(result.unshared_peak)} at the peak)"
    )
