"""Points in time on a device: set while work is queued, read later, so that the host never waits for the device in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch


class Mark(Protocol):
    """The point in time at which everything queued before it is done."""

    @property
    def event(self) -> torch.cuda.Event | None:
        """On a GPU, for other streams to wait for."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds from `earlier`, a mark of the same clock, to this one; on a GPU this waits until the device has passed it."""
        ...


@dataclass(frozen=True)
class HostMark:
    """On a CPU, where work is done when the call returns."""

    at: float
    event: None = None

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self.at - earlier.at


@dataclass(frozen=True)
class DeviceMark:
    """An event on the current stream of a GPU."""

    event: torch.cuda.Event

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, DeviceMark)
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def clock(device: torch.device) -> Callable[[], Mark]:
    """Makes marks of the work that is queued on `device`."""
    return partial(_device_mark, device) if device.type == "cuda" else lambda: HostMark(time.perf_counter())


def _device_mark(device: torch.device) -> DeviceMark:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return DeviceMark(event)
