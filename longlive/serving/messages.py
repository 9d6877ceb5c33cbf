"""The messages of the WebSocket protocol, as docs/serving.md describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from longlive.generation.cues import check_prompt

VERSION = 3
Format = Literal["mp4", "jpeg"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Prompt(_Message):
    text: str


class Transition(_Message):
    keep_sink: bool | None = None


Prompts = Annotated[list[str | Prompt], Field(min_length=1, max_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]  # integers that JavaScript represents exactly


class Start(_Message):
    """A new session."""

    type: Literal["start"]
    prompts: Prompts
    seed: Seed | None = None
    format: Format = "mp4"
    keep_sink: bool | None = None


SessionName = Annotated[str, Field(max_length=64)]
Key = Annotated[str, Field(max_length=64)]


class Resume(_Message):
    """Its owner returns to a session. `next`: index of the first segment that the client does not have."""

    type: Literal["resume"]
    session: SessionName
    key: Key
    next: Annotated[int, Field(ge=0)] = 0
    format: Format = "mp4"


class Watch(_Message):
    """Somebody watches a session. `next`: as in `Resume`; None: from now on."""

    type: Literal["watch"]
    session: SessionName
    key: Key
    next: Annotated[int, Field(ge=0)] | None = None
    format: Format = "mp4"


class Update(_Message):
    """Changes what is given, from the next block on."""

    type: Literal["update"]
    prompts: Prompts | None = None
    paused: bool | None = None
    transition: Transition | None = None
    reset_cache: Literal[True] | None = None
    seed: Seed | None = None

    def merged(self, newer: Update) -> Update:
        """Both as one message; where both give a value, the newer one's. A transition stays with its prompts."""
        given = {name: value for name in newer.model_fields_set if (value := getattr(newer, name)) is not None}
        if newer.prompts is not None:
            given["transition"] = newer.transition
        if newer.reset_cache:
            given["seed"] = newer.seed
        return self.model_copy(update=given)


class Ack(_Message):
    """A segment has arrived. `buffered`: seconds of video that are left to play, from a client that plays."""

    type: Literal["ack"]
    segment: Annotated[int, Field(ge=0)]
    buffered: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] | None = None


class Stop(_Message):
    """The client ends the session."""

    type: Literal["stop"]


FirstMessage = Start | Resume | Watch
LaterMessage = Update | Ack | Stop
_first: TypeAdapter[FirstMessage] = TypeAdapter(Annotated[FirstMessage, Field(discriminator="type")])
_later: TypeAdapter[LaterMessage] = TypeAdapter(Annotated[LaterMessage, Field(discriminator="type")])


class Refused(Exception):
    """A client asked for something that cannot be done. `fatal`: its connection ends."""

    def __init__(self, code: str, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.code, self.fatal = code, fatal

    def to_message(self) -> dict[str, Any]:
        """The message that the client gets."""
        return {"type": "error", "code": self.code, "message": str(self), "fatal": self.fatal}


def parse_first(text: str) -> FirstMessage:
    """The first message of a connection. Raises Refused (fatal) when it is another one."""
    try:
        return _first.validate_json(text)
    except ValidationError as error:
        raise Refused("bad_message", f"the first message must be start, resume or watch: {_one_line(error)}", fatal=True) from error


def parse_later(text: str) -> LaterMessage:
    """Any message after the first. Raises Refused when it is no such message."""
    try:
        return _later.validate_json(text)
    except ValidationError as error:
        raise Refused("bad_message", f"this is not an update, ack or stop message: {_one_line(error)}") from error


def prompt_text(prompts: Prompts, max_chars: int) -> str:
    """The text of the one prompt. Raises Refused when it is empty or longer than `max_chars` characters."""
    (prompt,) = prompts
    text = (prompt if isinstance(prompt, str) else prompt.text).strip()
    try:
        check_prompt(text)
    except ValueError as error:
        raise Refused("bad_prompt", str(error)) from error
    if len(text) > max_chars:
        raise Refused("bad_prompt", f"the prompt has {len(text)} characters; at most {max_chars} are allowed")
    return text


def _one_line(error: ValidationError) -> str:
    """The first error, with the field in which it is."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{field}: {first['msg']}" if field else first["msg"]
