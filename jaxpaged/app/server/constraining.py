"""Constraints of a request: its schema or grammar, its tools, and the budget of its thoughts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from jaxpaged_model.text.chat_format import ChatFormat
from jaxpaged_model.text.grammar import Grammar, GrammarError
from jaxpaged_model.text.thinking import Thinking
from jaxpaged_model.text.tokenizer import Tokenizer

from jaxpaged.app.server.conversation import Conversation, thinks
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.openai_schema import ChatRequest
from jaxpaged.app.server.sampling_schema import SamplingFields
from jaxpaged.app.server.state import ServedModel, ServerState
from jaxpaged.engine.constraint import Constraint

_COMPILE_SECONDS = 20.0
"""Time limit of a grammar's compilation; llguidance's own limits end it long before."""


async def constraint_of(model: ServedModel, fields: SamplingFields) -> Constraint | None:
    """The constraint of a request for a completion.

    Raises:
      ApiError: a schema or grammar that is none.
    """
    if fields.format is None:
        return None
    grammar = await _in_thread(_grammar, model.tokenizer, *fields.format)
    return grammar.matcher()


async def chat_constraint(
    state: ServerState, model: ServedModel, body: ChatRequest, conversation: Conversation
) -> Constraint | None:
    """The constraint of a chat: thoughts first, then the answer's format, or calls of tools.

    Raises:
      ApiError: a schema or grammar that is none.
    """
    answer: Any = None
    tokenizer, chat_format = model.tokenizer, conversation.format
    if conversation.tools and body.tool_choice != "none" and (chat_format.calls or chat_format.is_harmony):
        answer = await _in_thread(_of_tools, tokenizer, body, conversation)
    elif body.format is not None:
        answer = (await _in_thread(_grammar, tokenizer, *body.format)).matcher()
    budget = state.options.reasoning_budget if body.reasoning_budget is None else body.reasoning_budget
    if chat_format.reasoning is None or (answer is None and budget < 0):
        return answer
    opening, closing = (marker.strip() for marker in chat_format.reasoning)
    begun = chat_format.thinks(conversation.text)
    if thinks(state, body) is False and not begun:
        return answer
    return Thinking(
        opening=tuple(marker_tokens(tokenizer, opening)),
        closing=tuple(marker_tokens(tokenizer, closing)),
        close=closing.encode(),
        token_bytes=tokenizer.token_bytes,
        thinks=begun,
        budget=budget if budget >= 0 else None,
        answer=answer,
        stops=tuple(tokenizer.stop_ids) if answer is not None and answer.is_active else (),
    )


def marker_tokens(tokenizer: Tokenizer, marker: str) -> list[int]:
    """Token ids of a marker within an answer."""
    return tokenizer.encode(marker, add_special=False, parse_special=True)


async def _in_thread(make: Any, *arguments: Any) -> Any:
    """Makes a grammar beside the event loop; its errors are the client's."""
    try:
        async with asyncio.timeout(_COMPILE_SECONDS):
            return await asyncio.to_thread(make, *arguments)
    except GrammarError as error:
        raise ApiError(400, str(error)) from None
    except TimeoutError:
        raise ApiError(400, f"the grammar takes more than {_COMPILE_SECONDS:g} seconds to compile") from None


def _grammar(tokenizer: Tokenizer, kind: str, value: Any) -> Grammar:
    make: dict[str, Callable[[Any, Tokenizer], Grammar]] = {
        "json": Grammar.from_json_schema,
        "gbnf": Grammar.from_gbnf,
        "regex": Grammar.from_regex,
        "choice": Grammar.from_choices,
    }
    return make[kind](value, tokenizer)


def _of_tools(tokenizer: Tokenizer, body: ChatRequest, conversation: Conversation) -> Constraint | None:
    """A matcher of calls: from the beginning if a call is required, else from its marker on."""
    chosen, chat_format = body.chosen_function, conversation.format
    tools = [tool for tool in conversation.tools if chosen in (None, tool["function"]["name"])]
    must = chosen is not None or body.tool_choice == "required"
    if not must and chat_format.trigger is None:
        return None  # calls begin like any text
    parallel = body.parallel_tool_calls is not False and chosen is None
    try:
        grammar = _calls(tokenizer, chat_format, tools, body, parallel=parallel, must=must)
    except GrammarError:
        # A schema that cannot be enforced: only strict functions ask for that.
        if any(tool["function"].get("strict") for tool in tools):
            raise
        grammar = _calls(tokenizer, chat_format, tools, body, parallel=parallel, must=must, strict=False)
    if must or body.format is not None:
        return grammar.matcher()
    assert chat_format.trigger is not None
    return grammar.matcher([chat_format.trigger])


def _calls(
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    tools: Sequence[dict[str, Any]],
    body: ChatRequest,
    *,
    parallel: bool,
    must: bool,
    strict: bool = True,
) -> Grammar:
    """The grammar of calls, or of calls or an answer in the format of ``response_format``."""
    special = {
        tokenizer.token_bytes(token).decode(errors="replace"): token for token in tokenizer.special_ids
    }
    stops = [tokenizer.token_bytes(token).decode(errors="replace") for token in sorted(tokenizer.stop_ids)]
    source = chat_format.call_grammar(tools, parallel=parallel, special=special, stops=stops, strict=strict)
    if not must and body.format is not None:
        kind, value = body.format
        if kind != "json":
            raise ApiError(
                400, "tools and a grammar exclude each other; give tools and a JSON schema, or one of them"
            )
        source = f"start: calls | answer\nanswer: %json {json.dumps(value)}\n" + source.replace(
            "start:", "calls:", 1
        )
    return Grammar.from_lark(source, tokenizer)
