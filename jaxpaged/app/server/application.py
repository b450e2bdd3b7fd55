"""The ASGI application: routes, error handlers, middlewares."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from jaxpaged import __version__
from jaxpaged.app.server import (
    agent_routes,
    embedding_routes,
    errors,
    infill_routes,
    info_routes,
    native_routes,
    openai_routes,
    security,
    slot_routes,
)
from jaxpaged.app.server.hosting import HoldModels
from jaxpaged.app.server.page_routes import page_routes
from jaxpaged.app.server.runner import EngineFailedError
from jaxpaged.app.server.state import ServerState
from jaxpaged.engine.request import RefusedError

_LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"
"""Origins of ``--cors-origins localhost``, as in llama-server."""


def create_application(state: ServerState) -> FastAPI:
    """The ASGI application of a server. It answers 503 until ``state`` has a model and a runner.

    Pages of other sites are refused unless ``--cors-origins`` names them: any page that is open in
    a browser can reach a server on the same machine, which often has no key.
    """
    options = state.options
    app = FastAPI(
        title="jaxpaged",
        version=__version__,
        docs_url=None,  # FastAPI's own pages load scripts from other sites
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state
    public = set(security.PUBLIC_PATHS)
    for module in (
        openai_routes,
        agent_routes,
        embedding_routes,
        infill_routes,
        native_routes,
        slot_routes,
        info_routes,
    ):
        app.include_router(module.router)
    if options.webui:
        pages = page_routes()
        app.router.routes.extend(pages)
        public |= {route.path for route in pages}
    app.add_exception_handler(RefusedError, errors.handle_refused)
    app.add_exception_handler(EngineFailedError, errors.handle_refused)
    app.add_exception_handler(RequestValidationError, errors.handle_validation)
    app.add_exception_handler(HTTPException, errors.handle_http)
    app.add_exception_handler(Exception, errors.handle_bug)
    # The middleware added last is the outermost.
    app.add_middleware(HoldModels, host=lambda: state.host)
    app.add_middleware(security.HeadAsGet)
    app.add_middleware(security.LimitBody, limit=options.max_body)
    app.add_middleware(security.RequireKey, keys=options.api_keys, public=public)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin for origin in options.cors_origins if origin != "localhost"],
            allow_origin_regex=_LOCAL if "localhost" in options.cors_origins else None,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's JavaScript client sends headers of its own (x-stainless-...)
        )
    app.add_middleware(security.LimitHeaders)
    app.add_middleware(security.CountErrors, metrics=state.metrics)
    return app
