"""What a run shows while it trains: a bar (or lines), a JSONL history, and accelerate's trackers."""

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sku_vllm.methods.run import Run

HISTORY = "history.jsonl"


class Progress:
    """One line of history a step; the file is cut back to the checkpoint when a run resumes."""

    def __init__(self, run: "Run", partial: Path, *, enabled: bool) -> None:
        from tqdm import tqdm

        self.run = run
        self.history = partial / HISTORY
        self.kept: list[dict[str, Any]] = []
        self.main = run.accelerator.is_main_process
        if self.main:
            self._cut()
        # A terminal gets a bar, a log a line every tenth of the way.
        terminal = sys.stderr.isatty()
        self.lines = max(1, run.total // 10) if enabled and not terminal else 0
        self.bar = tqdm(
            total=run.total, initial=run.at, unit="step", disable=not (enabled and terminal), dynamic_ncols=True, desc=run.config.method,
        )

    def step(self, entry: dict[str, Any]) -> None:
        """Record one step's losses, learning rate, tokens and seconds."""
        self.kept.append(entry)
        if self.main:
            with open(self.history, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        losses = {name: f"{value:.3f}" for name, value in entry["losses"].items()}
        shown = {**losses, "tok/s": f"{entry['tokens'] / max(entry['seconds'], 1e-9):.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if self.lines and entry["step"] % self.lines == 0:
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            left = self.run.seconds / entry["step"] * (self.run.total - entry["step"])
            where = f"{self.run.config.method}: step {entry['step']}/{self.run.total}"
            print(f"{where}, {values}, {self.bar.format_interval(left)} left", file=sys.stderr, flush=True)
        if self.run.accelerator.trackers:
            values = {f"loss/{name}": value for name, value in entry["losses"].items()}
            self.run.accelerator.log({**values, "lr": entry["lr"], "gradient_norm": entry["gradient_norm"]}, step=entry["step"])

    def last_losses(self) -> dict[str, float]:
        """Each term's mean over the last tenth of the steps that had it."""
        series: dict[str, list[float]] = {}
        for entry in self.kept:
            for name, value in entry["losses"].items():
                series.setdefault(name, []).append(value)
        return {name: fmean(values[-max(1, len(values) // 10):]) for name, values in series.items()}

    def risen(self) -> dict[str, float]:
        """Terms that end more than a nat above where their last phase began, and by how many: finite, and exploded all the same.

        It cannot stop a run, since gradient ascent and the published preservation divergence explode by design and take others along.
        """
        firsts: dict[tuple[int, str], float] = {}
        for entry in self.kept:
            for name, value in entry["losses"].items():
                firsts.setdefault((entry["phase"], name), value)
        began = {name: value for (_, name), value in firsts.items()}  # a later phase's takes the place of an earlier one's
        return {name: rise for name, last in self.last_losses().items() if (rise := last - began[name]) > 1}

    def close(self) -> None:
        self.bar.close()

    def _cut(self) -> None:
        lines = self.history.read_text(encoding="utf-8").splitlines() if self.history.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break  # the line a kill interrupted
            if entry["step"] <= self.run.at:
                self.kept.append(entry)
        self.history.write_text("".join(json.dumps(entry) + "\n" for entry in self.kept), encoding="utf-8")
