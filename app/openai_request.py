"""What an OpenAI client sends to `/v1/chat/completions`, checked, as jobs for the service."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from anyio import to_thread
from PIL.Image import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from app.job import AdapterInfo, Job
from app.remote_image import fetch_image
from app.uploads import Limits, TooLarge, read_data_uri, read_upload

# What a picture's caption answers: "Describe this photo", "What do you see in the image?", "What's in this picture?"
DESCRIBE = re.compile(
    r"\b(?:describe|description|caption)\b"
    r"|\bwhat(?:'s| is| can| do)\b[^.?]{0,30}\b(?:in|on) (?:this|the) (?:picture|image|photo)",
    re.IGNORECASE,
)
AUTOMATIC = "mmadapter"  # the model that is the default: the adapter that suits an image, or the one that suits text
BASE = "base"  # the model without an adapter, which jobs call "none"
MOST_ANSWERS = 8
STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # "0.5" is no number

# Fields that OpenAI's clients know and that would change the answer in a way which is not there, with the values that
# ask for nothing.
NOT_THERE: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}
# Fields that say nothing about the text.
PASSED_OVER = {
    "metadata", "moderation", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store", "user", "verbosity",
}  # fmt: skip


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: Of HTTP.
        code: Short name of the error, which programs can compare.
        parameter: The field of the request that is wrong, if it is one.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        parameter: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status, self.code, self.parameter, self.headers = status, code, parameter, headers
        super().__init__(" ".join(message.split()))

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients expect."""
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(
            self.status, "invalid_request_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


class TextPart(BaseModel):
    model_config = STRICT
    type: Literal["text"]
    text: str


class ImageAddress(BaseModel):
    model_config = STRICT
    url: str


class ImagePart(BaseModel):
    model_config = STRICT
    type: Literal["image_url"]
    image_url: ImageAddress


def _parts(content: Any) -> Any:
    if content is None:  # an assistant's message of nothing but tool calls
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], BeforeValidator(_parts)]

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of a request. `strength`, `top_k` and `repetition_penalty` are ours (`extra_body` of the client)."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
        Field(max_length=4),
    ] = None
    seed: int | None = Field(None, ge=-(2**62), lt=2**62)
    strength: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def settings(self, answer: int) -> dict[str, Any]:
        """Fields of `Sampling` for one of the answers; each draws from a seed of its own."""
        settings = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "stop": tuple(self.stop) if self.stop else None,
            "seed": self.seed if not answer else (self.seed or 0) + answer,
            "beams": 1 if self.stream else None,  # a search has nothing to show before its end
        }
        return {name: value for name, value in settings.items() if value is not None}


def read_request(body: bytes) -> ChatRequest:
    """The request in a body of JSON.

    Raises:
        ApiError: It is not JSON, a field is missing, wrong or unknown, or asks for what is not there.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or None
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{place}: {reason}" if place else f"the body of the request is wrong: {reason}"
        raise ApiError(400, message, "invalid_value", place) from error
    extra = request.model_extra or {}
    for name, value in extra.items():
        if name in PASSED_OVER or (name in NOT_THERE and value in NOT_THERE[name]):
            continue
        if name in NOT_THERE:
            raise ApiError(400, f"{name} is not supported here; leave it out", "unsupported_parameter", name)
        known = ", ".join(ChatRequest.model_fields)
        raise ApiError(400, f"unknown field {name}; there are {known}", "unknown_parameter", name)
    return request


def model_ids(adapters: Sequence[AdapterInfo]) -> list[str]:
    """The names of the models, the default one first."""
    return [AUTOMATIC, *(BASE if info.name == "none" else info.name for info in adapters)]


async def read_jobs(
    request: ChatRequest, adapters: Sequence[AdapterInfo], default: dict[str, str], limits: Limits, allow_urls: bool
) -> list[Job]:
    """One job for each answer that is wanted.

    An image stays for the messages after it, until another one comes. A picture alone is captioned, and so is one that
    the default model is asked to describe; a first question about one is answered, all else is a conversation.

    Args:
        default: Which adapter each task takes (`Service.default`).
        allow_urls: Whether images may be fetched from http and https addresses.

    Raises:
        ApiError: There is no such model, an image cannot be read, or the model does not see.
    """
    if request.model not in model_ids(adapters):
        message = f"there is no model {request.model!r}; there are {', '.join(model_ids(adapters))}"
        raise ApiError(404, message, "model_not_found", "model")
    addresses = [(index, message.images) for index, message in enumerate(request.messages) if message.images]
    for index, several in addresses:
        if len(several) > 1 or request.messages[index].role != "user":
            message = "a message can have one image, and only the user's; ask about each in a message of its own"
            raise ApiError(400, message, "invalid_value", f"messages.{index}.content")
    image = None
    if addresses:
        index, (address,) = addresses[-1]
        image = await _read_image(address, limits, allow_urls, f"messages.{index}.content")

    turns = tuple(
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in request.messages
    )
    asked: dict[str, Any] = {"task": "chat", "messages": turns}
    if image is not None and len(turns) == 1:
        question = turns[0]["content"].strip()
        describe = not question or (request.model == AUTOMATIC and DESCRIBE.search(question))
        asked = {"task": "caption"} if describe else {"task": "answer", "question": question}

    name = "none" if request.model == BASE else request.model
    if request.model == AUTOMATIC:
        name = default["answer" if image is not None and asked["task"] == "chat" else asked["task"]]
    info = next(info for info in adapters if info.name == name)
    if image is not None and not info.sees:
        seeing = [info.name for info in adapters if info.sees]
        those = (
            f"these do: {', '.join(seeing)}"
            if seeing
            else "no model here does; start the app with an adapter that sees"
        )
        raise ApiError(400, f"model {request.model} takes no images; {those}", "invalid_value", "model")
    strength = 1.0 if request.strength is None else request.strength
    return [
        Job(image=image, adapter=name, strength=strength, settings=request.settings(answer), **asked)
        for answer in range(request.n or 1)
    ]


async def _read_image(address: str, limits: Limits, allow_urls: bool, place: str) -> Image:
    try:
        if address.lower().startswith(("http://", "https://")):
            if not allow_urls:
                message = (
                    "image addresses are not fetched here; send the picture as a data URI (data:image/png;base64,...)"
                )
                raise ApiError(400, message, "invalid_image_url", place)
            return await to_thread.run_sync(read_upload, await fetch_image(address, limits), limits)
        return await to_thread.run_sync(read_data_uri, address, limits)
    except TooLarge as error:
        raise ApiError(413, str(error), "image_too_large", place) from error
    except (ValueError, OSError) as error:
        raise ApiError(400, str(error), "invalid_image", place) from error
