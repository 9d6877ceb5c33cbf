"""What client and server say to each other over the WebSocket; docs/serving.md has it in words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

VERSION = 1
Format = Literal["mp4", "jpeg"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Prompt(_Message):
    text: str


class Transition(_Message):
    keep_sink: bool | None = None


Prompts = Annotated[list[str | Prompt], Field(min_length=1, max_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]  # what JavaScript counts exactly


class Start(_Message):
    """A new session."""

    type: Literal["start"]
    prompts: Prompts
    seed: Seed | None = None
    format: Format = "mp4"
    keep_sink: bool | None = None


class Resume(_Message):
    """The session of a connection that was lost; `next`: the first chunk that is wanted."""

    type: Literal["resume"]
    session: Annotated[str, Field(max_length=64)]
    next: Annotated[int, Field(ge=0)] = 0
    format: Format = "mp4"


class Update(_Message):
    """What is given changes, from the next block on."""

    type: Literal["update"]
    prompts: Prompts | None = None
    paused: bool | None = None
    transition: Transition | None = None
    reset_cache: Literal[True] | None = None
    seed: Seed | None = None


class Ack(_Message):
    """A chunk has arrived; `ahead`: seconds left to play, where somebody plays."""

    type: Literal["ack"]
    chunk: Annotated[int, Field(ge=0)]
    ahead: Annotated[float, Field(ge=0, le=3600)] | None = None


class Stop(_Message):
    type: Literal["stop"]


First = Start | Resume
Later = Update | Ack | Stop
_first: TypeAdapter[First] = TypeAdapter(Annotated[First, Field(discriminator="type")])
_later: TypeAdapter[Later] = TypeAdapter(Annotated[Later, Field(discriminator="type")])


class Refused(Exception):
    """What a client sent cannot be done; it is told why. `fatal`: and the connection ends."""

    def __init__(self, code: str, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.code, self.fatal = code, fatal

    def told(self) -> dict[str, Any]:
        return {"type": "error", "code": self.code, "message": str(self), "fatal": self.fatal}


def read_first(text: str) -> First:
    """The first message of a connection. Raises Refused (fatal) for anything else."""
    try:
        return _first.validate_json(text)
    except ValidationError as error:
        raise Refused("bad_message", f"a connection begins with start or resume: {_one_line(error)}", fatal=True) from error


def read_later(text: str) -> Later:
    """Any further message. Raises Refused."""
    try:
        return _later.validate_json(text)
    except ValidationError as error:
        raise Refused("bad_message", f"this is no update, ack or stop: {_one_line(error)}") from error


def prompt_of(prompts: Prompts, most: int) -> str:
    """The one prompt there is. Raises Refused when it is empty or longer than `most` characters."""
    (given,) = prompts
    text = (given if isinstance(given, str) else given.text).strip()
    if not text:
        raise Refused("bad_prompt", "the prompt is empty; describe what the video should show")
    if len(text) > most:
        raise Refused("bad_prompt", f"the prompt has {len(text)} characters; at most {most} are read")
    return text


def _one_line(error: ValidationError) -> str:
    """What is wrong first, and where."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]
