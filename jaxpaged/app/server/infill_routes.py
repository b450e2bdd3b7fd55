"""``/infill``: text between a prefix and a suffix, for models with tokens for that."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import respond
from jaxpaged.app.server.constraining import constraint_of
from jaxpaged.app.server.embedding_schema import InfillChunk
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.generation import Generation
from jaxpaged.app.server.native_answers import NativeAnswer
from jaxpaged.app.server.native_schema import Mixed, NativeRequest
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.app.server.prompts import check_prompt, encode_mixed
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.state import ServedModel, state_of

router = APIRouter(route_class=StrictRoute)

_SNIPPET = "\n\n--- snippet ---\n\n"
"""Between parts of other files, where the vocabulary has no token for that; llama-server's."""


class InfillRequest(NativeRequest):
    """``POST /infill``."""

    prompt: str | Mixed = ""
    """Beginning of the text to fill in."""
    input_prefix: str | Mixed
    input_suffix: str | Mixed
    input_extra: Annotated[list[InfillChunk], Field(max_length=256)] = Field(default_factory=list)
    """Parts of other files."""


@router.post("/infill")
async def infill(request: Request, body: InfillRequest) -> Response:
    """Fills a gap; the response is that of ``/completion``."""
    state = state_of(request)
    model, runner = await state.enter(body.model)
    if not model.tokenizer.fim_ids:
        raise ApiError(501, "this model has no tokens for filling a gap (prefix, suffix and middle)")
    ids = await _prompt(model, body, runner.n_ctx, state.options)
    check_prompt(model, ids)
    generation = Generation(state, [ids], body, constraint=await constraint_of(model, body))
    return await respond(
        request, generation, NativeAnswer(state, model, generation, body), stream=body.stream
    )


async def _prompt(model: ServedModel, body: InfillRequest, n_ctx: int, options: ServeOptions) -> list[int]:
    """Tokens of a gap in llama-server's order: other files, prefix, suffix, the beginning of the gap.

    As there, a prefix has its last tokens and a suffix its first ones, three to one, of a step's.
    """
    fim, tokenizer = model.tokenizer.fim_ids, model.tokenizer

    async def plain(text: str | Mixed) -> list[int]:
        parts = [text] if isinstance(text, str) else text
        return await encode_mixed(model, parts, add_special=False, parse_special=False)

    prefix, suffix, begun = [
        await plain(text) for text in (body.input_prefix, body.input_suffix, body.prompt)
    ]
    quarter = options.step_tokens // 4
    prefix = prefix[len(prefix) - min(len(prefix), 3 * quarter) :]
    suffix = suffix[: max(0, quarter - 2 - len(begun))]
    extra: list[int] = []
    if "rep" in fim:
        extra += [fim["rep"], *await plain("myproject\n")]
    for chunk in body.input_extra:
        extra += [fim["sep"], *await plain(chunk.filename + "\n")] if "sep" in fim else await plain(_SNIPPET)
        extra += await plain(chunk.text)
    if "sep" in fim:
        extra += [fim["sep"], *await plain("filename\n")]
    room = max(0, n_ctx - options.step_tokens - 2 * (body.limit or 0))
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    extra = extra[max(0, len(extra) - room) :]
    return [*extra, *bos, fim["pre"], *prefix, *begun, fim["suf"], *suffix, fim["mid"]]
