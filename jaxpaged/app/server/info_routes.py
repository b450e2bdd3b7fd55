"""Routes about the server: health, models, properties, pool, metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxpaged.app.server.answering import json_response
from jaxpaged.app.server.errors import ApiError
from jaxpaged.app.server.hosting import Hosted
from jaxpaged.app.server.metrics import CONTENT_TYPE
from jaxpaged.app.server.native_answers import settings
from jaxpaged.app.server.native_schema import ModelName
from jaxpaged.app.server.routing import StrictRoute
from jaxpaged.app.server.sampling_schema import SamplingFields, engine_request
from jaxpaged.app.server.state import ServerState, state_of

router = APIRouter(route_class=StrictRoute)


@router.get("/health")
@router.get("/v1/health")
async def health(request: Request) -> Response:
    """Health check; like the page, it needs no key."""
    state = state_of(request)
    if state.draining:
        raise ApiError(503, "the server is shutting down")
    if not state.host.by_name and state.look_at(None).runner is not None:
        state.ready()
    return json_response({"status": "ok"})


@router.get("/v1/models")
@router.get("/models")
async def models(request: Request) -> Response:
    """List of models, with one entry unless there is ``--models-dir``."""
    state = state_of(request)
    if not state.host.by_name:
        state.look_at(None)
    return json_response({"object": "list", "data": [_model(state, hosted) for hosted in state.host.models]})


@router.get("/v1/models/{model_id:path}")
async def one_model(request: Request, model_id: str) -> Response:
    """The model, by one of its names."""
    state = state_of(request)
    hosted = state.look_at(model_id)
    if not state.host.by_name and hosted.model is not None and model_id not in hosted.model.names:
        raise ApiError(
            404, f"there is no model of that name; this server has {hosted.model.names[0]!r}", param="model"
        )
    return json_response(_model(state, hosted))


def _model(state: ServerState, hosted: Hosted) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": hosted.name,
        "object": "model",
        "created": int(state.started),
        "owned_by": "jaxpaged",
        "aliases": [hosted.name],
        "status": hosted.status(),
    }
    model = hosted.model
    if model is None:
        return entry
    return entry | {
        "id": model.names[0],
        "aliases": list(model.names),
        "max_model_len": hosted.n_ctx,
        "meta": {
            "n_vocab": model.tokenizer.vocab_size,
            "n_ctx_train": model.trained_context,
            "n_ctx": hosted.n_ctx,
            "size": model.size_bytes,
            "description": model.description,
        },
    }


@router.post("/models/load")
async def load_model(request: Request, body: ModelName) -> Response:
    """Loads a model, and answers when it is loaded."""
    await _named(request).enter(body.model, loads=True)
    return json_response({"success": True})


@router.post("/models/unload")
async def unload_model(request: Request, body: ModelName) -> Response:
    """Unloads a model that no request uses."""
    host = _named(request).host
    hosted = host.find(body.model)
    if hosted.runner is None:
        raise ApiError(400, f"the model {hosted.name!r} is not loaded", param="model")
    if not hosted.is_idle:
        raise ApiError(409, f"the model {hosted.name!r} is in use by {len(hosted.users)} requests")
    await host.unload(hosted)
    return json_response({"success": True})


def _named(request: Request) -> ServerState:
    state = state_of(request)
    if not state.host.by_name:
        raise ApiError(501, "This server has one model. Start it with `--models-dir` to load others")
    return state


@router.get("/props")
async def props(request: Request) -> Response:
    """The server's properties."""
    state = state_of(request)
    o, name = state.options, request.query_params.get("model")
    about: dict[str, Any] = {}
    if state.host.by_name:
        about = {"role": "router", "max_instances": o.models_max or len(state.host.models)}
        about["models_autoload"] = o.models_autoload
        if name is None and (state.host.only is None or state.host.only.model is None):
            return json_response(about | {"build_info": state.build})
    hosted = state.look_at(name)
    model = hosted.model
    if model is None:
        raise ApiError(400, f"the model {hosted.name!r} is not loaded", param="model")
    # The defaults of an empty request.
    nothing = engine_request("props", (0,), SamplingFields(), o, model.tokenizer, seed=0)
    params = settings(nothing, breakers=o.dry_sequence_breakers) | {
        "seed": o.seed % 2**32,
        "n_keep": o.keep,
        "ignore_eos": o.ignore_eos,
    }
    return json_response(
        about
        | {
            "default_generation_settings": {
                "id": 0,
                "id_task": -1,
                "n_ctx": hosted.n_ctx,
                "speculative": False,
                "is_processing": False,
                "params": params,
            },
            "total_slots": hosted.max_seqs,
            "model_path": model.path,
            "model_alias": model.names[0],
            "chat_template": model.chat_template,
            "chat_template_is_fallback": not model.template_is_its_own,
            "modalities": {"vision": False, "audio": False},
            "build_info": state.build,
            "is_sleeping": hosted.runner is None,
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
    state.look_at(request.query_params.get("model"))
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
    if (name := request.query_params.get("model")) is not None:
        state.look_at(name)
    headers = {"Content-Type": CONTENT_TYPE, "Process-Start-Time-Unix": str(int(state.started))}
    return Response(state.metrics.text(), headers=headers)
