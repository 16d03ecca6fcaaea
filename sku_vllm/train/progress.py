"""Report a run's progress: a bar on a terminal or lines in a log, history.jsonl, and accelerate's trackers.

Open this file to change what is shown or recorded for each step, or while answers are drawn; `pace.py` knows the time left.
"""

import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sku_vllm.train.pace import Pace

if TYPE_CHECKING:
    from sku_vllm.train.run import Run

HISTORY = "history.jsonl"
LOG_EVERY_S = 30.0  # a log gets a line at least so often, and a terminal's bar moves at most every REDRAWN_S
REDRAWN_S = 0.2


class Progress:
    """Shows each step and each draw of answers, and keeps the steps' history, one line of JSON a step.

    Attributes:
        kept: history entries of every step so far, those of a resumed run's checkpoint included. pace: says how much time is left.
    """

    def __init__(self, run: "Run", partial: Path, *, enabled: bool) -> None:
        from tqdm import tqdm

        self.run = run
        self.history = partial / HISTORY
        self.kept: list[dict[str, Any]] = []
        self.main = run.accelerator.is_main_process
        if self.main:
            self._cut()
        self.pace = Pace(run)
        # A bar on a terminal, filled by the share of the time that is over, else ten lines over the whole run, or one every LOG_EVERY_S.
        terminal = sys.stderr.isatty()
        self.lines = max(1, run.total // 10) if enabled and not terminal else 0
        self.bar = tqdm(total=1.0, disable=not (enabled and terminal), dynamic_ncols=True, desc=run.config.method)
        self.begun = self.said = time.monotonic()
        self.spent = run.seconds  # of a resumed run, before it was interrupted
        if enabled:
            run.passes.drawing = self.drawing

    def step(self, entry: dict[str, Any]) -> None:
        """Record one step's losses, learning rate, tokens and seconds."""
        self.kept.append(entry)
        if self.main:
            with open(self.history, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if self.lines or not self.bar.disable:
            self._show_step(entry)
        if self.run.accelerator.trackers:
            values = {f"loss/{name}": value for name, value in entry["losses"].items()}
            self.run.accelerator.log({**values, "lr": entry["lr"], "gradient_norm": entry["gradient_norm"]}, step=entry["step"])

    def _show_step(self, entry: dict[str, Any]) -> None:
        seconds = self.pace.step(entry["tokens"], entry["seconds"])
        losses = {name: f"{value:.3f}" for name, value in entry["losses"].items()}
        shown = {**losses, "tok/s": f"{entry['tokens'] / seconds:.0f}"}
        if self._due(entry["step"] % max(1, self.lines) == 0):
            self.bar.set_postfix(shown, refresh=False)
            self._show(f"step {entry['step']}/{self.run.total}, " + ", ".join(f"{name} {value}" for name, value in shown.items()))

    def drawing(self, done: float, wanted: int) -> None:
        """Show that `done` of `wanted` answers of a draw are there; see `Forward.drawing`."""
        self.pace.draw(done, wanted)
        if self._due(False):
            self._show(f"drawing {done:.0f} of {wanted} answers, {self._clock(self.pace.in_draw)} left in this draw", " in all")

    def _due(self, milestone: bool) -> bool:
        """Whether it is time to redraw the bar, or to print a line."""
        waited = time.monotonic() - self.said
        return milestone or waited > LOG_EVERY_S if self.bar.disable else self.run.done or waited > REDRAWN_S

    def _show(self, what: str, of: str = "") -> None:
        """Redraw the bar, or print `what` with the time left."""
        self.said = time.monotonic()
        left = self.pace.left()
        if self.bar.disable:
            print(f"{self.run.config.method}: {what}, {self._clock(left)} left{of}", file=sys.stderr, flush=True)
            return
        spent = self.spent + self.said - self.begun
        self.bar.n = 0.0 if left is None else spent / max(spent + left, 1e-9)
        done = f"{self.pace.done:.0f}/{self.pace.wanted:.0f} drawn" if self.pace.wanted else f"{self.run.at}/{self.run.total}"
        self.bar.bar_format = f"{{l_bar}}{{bar}}| {done} [{{elapsed}}<{self._clock(left)}{{postfix}}]"
        self.bar.refresh()

    def _clock(self, seconds: float | None) -> str:
        return "?" if seconds is None else str(self.bar.format_interval(seconds))

    def last_losses(self) -> dict[str, float]:
        """Each term's mean over the last tenth of the steps that had it."""
        series: dict[str, list[float]] = {}
        for entry in self.kept:
            for name, value in entry["losses"].items():
                series.setdefault(name, []).append(value)
        return {name: fmean(values[-max(1, len(values) // 10) :]) for name, values in series.items()}

    def risen(self) -> dict[str, float]:
        """Terms whose loss ends more than 1 nat above its first value in their last phase, which training made worse, and by how many nats.

        Nothing stops a run for it, since gradient ascent and the published preservation divergence grow without bound by design, and
        raise other losses with them.
        """
        firsts: dict[tuple[int, str], float] = {}
        for entry in self.kept:
            for name, value in entry["losses"].items():
                firsts.setdefault((entry["phase"], name), value)
        began = {name: value for (_, name), value in firsts.items()}  # the first value of the last phase that has the term
        return {name: rise for name, last in self.last_losses().items() if (rise := last - began[name]) > 1}

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()

    def _cut(self) -> None:
        """Cut the history back to the checkpoint that a resumed run continues from."""
        lines = self.history.read_text(encoding="utf-8").splitlines() if self.history.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # an incomplete line, from a run that was killed
            if entry["step"] <= self.run.at:
                self.kept.append(entry)
        self.history.write_text("".join(json.dumps(entry) + "\n" for entry in self.kept), encoding="utf-8")
