"""``jaxpaged generate``: continue a prompt once or several times, or chat."""

from __future__ import annotations

import sys
from functools import partial

import click

from jaxpaged.app import beams, chat, interrupt, processes
from jaxpaged.app.errors import InputError, out_of_memory_is_input
from jaxpaged.app.methods import check_methods
from jaxpaged.app.options import GenerateOptions
from jaxpaged.app.output import print_json, text_of
from jaxpaged.app.prompt import read_prompt
from jaxpaged.app.prompt_cache import PromptCache
from jaxpaged.app.session import Session
from jaxpaged.sharding.multihost import broadcast_object

_NO_PROMPT = "no prompt: give -p TEXT, -f FILE (-f - for stdin), or -cnv to chat"
_EMBEDDED_CHAT = (
    "the embedded model continues Python code and cannot chat: try -p 'class Counter:' -n 64; "
    "-m FILE or -hf USER/REPO names a model that can (--chat-template chatml makes this one try)"
)


def run(options: GenerateOptions) -> int:
    """Runs the command; the exit status.

    Raises:
      InputError: flags, a prompt or a model that cannot be used.
    """
    prompt = broadcast_object(read_prompt(options) if processes.is_main() else None)
    wants_chat = options.conversation
    if wants_chat is None and (options.system is not None or options.single_turn):
        wants_chat = True
    if prompt is None and (
        wants_chat is False or options.as_json or (not wants_chat and not sys.stdin.isatty())
    ):
        raise InputError(_NO_PROMPT)
    if wants_chat is not False and prompt is None and processes.count() > 1:
        raise InputError(
            "a run of several processes continues one prompt (-p, -f); to chat with it, serve it"
        )
    if wants_chat and options.parallel > 1:
        raise InputError(f"-np {options.parallel}: a chat has one sequence")
    check_methods(options, prompted=prompt is not None and not wants_chat)
    with out_of_memory_is_input("a smaller -c, -np or --kv-pages needs less"):
        session = Session.open(options)
        template = chat.template_of(options, session.ready.loaded.tokenizer.chat_template)
        if prompt is None or wants_chat:
            if template is None and options.model is None and options.hf is None:
                raise InputError(_EMBEDDED_CHAT)
            if template is None:
                advice = (
                    "name one with --chat-template, such as chatml, or give a prompt to continue (-p, -f)"
                )
                raise InputError(f"this model has no chat template; {advice}")
            return chat.run(session, prompt, template)
        return beams.complete(session, prompt) if options.beams > 1 else complete(session, prompt)


def complete(session: Session, prompt: str) -> int:
    """Continues the prompt in ``-np`` sequences."""
    options = session.options
    ids, new, plan = session.completion(prompt, options.parallel)
    kept = PromptCache.open(session)
    cache, shared = plan.create(), 0
    if kept is not None:
        cache, shared = kept.reuse(cache, ids)
    echo = prompt if options.display_prompt else ""

    def header(row: int) -> None:
        if options.parallel > 1:
            click.echo(f"=== {row + 1} of {options.parallel}, seed {session.seed_of(row)} ===")
        click.echo(echo, nl=False)

    decoder = session.ready.loaded.tokenizer.stream(at_start=False)

    def show(tokens: list[list[int]]) -> None:
        """Prints the first sequence as it is generated; the others follow at the end."""
        if not options.as_json:
            click.echo("".join(map(decoder.push, tokens[0])), nl=False)

    def start() -> None:
        if not options.as_json:
            header(0)

    result = session.run(
        cache,
        [ids[shared:]],
        max_new_tokens=new,
        samples=options.parallel,
        keep=kept is not None,
        context_shift=session.context_shift(ids),
        history=ids[:shared],
        on_start=start,
        on_prompt=None if kept is None else partial(kept.save_prompt, ids=ids),
        on_tokens=show,
    )
    if options.as_json:
        print_json(session, ids, result, plan)
    else:
        click.echo(decoder.flush())
        for row in range(1, options.parallel):
            header(row)
            click.echo(text_of(session, result.tokens[row]))
    # After the text, which a full disk must not lose.
    if kept is not None:
        kept.save_all(result.cache, ids + result.tokens[0])
    session.write_page_map()
    session.print_report(plan, result)
    session.refuse_nan(result)
    return interrupt.STATUS if result.interrupted else 0
