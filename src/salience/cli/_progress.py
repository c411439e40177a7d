"""The progress line of a run in stages: how far, how fast, how long still."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class StageProgress:
    """Call with (stage, bytes done, bytes in all); shows nothing where the terminal is none.

    Parameters
    ----------
    seconds : mapping of str to float
        What every stage is expected to take, in order: how much of the whole it is.
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:>8}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._seconds = {stage: max(expected, 1e-6) for stage, expected in seconds.items()}
        self._task = self._bars.add_task("", total=sum(self._seconds.values()), rate="")
        self._stage, self._before, self._began = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note of what is done of a stage."""
        if stage != self._stage:
            self._before += self._seconds.get(self._stage, 0.0)
            self._stage, self._began = stage, time.monotonic()
            return
        here = self._seconds.get(stage, 0.0) * done / max(total, 1)
        rate = done / max(time.monotonic() - self._began, 1e-9)
        self._bars.update(self._task, description=stage, completed=self._before + here, rate=f"{rate / 1e6:,.0f} MB/s")

    def __enter__(self) -> StageProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
