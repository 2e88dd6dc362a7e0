"""What goes over the wire: the part of OpenAI's chat completions that is served, and the fields of our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from foveate.serve.refusals import Refused

Role = Literal["system", "developer", "user", "assistant"]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class _Asked(BaseModel):
    """Nothing that a client asks for is dropped in silence: a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Asked):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(_Asked):
    """Where a picture is; `detail` changes nothing, the budget is what says how many tokens are read."""

    url: str = Field(description="data:image/png;base64,... or http(s)://...")
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Asked):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Asked):
    """One turn of the conversation."""

    role: Role
    content: str | Annotated[list[Part], Field(max_length=256)]
    name: str | None = None
    refusal: None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content, always in parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class Compression(_Asked):
    """The budget of one request: another `keep` for the server's method, or another method."""

    keep: int | float | None = Field(
        None, description="What stays: a whole number is tokens per picture, a fraction in (0, 1] a share of them."
    )
    method: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = Field(
        None, description="A method with its options: evocut:keep=64", examples=["adav:keep=64"]
    )


class StreamOptions(_Asked):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class TextFormat(_Asked):
    """The only form of answers."""

    type: Literal["text"]


class Request(_Asked):
    """A question to the model."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    model: str | None = None
    foveate: Compression | None = Field(None, description="How many visual tokens to read, for this request alone.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Asked for in the only way that there is.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    response_format: TextFormat | None = None
    # Said about a request, and of no effect on its answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None


class Savings(BaseModel):
    """What compression saved: visual tokens as the model makes them, as they enter the LLM, and as its layers see."""

    method: str
    prompt_tokens_before: int
    visual_tokens_before: int
    visual_tokens_after: int
    visual_tokens_per_layer: float


class Usage(BaseModel):
    """Tokens of a request; those of the prompt are counted after compression."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    foveate: Savings


class Answer(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The one answer, and why it ends."""

    index: Literal[0] = 0
    message: Answer
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """An answer with its costs."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "foveate"


class Models(BaseModel):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether questions are answered."""

    status: Literal["ok"] = "ok"


class Problem(BaseModel):
    """What is wrong, and after ``hint:`` what to send instead."""

    message: str
    type: str
    param: str | None
    code: str


class Problems(BaseModel):
    """An error in OpenAI's form."""

    error: Problem


def invalid(errors: list[Any]) -> Refused:
    """Return what is wrong with a request, of everything that is the innermost."""
    worst = max(errors, key=lambda error: len(error["loc"]))
    place = ".".join(str(step) for step in worst["loc"][1:])
    if worst["type"] == "json_invalid":
        return Refused("the request is no JSON", "send one JSON object in UTF-8", code="invalid_json")
    if worst["type"] == "extra_forbidden":
        known = ", ".join(f"`{name}`" for name in Request.model_fields)
        return Refused(
            f"`{place}` is not served", f"leave it out; known are {known}", code="unknown_field", param=place
        )
    if not place:
        return Refused(
            "the request is no JSON object with messages",
            'send {"messages": [{"role": "user", "content": "..."}]} as application/json',
        )
    return Refused(
        f"`{place}`: {worst['msg']}", "see /openapi.json for what is served", code="invalid_field", param=place
    )
