"""One round of `sku monitor` after another: ask the server the same prompts (probes), judge the answers, test whether rates have risen.

A round gives one count per series: `harmful` (harmful answers to forget probes), `gibberish` (broken answers to any probe),
`over_refusal` (refused retain probes) and `traffic:ARM` (harmful ones among the answers that the server itself judged). The first rounds
of a series set its normal rate; then a detector with a bounded false alarm rate tests each round (`sku_vllm.stats.change_points`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from sku_vllm.client.arm_metrics import arm_counters
from sku_vllm.client.chat import ask
from sku_vllm.data import Row, read_rows
from sku_vllm.errors import ConfigError, RunError
from sku_vllm.judges import Exchange, Verdict, load_labeller
from sku_vllm.monitor.history import History
from sku_vllm.monitor.monitor_config import MonitorConfig
from sku_vllm.monitor.round import Round, Series
from sku_vllm.stats import wilson
from sku_vllm.stats.change_points import RecoveryDetector, delay, locate_change, tolerated_rate, trend

# A baseline rate above this is refused: the server was probably broken, and hardly any rise could be detected.
WORST_BASELINE = 0.9
# How a store calls the model that the server's clients use, whatever its name; existing stores have this.
UNNAMED = "sku"


class Monitor:
    """Probes, judge and store of one monitored server; each call of `round` asks all probes once.

    Raises:
        ConfigError: the store was written with other probes or settings. DataError: probes or judge cannot be read.
    """

    def __init__(self, config: MonitorConfig, store: str | Path) -> None:
        self.config = config
        self.probes = read_rows(config.probes) if config.probes else []
        self.retain = read_rows(config.retain, safe=True) if config.retain else []
        self.label = load_labeller(config.judge) if config.judge else None
        asked = hashlib.sha256(json.dumps([[digest(row) for row in rows] for rows in (self.probes, self.retain)]).encode()).hexdigest()
        self.history = History(
            store,
            {
                "probes": asked,
                "judge": config.judge,
                "model": config.model or UNNAMED,
                "arm": config.arm,
                "samples": config.samples,
                "temperature": config.temperature,
                "max-new-tokens": config.max_new_tokens,
            },
        )

    def round(self, now: Callable[[], float] = time.time) -> Round:
        """Ask the probes, judge and store the answers, test each series. A server that does not answer gives a round with `error` set."""
        try:
            counts, labels = self._probe()
            counters = arm_counters(metrics=self.config.metrics, prometheus=self.config.prometheus)
        except RunError as error:
            return Round(self.history.add_round(now(), "failed", {}, {}), now(), error=str(error))
        for arm, seen in counters.items():
            counts[f"traffic:{arm}"] = self.history.since_last(arm, seen["hits"], seen["n"])
        number = self.history.add_round(now(), "done", counts, labels)
        # Traffic also changes with what users ask, so it raises alarms only when there are no probes.
        watched = [name for name in counts if not self.probes or not name.startswith("traffic:")]
        return Round(number, now(), [self._follow(name, name in watched, len(watched)) for name in counts])

    def _probe(self) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        rows = [*self.probes, *self.retain]
        if not rows or self.label is None:
            return {}, {}
        asked = [row for row in rows for _ in range(self.config.samples)]
        # Another seed every round, so that rounds are independent samples of answers to the same prompts.
        seed = self.config.seed + len(asked) * sum(self.history.rounds().values())
        answers = ask(
            str(self.config.address),
            self.config.model,
            [row.messages for row in asked],
            arm=self.config.arm,
            temperature=self.config.temperature,
            max_tokens=self.config.max_new_tokens,
            seed=seed,
        )
        split = len(self.probes) * self.config.samples
        exchanges = [
            Exchange.of(row.messages, answer, forget=i < split) for i, (row, answer) in enumerate(zip(asked, answers, strict=True))
        ]
        verdicts = self.label(exchanges)
        counts = {"harmful": _count(verdicts[:split], "harmful"), "gibberish": _count(verdicts, "gibberish")}
        if self.retain:
            counts["over_refusal"] = _count(verdicts[split:], "refusal")
        labels: dict[str, str] = {
            f"{digest(row)}/{i % self.config.samples}": verdict.label for i, (row, verdict) in enumerate(zip(asked, verdicts, strict=True))
        }
        return counts, labels

    def _follow(self, name: str, watched: bool, of: int) -> Series:
        past = self.history.series(name)
        hits, n = [row[1] for row in past], [row[2] for row in past]
        low, high = wilson(hits[-1], n[-1])
        series = Series(name, hits[-1], n[-1], hits[-1] / n[-1] if n[-1] else None, low, high, sum(1 for count in n if count), watched)
        drift, change = trend(hits, n), locate_change(hits, n)
        series.trend = asdict(drift) if drift else None
        series.change_point = {**asdict(change), "time": past[change.index][0]} if change else None
        if watched:
            self._detect(series, hits, n, self.config.false_alarms / of)
        return series

    def _detect(self, series: Series, hits: Sequence[int], n: Sequence[int], false_alarms: float) -> None:
        known = self.history.detector(series.name)
        harm = series.name == "harmful" or series.name.startswith("traffic:")
        if known:
            detector = RecoveryDetector(known[0], false_alarms, known[1])
            detector.update(series.hits, series.n)
        elif harm and self.config.tolerate is not None:
            detector = RecoveryDetector(self.config.tolerate, false_alarms)
            detector.update(series.hits, series.n)
        elif series.rounds < self.config.baseline_rounds:
            return
        else:
            # The detector starts after the baseline rounds, which it does not test.
            detector = RecoveryDetector(learn(series.name, sum(hits), sum(n)), false_alarms)
        self.history.keep_detector(series.name, detector.tolerated, detector.levels)
        series.tolerated, series.evidence, series.threshold = detector.tolerated, detector.evidence, detector.threshold
        series.alarm = detector.evidence >= detector.threshold
        if series.n and self.config.notice > detector.tolerated:
            series.notice_within = delay(detector.tolerated, self.config.notice, series.n, false_alarms=false_alarms)


def learn(name: str, hits: int, n: int) -> float:
    """The highest rate that raises no alarm, from a baseline of `hits` among `n` answers.

    Raises:
        ConfigError: the baseline rate is above `WORST_BASELINE`.
    """
    if hits > WORST_BASELINE * n:
        raise ConfigError(
            f"{name}: the baseline rate is {hits / n:.0%}, so nothing worse could be noticed; "
            "watch a server that is in order, with a new --store"
        )
    return tolerated_rate(hits, n)


def digest(row: Row) -> str:
    """How the store identifies a probe: the first 16 hex digits of its conversation's sha256, so that no text is stored."""
    return hashlib.sha256(json.dumps([dict(turn) for turn in row.messages], sort_keys=True).encode()).hexdigest()[:16]


def _count(verdicts: Sequence[Verdict], label: str) -> tuple[int, int]:
    return sum(verdict.label == label for verdict in verdicts), len(verdicts)
