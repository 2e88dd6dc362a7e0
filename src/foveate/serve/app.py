"""The HTTP side: routes, OpenAI's forms of answers and errors, and a stream of them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import foveate
from foveate import registry
from foveate.errors import FoveateError
from foveate.serve import messages, pictures
from foveate.serve.gate import Gate, response
from foveate.serve.limits import Limits
from foveate.serve.metrics import Metrics
from foveate.serve.reader import Question, Reader, Said, sampling
from foveate.serve.refusals import Refused
from foveate.serve.worker import Job, Worker

CHAT = "/v1/chat/completions"
_GONE = 499
_STREAM: dict[str, Any] = {"text/event-stream": {}}

T = TypeVar("T")


class Service:
    """What the routes share: the model's thread, limits and counts."""

    def __init__(self, reader: Reader, limits: Limits) -> None:
        self.reader, self.limits = reader, limits
        self.worker, self.metrics = Worker(reader), Metrics()
        self.since = int(time.time())

    async def question(self, asked: messages.Request) -> Question:
        """Return what a request asks, with its pictures fetched.

        Raises:
            FoveateError: If it asks for what there is not.
        """
        self.known(asked.model)
        wish = asked.foveate
        method = self.reader.choose(None, None) if wish is None else self.reader.choose(wish.keep, wish.method)
        turns = [(turn.role, turn.parts) for turn in asked.messages]
        parts = [part for _, each in turns for part in each]
        self.reader.check([part.text for part in parts if isinstance(part, messages.TextPart)])
        urls = [part.image_url.url for part in parts if isinstance(part, messages.ImagePart)]
        files = iter(await pictures.gather(urls, self.limits))
        return Question(
            turns=tuple(
                (role, tuple(part.text if isinstance(part, messages.TextPart) else next(files) for part in each))
                for role, each in turns
            ),
            method=method,
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            sampling=sampling(asked.temperature, asked.top_p),
            seed=asked.seed,
            stops=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        )

    def known(self, name: str | None) -> None:
        """Refuse another model than the one that is served."""
        if name is not None and name != self.reader.name:
            raise Refused(
                f"no such model: {name!r}",
                f'this server has one: "model": "{self.reader.name}"',
                status=404,
                code="model_not_found",
                param="model",
            )

    def usage(self, said: Said) -> messages.Usage:
        """Return what an answer took."""
        return messages.Usage(
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.tokens,
            total_tokens=said.prompt_tokens + said.tokens,
            foveate=messages.Savings(
                method=said.report.method,
                prompt_tokens_before=said.prompt_tokens_before,
                visual_tokens_before=said.report.tokens,
                visual_tokens_after=said.report.kept,
                visual_tokens_per_layer=said.report.mean_alive,
            ),
        )


def create_app(reader: Reader, limits: Limits) -> fastapi.FastAPI:
    """Return the application that serves a model."""
    service = Service(reader, limits)

    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    app = fastapi.FastAPI(
        title="foveate",
        version=foveate.__version__,
        description=f"Chat completions by `{reader.name}`; `{registry.to_spec(reader.method)}` unless told.",
        lifespan=lifespan,
        docs_url=None,  # they load scripts from other people's servers
        redoc_url=None,
        responses={"4XX": {"model": messages.Problems}},
    )
    app.add_middleware(Gate, path=CHAT, limits=limits, worker=service.worker, metrics=service.metrics)
    _errors(app)
    _chat(app, service)
    _state(app, service)
    return app


def _chat(app: fastapi.FastAPI, service: Service) -> None:
    @app.post(CHAT, response_model=messages.Completion, responses={200: {"content": _STREAM}})
    async def chat(asked: messages.Request, request: fastapi.Request) -> Response:
        """Answer a question about pictures."""
        begin = time.monotonic()
        question = await _while_here(request, service.question(asked))
        if question is None:
            return Response(status_code=_GONE)
        job = service.worker.ask(question)
        try:
            first = await _while_here(request, job.next())
            service.metrics.first.observe(time.monotonic() - begin)
            if first is not None and asked.stream:
                usage = asked.stream_options is not None and asked.stream_options.include_usage
                return StreamingResponse(_lines(service, job, first, usage), media_type="text/event-stream")
            said = None if first is None else await _while_here(request, _whole(job, first))
        except BaseException:
            job.give_up()
            raise
        if said is None:
            job.give_up()
            return Response(status_code=_GONE)
        text, end = said
        service.metrics.answered(end)
        answer = messages.Completion(
            id=_name(),
            created=int(time.time()),
            model=service.reader.name,
            choices=[messages.Choice(message=messages.Answer(content=text), finish_reason=end.finish_reason)],
            usage=service.usage(end),
        )
        return JSONResponse(answer.model_dump())


def _state(app: fastapi.FastAPI, service: Service) -> None:
    model = messages.Model(id=service.reader.name, created=service.since)

    @app.get("/v1/models")
    async def models() -> messages.Models:
        """List the one model."""
        return messages.Models(data=[model])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> messages.Model:
        """Describe the model."""
        service.known(name)
        return model

    @app.get("/health", responses={503: {"model": messages.Problems}})
    async def health() -> messages.Health:
        """Say whether questions are answered."""
        if not service.worker.alive:
            raise Refused("the model's thread has ended", "start the server again", status=503, code="not_alive")
        return messages.Health()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return all counts, for Prometheus."""
        service.metrics.waiting.set(service.worker.waiting)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _errors(app: fastapi.FastAPI) -> None:
    @app.exception_handler(FoveateError)
    async def refused(request: fastapi.Request, error: FoveateError) -> Response:
        return response(Refused.of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: fastapi.Request, error: RequestValidationError) -> Response:
        return response(messages.invalid(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: fastapi.Request, error: HTTPException) -> Response:
        told = response(
            Refused(
                f"{request.method} {request.url.path}: {error.detail}",
                f"ask at POST {CHAT}; all there is stands in /openapi.json",
                status=error.status_code,
                code="not_served",
            )
        )
        told.headers.update(error.headers or {})
        return told

    @app.exception_handler(Exception)
    async def failed(request: fastapi.Request, error: Exception) -> Response:
        return response(Refused.of(error))


async def _while_here(request: fastapi.Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what some work comes to, or None if the client goes away first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: fastapi.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(job: Job, first: str | Said) -> tuple[str, Said]:
    """Return an answer and how it ended."""
    text = list[str]()
    async for piece in job.pieces(first):
        if isinstance(piece, Said):
            return "".join(text), piece
        text.append(piece)
    raise AssertionError("an answer ends with how it ended")


async def _lines(service: Service, job: Job, first: str | Said, usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events."""
    about = {
        "id": _name(),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": service.reader.name,
    }

    def line(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event({**about, "choices": [choice], **({"usage": None} if usage else {})})

    try:
        yield line({"role": "assistant", "content": ""})
        async for piece in job.pieces(first):
            if isinstance(piece, str):
                yield line({"content": piece})
                continue
            service.metrics.answered(piece)
            yield line({}, piece.finish_reason)
            if usage:
                yield _event({**about, "choices": [], "usage": service.usage(piece).model_dump()})
    except FoveateError as error:  # too late for a status
        yield _event(Refused.of(error).body())
    finally:
        job.give_up()
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _name() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
