"""Routes of the slots: their state, and slot files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import json_response
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.native_answers import settings
from jaxpaged.app.server.native_schema import SlotFile
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.state import state_of
from jaxpaged.engine.request import RefusedError
from jaxpaged.engine.slot_files import SlotTransfer
from jaxpaged.engine.stats import SlotState

router = APIRouter(route_class=StrictRoute)


class SlotEngine(Protocol):
    """Protocol of the engine's slot files."""

    def save_slot(self, slot: int, path: Path) -> SlotTransfer: ...
    def restore_slot(self, slot: int, path: Path) -> SlotTransfer: ...
    def erase_slot(self, slot: int) -> int: ...


@router.get("/slots")
async def slots(request: Request, fail_on_no_slot: str | None = None) -> Response:
    """State of each slot, without prompts, which may be another client's."""
    state = state_of(request)
    if not state.options.slots:
        raise ApiError(501, "This server does not support slots endpoint. Start it with `--slots`")
    state.look_at(request.query_params.get("model"))
    _, runner = state.ready()
    states = runner.slot_states()
    if fail_on_no_slot is not None and all(state.is_processing for state in states):
        raise ApiError(503, "no slot available")
    return json_response([_slot(state) for state in states])


def _slot(state: SlotState) -> dict[str, Any]:
    slot: dict[str, Any] = {
        "id": state.id,
        "id_task": int(state.request_id) if state.request_id and state.request_id.isdecimal() else -1,
        "n_ctx": state.n_ctx,
        "speculative": False,
        "is_processing": state.is_processing,
        "n_prompt_tokens": state.num_prompt,
        "n_prompt_tokens_processed": min(state.num_computed, state.num_prompt),
    }
    if state.is_processing and state.params is not None:
        limit = state.params.max_new_tokens
        slot["params"] = settings(state.params)
        slot["next_token"] = [
            {
                "has_next_token": True,
                "n_remain": -1 if limit is None else max(0, limit - state.num_generated),
                "n_decoded": state.num_generated,
            }
        ]
    return slot


@router.post("/slots/{id_slot}")
async def slot_action(
    request: Request,
    id_slot: int,
    action: Literal["save", "restore", "erase"],
    body: SlotFile | None = None,
) -> Response:
    """Saves, restores or erases a slot."""
    state = state_of(request)
    folder = state.options.slot_save_path
    if folder is None:
        raise ApiError(501, "This server does not support slots action. Start it with `--slot-save-path`")
    _, runner = await state.enter(request.query_params.get("model"))
    if not 0 <= id_slot < runner.max_seqs:
        raise ApiError(400, f"Invalid slot ID; there are 0 to {runner.max_seqs - 1}", param="id_slot")
    if action == "erase":
        erased = await runner.call(lambda engine: _erase(engine, id_slot))
        return json_response({"id_slot": id_slot, "n_erased": erased})
    if body is None or body.filename is None:
        raise ApiError(400, "missing parameter: 'filename'", param="filename")
    path = folder / body.filename
    start = time.perf_counter()
    try:
        transfer = await runner.call(_transfer(action, id_slot, path))
    except RefusedError:
        raise
    except FileNotFoundError:
        raise ApiError(400, f"there is no file {body.filename!r}", param="filename") from None
    except (OSError, ValueError) as error:  # a full disk, or a file of another model
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        reason = reason.removeprefix(f"{path}: ")  # the client need not know the server's folders
        raise ApiError(400, f"{body.filename}: {reason}"[:500], param="filename") from None
    milliseconds = 1e3 * (time.perf_counter() - start)
    count, size = ("n_saved", "n_written") if action == "save" else ("n_restored", "n_read")
    return json_response(
        {
            "id_slot": id_slot,
            "filename": body.filename,
            count: transfer.num_tokens,
            size: transfer.num_bytes,
            "timings": {f"{action}_ms": milliseconds},
        }
    )


def _erase(engine: SlotEngine, slot: int) -> int:
    return engine.erase_slot(slot)


def _transfer(action: str, slot: int, path: Path) -> Callable[[SlotEngine], SlotTransfer]:
    def run(engine: SlotEngine) -> SlotTransfer:
        return engine.save_slot(slot, path) if action == "save" else engine.restore_slot(slot, path)

    return run
