"""An HTTP API that OpenAI's clients understand: `/v1/chat/completions`, whole or streamed, and `/v1/models`.

The models are the adapters. The first, `mmadapter`, is the default: it takes the adapter that suits what comes, an
image or only text. `base` is the model without an adapter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from app.job import Busy, Failure, Job, Update
from app.openai_request import AUTOMATIC, BASE, ApiError, ChatRequest, model_ids, read_jobs, read_request
from app.service import Run, Service
from app.uploads import Limits

OPEN_RUNS = 256  # threads that may wait for a run's next update; the service's own queue is shorter
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for a proxy such as nginx


@dataclass(frozen=True)
class ApiOptions:
    """What the API may do.

    Attributes:
        allow_image_urls: `image_url` may be an http or https address, which this machine then fetches.
    """

    allow_image_urls: bool = False


def error_response(error: ApiError) -> JSONResponse:
    """An error in the shape that OpenAI's clients expect."""
    return JSONResponse(error.body(), error.status, error.headers)


def build_router(service: Service, limits: Limits, options: ApiOptions) -> APIRouter:
    """The routes under /v1.

    Args:
        limits: Of the pictures that are sent.
    """
    router = APIRouter(prefix="/v1")
    started = int(time.time())
    waiting = CapacityLimiter(OPEN_RUNS)

    def model(name: str) -> dict[str, Any]:
        infos = {BASE if info.name == "none" else info.name: info for info in service.adapters}
        sees = any(info.sees for info in service.adapters) if name == AUTOMATIC else infos[name].sees
        title = "the adapter that suits the image or the text" if name == AUTOMATIC else infos[name].title
        about = {"title": title, "modalities": ["text", "image"] if sees else ["text"]}
        return {"id": name, "object": "model", "created": started, "owned_by": "mmadapter", **about}

    @router.get("/models")
    def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model(name) for name in model_ids(service.adapters)]})

    @router.get("/models/{name:path}")
    def one_model(name: str) -> JSONResponse:
        names = model_ids(service.adapters)
        if name not in names:
            message = f"there is no model {name!r}; there are {', '.join(names)}"
            return error_response(ApiError(404, message, "model_not_found", "model"))
        return JSONResponse(model(name))

    @router.post("/chat/completions")
    async def chat_completions(http: Request) -> Response:
        try:
            request = read_request(await http.body())
            jobs = await read_jobs(request, service.adapters, service.default, limits, options.allow_image_urls)
            run = await to_thread.run_sync(_submit, service, jobs)
            if request.stream:
                events = _events(request, len(jobs), run, waiting, service)
                return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)
            return JSONResponse(_whole(request, await _finished(http, run, waiting)))
        except ApiError as error:
            return error_response(error)
        except Failure as failure:
            return error_response(_of_failure(failure))
        except ClientDisconnect:
            raise  # nobody is there to be told
        except Exception as error:  # noqa: BLE001 - the log has what broke, and the client its code
            return error_response(_of_failure(service.failure(error)))

    @router.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    def nothing(http: Request, path: str) -> JSONResponse:
        message = f"there is no {http.method} /v1/{path}; there are POST /v1/chat/completions and GET /v1/models"
        return error_response(ApiError(404, message, "not_found"))

    return router


def _submit(service: Service, jobs: Sequence[Job]) -> Run:
    try:
        return service.run(jobs)
    except Busy as busy:
        seconds = max(1, round(busy.seconds))
        raise ApiError(429, str(busy), "queue_full", headers={"Retry-After": str(seconds)}) from busy
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_value") from error


def _of_failure(failure: Failure) -> ApiError:
    return ApiError(500, str(failure), failure.code)


async def _updates(run: Run, waiting: CapacityLimiter) -> AsyncIterator[Update]:
    """The updates of a run; whoever stops reading cancels it.

    Raises:
        ApiError: The run was cancelled, as all are when the app ends: a text cut short is no answer.
    """
    with run:
        # A thread that still waits for an update is left behind: the run, cancelled here, soon lets it go.
        while (
            update := await to_thread.run_sync(next, run, None, abandon_on_cancel=True, limiter=waiting)
        ) is not None:
            if update.finish == "cancelled":
                raise ApiError(503, "the answer was stopped before its end; ask again", "cancelled")
            yield update


async def _finished(http: Request, run: Run, waiting: CapacityLimiter) -> list[Update]:
    """The last update of every job, in their order. A closed connection cancels the run."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        run.cancel()

    watching = asyncio.create_task(watch())
    done: dict[int, Update] = {}
    try:
        async with contextlib.aclosing(_updates(run, waiting)) as updates:
            async for update in updates:
                done[update.index] = update
    finally:
        watching.cancel()
    return [done[index] for index in sorted(done)]


def _whole(request: ChatRequest, done: Sequence[Update]) -> dict[str, Any]:
    """The answer of a request that does not stream."""
    choices = [
        {
            "index": update.index,
            "message": {"role": "assistant", "content": update.text, "refusal": None},
            "finish_reason": update.finish,
            "logprobs": None,
        }
        for update in done
    ]
    return {**_head(request, "chat.completion"), "choices": choices, "usage": _usage(done)}


async def _events(
    request: ChatRequest, answers: int, run: Run, waiting: CapacityLimiter, service: Service
) -> AsyncIterator[str]:
    """The answer as server-sent events, a piece of text each."""
    head = _head(request, "chat.completion.chunk")
    if request.include_usage:
        head["usage"] = None  # of all chunks but the last

    def chunk(index: int, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**head, "choices": [choice]})

    sent = [""] * answers
    done: dict[int, Update] = {}
    with run:
        for index in range(answers):
            yield chunk(index, {"role": "assistant", "content": ""})
        try:
            async with contextlib.aclosing(_updates(run, waiting)) as updates:
                async for update in updates:
                    if update.state == "waiting":  # a comment, which clients pass over and which keeps the line open
                        yield f": {update.ahead} ahead, about {update.seconds:.0f} s\n\n"
                        continue
                    piece = update.text[len(sent[update.index]) :]
                    if piece:
                        sent[update.index] = update.text
                        yield chunk(update.index, {"content": piece})
                    if update.state == "done":
                        done[update.index] = update
                        yield chunk(update.index, {}, update.finish)
        except Exception as error:  # noqa: BLE001 - too late for a status: the clients look for an error in the stream
            if not isinstance(error, ApiError):
                error = _of_failure(error if isinstance(error, Failure) else service.failure(error))
            yield _event(error.body())
            return
    if request.include_usage:
        yield _event({**head, "choices": [], "usage": _usage(list(done.values()))})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _head(request: ChatRequest, kind: str) -> dict[str, Any]:
    name = f"chatcmpl-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": request.model}


def _usage(done: Sequence[Update]) -> dict[str, int]:
    """Token counts; a prompt that several answers share is counted once, as OpenAI does."""
    prompt = max((update.prompt_tokens for update in done), default=0)
    completion = sum(update.tokens for update in done)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
