"""The application: which path is answered by what."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hsai.serve.chat import read_chat_request
from hsai.serve.completion import read_completion_request
from hsai.serve.errors import ApiError, confess, refuse_model
from hsai.serve.gate import Gate
from hsai.serve.generate import Generate
from hsai.serve.linger import Linger
from hsai.serve.metrics import Metrics
from hsai.serve.respond import ErrorResponse, ObjectResponse
from hsai.serve.served import Limits, Served

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(served: Served, limits: Limits, *, api_key: str | None = None) -> ASGIApp:
    """The application that serves a model; with a key, only to those who send it."""
    metrics = Metrics(served.service)
    model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "hsai"}
    page, page_headers = read_page()

    async def show_page(request: Request) -> Response:
        return Response(page, headers=page_headers)

    async def tell_health(request: Request) -> Response:
        healthy = served.service.healthy
        return ObjectResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    async def tell_metrics(request: Request) -> Response:
        return Response(metrics.write(), headers={"content-type": METRICS_TYPE})

    async def list_models(request: Request) -> Response:
        return ObjectResponse({"object": "list", "data": [model]})

    async def tell_model(request: Request) -> Response:
        if request.path_params["name"] != served.name:
            raise refuse_model(request.path_params["name"], served.name)
        return ObjectResponse(model)

    async def refuse_embeddings(request: Request) -> Response:
        raise ApiError(404, "embeddings are not served: this model makes text", code="unsupported_endpoint")

    routes = [
        Route("/", show_page),
        Route("/health", tell_health),
        Route("/metrics", tell_metrics),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", tell_model),
        Route("/v1/embeddings", refuse_embeddings, methods=["GET", "POST"]),
    ]
    for path, read in (
        ("/v1/chat/completions", read_chat_request),
        ("/v1/completions", read_completion_request),
    ):
        routes.append(Route(path, Generate(read, served, limits, metrics.observe), methods=["POST"]))
    handlers = {ApiError: _respond, HTTPException: _respond_as_http, Exception: _respond_to_defect}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    app.router.redirect_slashes = False
    return Linger(Gate(app, metrics, api_key))


def read_page() -> tuple[bytes, dict[str, str]]:
    """The chat page, and headers that let it run its own style and script, ask this server, and nothing else."""
    page = Path(__file__).with_name("page.html").read_bytes()
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    rules += ["frame-ancestors 'none'", "img-src data:"]
    for tag in (b"style", b"script"):
        (content,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        rules.append(f"{tag.decode()}-src 'sha256-{digest}'")
    return page, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(rules),
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


async def _respond(request: Request, error: ApiError) -> Response:
    return ErrorResponse(error)


async def _respond_as_http(request: Request, error: HTTPException) -> Response:
    """Of Starlette's: no such path, or not by this method."""
    valid = f"; valid: {error.headers['Allow']}" if error.headers and "Allow" in error.headers else ""
    message = f"{request.method} {request.url.path[:200]}: {error.detail}{valid}"
    return ErrorResponse(ApiError(error.status_code, message, code="unknown_url", headers=error.headers))


async def _respond_to_defect(request: Request, error: Exception) -> Response:
    """Starlette raises the error again behind this, so that it stands in the log."""
    return ErrorResponse(confess())
