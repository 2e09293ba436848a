"""The HTTP servers: paths, authentication, errors.

Needs fastapi. What paths answer is in `openai_api.py`, `megatron_api.py` and `run_api.py`; the files of the page are in
`page_files.py`.
"""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from internlm.serve.foreign_sites import refuse_foreign_sites
from internlm.serve.megatron_api import MegatronApi
from internlm.serve.openai_api import OpenAiApi
from internlm.serve.page_files import page_files
from internlm.serve.requests import RequestError
from internlm.serve.run_api import RunApi
from internlm.serve.run_folder import RunFolder
from internlm.serve.served_model import ServedModels


def create_app(models: ServedModels, run: RunFolder | None = None) -> FastAPI:
    """The application of language models, and of the run that its page shows; the caller closes their engines."""
    openai, megatron = OpenAiApi(models), MegatronApi(models)
    app = _create_page(models.settings.api_key, RunApi(run), openai.cards)
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


def create_run_app(run: RunFolder, api_key: str | None) -> FastAPI:
    """The application that shows a run, without a model."""
    return _create_page(api_key, RunApi(run), list)


def _create_page(api_key: str | None, run: RunApi, cards: Any) -> FastAPI:
    """An application with the page and what all paths share; `cards()` describes the models."""
    app = FastAPI(title="internlm", docs_url=None, redoc_url=None, openapi_url=None)
    files = page_files()

    @app.middleware("http")
    async def answer_files_and_check_sender(request: Request, call_next: Any) -> Any:
        path = request.scope["path"]
        if request.method in ("GET", "HEAD") and path in files:
            return files[path]
        try:
            _check_sender(request, api_key)
        except RequestError as error:
            return _error(error)
        return await call_next(request)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_query(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _error(RequestError(f"{first['loc'][-1]}: {first['msg']}", str(first["loc"][-1])))

    @app.exception_handler(HTTPException)
    async def no_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _error(RequestError(message, status=error.status_code))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return _error(RequestError(f"the server failed ({type(error).__name__}); its log says more", status=500))

    async def overview() -> dict[str, Any]:
        return {"models": cards(), "run": run.name()}

    app.get("/overview")(overview)
    app.get("/run/curves")(run.curves)
    app.get("/run/layout")(run.layout)
    return app


def _check_sender(request: Request, api_key: str | None) -> None:
    """Refuse who has not the key, or, where there is none, pages of other sites."""
    if api_key is None:
        refuse_foreign_sites(request)
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        raise RequestError("the key is missing or wrong: Authorization: Bearer KEY", status=401)


def _error(error: RequestError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)
