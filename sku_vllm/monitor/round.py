"""The result of one round of `sku monitor`: as JSON, and as metrics for Prometheus."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Series:
    """One series after a round.

    hits of n answers in this round give rate (None for n = 0) with the 95 % interval low to high. rounds: rounds with answers so far.
    watched: whether it can raise an alarm; that happens when evidence reaches threshold. tolerated: the highest rate that is normal.
    notice_within: rounds within which a rise to --notice would be noticed in 95 % of cases.
    """

    name: str
    hits: int
    n: int
    rate: float | None
    low: float
    high: float
    rounds: int
    watched: bool
    tolerated: float | None = None
    evidence: float | None = None
    threshold: float | None = None
    alarm: bool = False
    notice_within: int | None = None
    trend: dict[str, float] | None = None
    change_point: dict[str, float] | None = None


@dataclass(slots=True)
class Round:
    """The result of one round. time: seconds since 1970. error: why the server could not be asked, else None."""

    number: int
    time: float
    series: list[Series] = field(default_factory=list)
    error: str | None = None

    @property
    def alarms(self) -> list[str]:
        """Names of the series above their tolerated rate."""
        return [series.name for series in self.series if series.alarm]

    def to_json(self) -> dict[str, Any]:
        """What `sku monitor --json` prints."""
        return {
            "round": self.number,
            "time": self.time,
            "alarms": self.alarms,
            "error": self.error,
            "series": [asdict(series) for series in self.series],
        }


def export(latest: Round, outcomes: dict[str, int]) -> Any:
    """A prometheus_client registry with the metrics `sku_monitor_*` of the latest round. outcomes: number of rounds by outcome."""
    from prometheus_client import CollectorRegistry, Gauge

    registry = CollectorRegistry()

    def gauge(name: str, text: str, label: str | None = "series") -> Gauge:
        return Gauge(f"sku_monitor_{name}", text, [label] if label else [], registry=registry)

    numbers = {
        "rate": gauge("rate", "Share of hits in the latest round."),
        "tolerated": gauge("tolerated_rate", "Rate a quiet server is granted."),
        "evidence": gauge("evidence", "Detector statistic; an alarm is raised at the threshold."),
        "threshold": gauge("threshold", "Statistic at which an alarm is raised."),
        "n": gauge("probes", "Answers counted in the latest round."),
        "alarm": gauge("alarm", "1 while the series is above its tolerated rate."),
    }
    for series in latest.series:
        for attribute, metric in numbers.items():
            value = getattr(series, attribute)
            if value is not None:
                metric.labels(series.name).set(float(value))
    trend = gauge("trend_per_round", "Change of the rate a round, over all rounds.")
    trend_p = gauge("trend_p_value", "How often chance alone gives such a trend.")
    changed = gauge("change_point_timestamp_seconds", "When the rate most likely changed; believe it where the p-value is small.")
    changed_p = gauge("change_point_p_value", "How often chance alone gives such a change.")
    for series in latest.series:
        if series.trend:
            trend.labels(series.name).set(series.trend["slope"])
            trend_p.labels(series.name).set(series.trend["p_value"])
        if series.change_point:
            changed.labels(series.name).set(series.change_point["time"])
            changed_p.labels(series.name).set(series.change_point["p_value"])
    rounds = gauge("rounds", "Rounds so far by outcome.", "outcome")
    for outcome in ("done", "failed"):
        rounds.labels(outcome).set(outcomes.get(outcome, 0))
    gauge("last_round_timestamp_seconds", "When the latest round ended.", None).set(latest.time)
    gauge("server_up", "1 if the latest round got all its answers.", None).set(latest.error is None)
    return registry
