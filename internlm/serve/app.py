"""The HTTP server in front of one language model: paths, authentication, errors.

Needs fastapi. What paths answer is in `openai_api.py` and `megatron_api.py`.
"""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from internlm.serve.engine_thread import EngineThread
from internlm.serve.megatron_api import MegatronApi
from internlm.serve.openai_api import OpenAiApi
from internlm.serve.requests import RequestError
from internlm.serve.served_model import ServedModel, ServerSettings


def create_app(engine: EngineThread, settings: ServerSettings) -> FastAPI:
    """The application of a language model; the caller closes the engine."""
    app = FastAPI(title="internlm", docs_url=None, redoc_url=None, openapi_url=None)
    served = ServedModel(engine, settings)
    openai, megatron = OpenAiApi(served), MegatronApi(served)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Any:
        if settings.api_key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), settings.api_key.encode()):
                return _error(RequestError("the key is missing or wrong: Authorization: Bearer KEY", status=401))
        return await call_next(request)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> JSONResponse:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def no_path(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _error(RequestError(message, status=error.status_code))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return _error(RequestError(f"the server failed ({type(error).__name__}); its log says more", status=500))

    app.get("/health")(openai.health)
    app.get("/v1/models")(openai.models)
    app.get("/v1/models/{name}")(openai.model)
    app.post("/v1/completions", response_model=None)(openai.completions)
    app.post("/v1/chat/completions", response_model=None)(openai.chat_completions)
    app.post("/tokenize")(openai.tokenize)
    app.post("/detokenize")(openai.detokenize)
    app.get("/tokenizer_info")(openai.tokenizer_info)
    app.put("/api")(megatron.generate)
    return app


def _error(error: RequestError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)
