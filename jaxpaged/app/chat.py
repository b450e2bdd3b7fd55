"""``jaxpaged generate -cnv``: a chat on one cache; each message prefills only what is new."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import click
import jax
import jax.numpy as jnp
from jaxpaged_model.text.chat import BUILTIN_TEMPLATES, ChatTemplateError, render_chat

from jaxpaged.app import interrupt
from jaxpaged.app.errors import InputError, say
from jaxpaged.app.options import RunFlags
from jaxpaged.app.output import print_json
from jaxpaged.app.prompt import read_text, unescape
from jaxpaged.app.prompt_cache import PromptCache
from jaxpaged.app.session import Session
from jaxpaged.generation.result import FINISH_NAN, FINISH_STOP


def template_of(options: RunFlags, model_template: str | None) -> str | None:
    """Source of the chat template that the flags name, else the model's; None if there is neither."""
    if options.chat_template is not None and options.chat_template_file is not None:
        raise InputError("--chat-template and --chat-template-file both give a template; give one of them")
    if options.chat_template_file is not None:
        return read_text("--chat-template-file", options.chat_template_file)
    name = options.chat_template
    if name is None:
        return model_template
    if name in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[name]
    if "{" in name:
        return name
    raise InputError(
        f"--chat-template {name!r} is neither Jinja source nor one of {', '.join(BUILTIN_TEMPLATES)}"
    )


def run(session: Session, prompt: str | None, template: str) -> int:
    """Answers messages until the input ends; the exit status.

    Ctrl-C during an answer ends the answer; a second one, or one at the prompt, ends the chat.
    """
    options = session.options
    interactive = sys.stdin.isatty() and not options.as_json
    once = options.single_turn or options.as_json
    if interactive:
        interrupt.defer()
        session.note("chat: Ctrl-C ends an answer, Ctrl-D the chat")
    plan = session.plan(session.context, num_seqs=1)
    cache = plan.create()
    kept = PromptCache.open(session)
    held: list[int] = []  # tokens in the cache, and those that context shifts discarded
    shift = None
    messages: list[dict[str, str]] = []
    if options.system is not None:
        system = unescape(options.system) if options.escape else options.system
        messages.append({"role": "system", "content": system})
    last = None
    status = 0
    try:
        for message in _messages(prompt, interactive):
            messages.append({"role": "user", "content": message})
            ids = _tokens(session, template, messages)
            try:
                shared = reusable_tokens(held, ids, by=plan.page_size if plan.cache_type.has_residual else 1)
                if options.context_shift:  # discarded tokens are no prefix of another text
                    shared = shared if shared == len(held) else 0
                    shift = shift or session.context_shift(ids)
                    session.check_prompt(ids[shared:])
                else:
                    session.check_prompt(ids)
                    plan.check_prompt(len(ids))
            except InputError as error:
                if interactive:
                    say(f"error: {error.message}")
                    messages.pop()
                    continue
                if last is None:
                    raise
                # The answers so far are the result; llama.cpp's chat ends here too.
                session.note(f"the chat ends: {error.message}")
                break
            if shared < len(held):
                cache, kept_any = _truncate(cache, shared)
                shared = shared if kept_any else 0
            if kept is not None and last is None:
                cache, shared = kept.reuse(cache, ids)
            decoder = session.ready.loaded.tokenizer.stream(at_start=False)
            answer: list[str] = []

            def show(tokens: list[list[int]], decoder=decoder, answer=answer) -> None:  # type: ignore[no-untyped-def]
                text = "".join(map(decoder.push, tokens[0]))
                answer.append(text)
                if not options.as_json:
                    click.echo(text, nl=False)

            last = session.run(
                cache,
                [ids[shared:]],
                max_new_tokens=session.new_tokens(len(ids)),
                keep=True,
                context_shift=shift,
                history=ids[:shared],
                on_prompt=partial(kept.save_prompt, ids=ids) if kept is not None and last is None else None,
                on_tokens=show,
            )
            answer.append(decoder.flush())
            if options.as_json:
                print_json(session, ids, last, plan)
            else:
                click.echo(answer[-1])
            messages.append({"role": "assistant", "content": "".join(answer)})
            known = ids + last.tokens[0]
            cache = last.cache
            if shift is None or int(cache.lengths[0]) == 0:
                held = known[: int(cache.lengths[0])]
            else:  # the newest token is not in the cache, unless it ended the answer
                held = known if last.finish_reason[0] == FINISH_STOP else known[:-1]
            if interactive and options.perf and options.log and last.tokens[0]:
                numbers = last.timings.as_dict()
                prompt_rate, rate = numbers["prompt_per_second"], numbers["predicted_per_second"]
                click.echo(f"[ Prompt: {prompt_rate:.1f} t/s | Generation: {rate:.1f} t/s ]", err=True)
            if last.interrupted and (once or not interactive):
                status = interrupt.STATUS
                break
            if once or FINISH_NAN in last.finish_reason:
                break
    except KeyboardInterrupt:
        status = interrupt.STATUS
    if interactive:
        click.echo(err=True)
    if kept is not None and last is not None:
        kept.save_all(cache, held)
    session.write_page_map()
    session.print_report(plan, last)
    if last is not None:
        session.refuse_nan(last)
    return status


def _messages(first: str | None, interactive: bool) -> Iterator[str]:
    """Messages of the user: the prompt, then each line of stdin that is not blank."""
    if interactive:
        with suppress(ImportError):  # line editing and history for `input`; Windows' console has its own
            import readline  # noqa: F401
    if first:
        yield first
    while True:
        if interactive:
            try:
                with interrupt.raising():
                    line = _ask()
            except EOFError:
                return
        else:
            line = sys.stdin.readline()
            if not line:
                return
        if line.strip():
            yield line.removeprefix("\ufeff").rstrip("\n")


def _ask() -> str:
    """Reads a line from the terminal; the prompt sign goes to stderr if stdout is redirected."""
    click.echo(err=True)
    if sys.stdout.isatty():
        return input("> ")
    click.echo("> ", nl=False, err=True)
    return input()


def _tokens(session: Session, template: str, messages: list[dict[str, str]]) -> list[int]:
    tokenizer = session.ready.loaded.tokenizer

    def name(token: int | None) -> str:
        return "" if token is None else tokenizer.token_bytes(token).decode(errors="replace")

    bos = name(tokenizer.bos_id)
    try:
        text = render_chat(template, messages, bos_token=bos, eos_token=name(tokenizer.eos_id))
    except ChatTemplateError as error:
        raise InputError(str(error)) from error
    return session.encode(text, add_special=not (bos and text.startswith(bos)))


def reusable_tokens(held: list[int], ids: list[int], by: int = 1) -> int:
    """Number of cached tokens that are a prefix of ``ids``; at least one of ``ids`` is left to compute.

    If cached tokens have to be removed, a multiple of ``by`` is kept: a finalized page is not written again.
    """
    limit = min(len(held), len(ids) - 1)
    found = next((i for i in range(limit) if held[i] != ids[i]), limit)
    return found if found == len(held) else found - found % by


@jax.jit(donate_argnums=0)
def _truncate(cache, length):  # type: ignore[no-untyped-def]
    """Removes all but the first ``length`` tokens, or all where windows no longer hold what lies before
    the next one: ``(cache, ok bool[])``. The cache is donated."""
    cache, ok = cache.seq_remove(0, length, -1)
    return cache.seq_remove(~ok & (jnp.arange(cache.max_seqs) == 0))[0], ok
