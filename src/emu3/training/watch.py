"""What people see of a run while it goes on: a bar with loss, speed and time left, and a line for every report."""

import os
import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emu3.training.machine import peak_flops
from emu3.training.recipe import RunSettings


class Display:
    """Collects what the steps bring, shows it, and sums it up for the log."""

    def __init__(self, folder: Path, step: int, settings: RunSettings, unit: str, is_shown: bool) -> None:
        self.unit, self.is_shown, self._settings = unit, is_shown, settings
        self._console = Console(stderr=True, quiet=not is_shown)
        columns = [
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TextColumn("{task.fields[state]}"), TimeRemainingColumn()),
        ]
        self._bar = Progress(*columns, console=self._console, disable=not (is_shown and sys.stderr.isatty()))
        self._task = self._bar.add_task("training", total=settings.steps, completed=step, state="")
        self._peak = 0.0
        self._start()
        if is_shown:
            print(
                f"{os.path.relpath(folder)}: steps {step} to {settings.steps}, a report every {settings.report_every}, "
                f"saved every {settings.save_every}",
                flush=True,
            )

    def _start(self) -> None:
        self._began, self._size, self._flops = time.monotonic(), 0, 0.0
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._sums: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, loss: float, norm: float, metrics: dict[str, tuple[float, float]], size: int, flops: float) -> None:
        """What one step came to."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._size += size
        self._flops += flops
        for name, (total, count) in metrics.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + total, before[1] + count)
        speed = self._size / max(1e-9, time.monotonic() - self._began)
        self._bar.update(self._task, advance=1, state=f"loss {loss:.4g}  {speed:,.0f} {self.unit}/s")

    def report(self) -> dict[str, float]:
        """The log's values: means since the last report."""
        seconds = max(1e-9, time.monotonic() - self._began)
        losses, norms = self._losses, self._norms
        values = {"loss": sum(losses) / len(losses)}
        values |= {name: total / count for name, (total, count) in self._sums.items() if count}
        values |= {"gradient_norm": sum(norms) / len(norms), f"{self.unit}_per_second": self._size / seconds}
        if self._flops:
            self._peak = self._peak or peak_flops(self._settings)
            values["mfu"] = self._flops / seconds / self._peak
        self._start()
        return values

    def print(self, line: str) -> None:
        """A line above the bar."""
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.console.print(line, highlight=False)
