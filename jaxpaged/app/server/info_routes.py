"""Routes about the server: health, models, properties, pool, metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import json_response
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.metrics import CONTENT_TYPE
from jaxpaged.app.server.native_answers import settings
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.sampling_schema import SamplingFields, engine_request
from jaxpaged.app.server.state import ServedModel, ServerState, state_of

router = APIRouter(route_class=StrictRoute)


@router.get("/health")
@router.get("/v1/health")
async def health(request: Request) -> Response:
    """Health check; like the page, it needs no key."""
    state_of(request).accepting()
    return json_response({"status": "ok"})


@router.get("/v1/models")
@router.get("/models")
async def models(request: Request) -> Response:
    """List of models, with one entry."""
    state = state_of(request)
    model, _ = state.ready()
    return json_response({"object": "list", "data": [_model(state, model)]})


@router.get("/v1/models/{model_id:path}")
async def one_model(request: Request, model_id: str) -> Response:
    """The model, by one of its names."""
    state = state_of(request)
    model, _ = state.ready()
    if model_id not in model.names:
        raise ApiError(
            404, f"there is no model of that name; this server has {model.names[0]!r}", param="model"
        )
    return json_response(_model(state, model))


def _model(state: ServerState, model: ServedModel) -> dict[str, Any]:
    _, runner = state.ready()
    return {
        "id": model.names[0],
        "object": "model",
        "created": int(state.started),
        "owned_by": "jaxpaged",
        "aliases": list(model.names),
        "max_model_len": runner.n_ctx,
        "meta": {
            "n_vocab": model.tokenizer.vocab_size,
            "n_ctx_train": model.trained_context,
            "n_ctx": runner.n_ctx,
            "size": model.size_bytes,
            "description": model.description,
        },
    }


@router.get("/props")
async def props(request: Request) -> Response:
    """The server's properties."""
    state = state_of(request)
    model, runner = state.ready()
    o = state.options
    # The defaults of an empty request.
    nothing = engine_request("props", (0,), SamplingFields(), o, model.tokenizer, seed=0)
    params = settings(nothing, breakers=o.dry_sequence_breakers) | {
        "seed": o.seed % 2**32,
        "n_keep": o.keep,
        "ignore_eos": o.ignore_eos,
    }
    return json_response(
        {
            "default_generation_settings": {
                "id": 0,
                "id_task": -1,
                "n_ctx": runner.n_ctx,
                "speculative": False,
                "is_processing": False,
                "params": params,
            },
            "total_slots": runner.max_seqs,
            "model_path": model.path,
            "model_alias": model.names[0],
            "chat_template": model.chat_template,
            "chat_template_is_fallback": not model.template_is_its_own,
            "modalities": {"vision": False, "audio": False},
            "build_info": state.build,
            "is_sleeping": False,
        }
    )


@router.post("/props")
async def change_props(request: Request) -> Response:
    """llama-server's route to change properties, of which neither server has any."""
    if not state_of(request).options.props:
        raise ApiError(
            501, "This server does not support changing global properties. Start it with `--props`"
        )
    return json_response({"success": True})


@router.get("/pool")
async def pool_of_pages(request: Request) -> Response:
    """State of each page of the pool, for the page in the browser."""
    state = state_of(request)
    _, runner = state.ready()
    pool, stats = runner.pool_state(), runner.stats()
    generated, prompt = state.rates.update(time.monotonic(), stats.generated_tokens, stats.prompt_tokens)
    return json_response(
        {
            "num_pages": pool.num_pages,
            "page_size": pool.page_size,
            "bytes_per_page": stats.bytes_per_page,
            "groups": [
                {"layers": group.layers, "window": group.window, "num_pages": group.pages_total}
                for group in stats.groups
            ],
            "state": (pool.state + ord("0")).tobytes().decode(),
            "owner": pool.owner.tolist(),
            "sequences": pool.sequences,
            "running": stats.running,
            "waiting": stats.waiting,
            "pages_used": stats.pages_used,
            "pages_cached": stats.pages_cached,
            "pages_free": stats.pages_free,
            "waste": stats.waste,
            "tokens_per_second": generated,
            "prompt_tokens_per_second": prompt,
            "prefix_hit_rate": stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0,
            "preemptions": stats.preemptions,
            "uptime": time.time() - state.started,
        }
    )


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    state = state_of(request)
    if not state.options.metrics:
        raise ApiError(501, "This server does not support metrics endpoint. Start it with `--metrics`")
    headers = {"Content-Type": CONTENT_TYPE, "Process-Start-Time-Unix": str(int(state.started))}
    return Response(state.metrics.text(), headers=headers)
