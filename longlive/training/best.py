"""The best export of a run, by a validation metric: written to `best/` of its folder when a validation is better than all before.

Knows nothing of what is trained or how it is validated.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from longlive.files import read_json, write_json
from longlive.parallel.world import World, barrier, gather

log = logging.getLogger(__name__)


class BestExport:
    """Compares validations, and exports when one is better. All ranks call; rank 0's numbers decide.

    Which step is the best is written into the export, in `best.json`, so a resumed run knows it. One from a step that the resumed run
    has yet to take is not counted: the run comes there again.

    Args:
        metric: the name of a validation metric of which more is better; with a minus before it, less.
        start: the step at which the run starts or resumes.
    """

    def __init__(self, run: Path, metric: str, *, start: int, world: World) -> None:
        self.folder, self.metric, self._world = run / "best", metric, world
        self._partial = run / ".best.partial"
        if world.is_main and not self.folder.exists() and (self._partial / "best.json").exists():
            self._partial.rename(self.folder)  # the run was killed between two lines of `offer`
        barrier(world)
        self._value = float("-inf")
        if (self.folder / "best.json").exists():
            found = read_json(self.folder / "best.json")
            if found["metric"] == metric and found["step"] <= start:
                self._value = found["value"]

    @property
    def name(self) -> str:
        """Of the metric, without the minus."""
        return self.metric.removeprefix("-")

    @property
    def known(self) -> bool:
        """Whether a validation before `start` was the best so far by this metric: it is measured."""
        return self._value > float("-inf")

    def check(self, measured: Collection[str]) -> None:
        """Raises ValueError when a validation that measures this has no such metric; names those that it has."""
        if self.name not in measured:
            known = f"choose from {', '.join(measured)}" if measured else "this stage measures nothing; leave keep_best out"
            raise ValueError(f"keep_best {self.name} is not measured at validation; {known}")

    def offer(self, step: int, measured: Mapping[str, float], export: Callable[[Path], None]) -> bool:
        """Call `export` with a folder if this validation is the best so far; returns whether it is.

        Raises:
            ValueError: as `check`.
        """
        self.check(measured)
        name = self.name
        value = gather(measured[name] if name == self.metric else -measured[name], self._world)[0]
        if not value > self._value:
            return False
        self._value = value
        if self._world.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
        export(self._partial)
        if self._world.is_main:
            write_json(self._partial / "best.json", {"metric": self.metric, "step": step, "value": value})
            shutil.rmtree(self.folder, ignore_errors=True)
            self._partial.rename(self.folder)
        log.info("step %d is the best so far (%s %.4g): exported to %s", step, self.metric, value, self.folder)
        return True
