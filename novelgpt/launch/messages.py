"""What launchers of several hosts say to each other: a closed set of messages, each checked field by field.

A message travels as one JSON object, within a frame of `novelgpt.launch.frames`. To add one, write its model and put it
into the union of its direction; a change of what stands here is a new `VERSION`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from novelgpt.launch.hosts import MOST_HOSTS, MOST_PROCESSES
from novelgpt.launch.ranks import TAIL_BYTES

VERSION = 3
# Of a process, as subprocess has it; Windows counts up to 32 bits.
Status = Annotated[int, Field(ge=-64, lt=2**32)]


class Message(BaseModel):
    """What all have in common: fields that are of their type already, and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Hello(Message):
    """A host comes. Sent once, before anything else."""

    kind: Literal["hello"] = "hello"
    host: int = Field(ge=1, lt=MOST_HOSTS)
    hosts: int = Field(ge=2, le=MOST_HOSTS)
    processes: int = Field(ge=1, le=MOST_PROCESSES)
    name: str = Field(max_length=255)

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Hello:
        if self.host >= self.hosts:
            raise ValueError(f"host {self.host} of {self.hosts}")
        return self


class Report(Message):
    """A rank of this host has failed."""

    kind: Literal["report"] = "report"
    who: str = Field(max_length=300)
    status: Status
    tail: str = Field(max_length=TAIL_BYTES)


class Done(Message):
    """All ranks of this host have ended, and all is said."""

    kind: Literal["done"] = "done"


class Quit(Message):
    """A signal ends this host at a moment at which its ranks cannot agree with the others: it ends the run."""

    kind: Literal["quit"] = "quit"
    signal: int = Field(ge=1, le=64)


class Welcome(Message):
    """This host is taken; it shall wait for the others."""

    kind: Literal["welcome"] = "welcome"


class Refused(Message):
    """This host is not taken: there is one of its number already, or the first host counts other `hosts`."""

    kind: Literal["refused"] = "refused"
    reason: Literal["taken", "hosts"]
    hosts: int = Field(ge=2, le=MOST_HOSTS)


class Start(Message):
    """All hosts are there: these are this one's ranks, and where they meet.

    Where the run `heals`, a host whose ranks have ended waits for another `Start` or the final `End`.
    """

    kind: Literal["start"] = "start"
    first_rank: int = Field(ge=1, lt=MOST_HOSTS * MOST_PROCESSES)
    world_size: int = Field(ge=2, le=MOST_HOSTS * MOST_PROCESSES)
    port: int = Field(ge=1, le=65535)
    heals: bool


class End(Message):
    """Ranks have failed or are done, with this status: end what still runs. Where it is `final`, the run is over."""

    kind: Literal["end"] = "end"
    status: int = Field(ge=0, lt=2**32)
    final: bool


FromMember = Hello | Report | Done | Quit
FromFirst = Welcome | Refused | Start | End
FROM_MEMBER: TypeAdapter[FromMember] = TypeAdapter(Annotated[FromMember, Field(discriminator="kind")])
FROM_FIRST: TypeAdapter[FromFirst] = TypeAdapter(Annotated[FromFirst, Field(discriminator="kind")])
