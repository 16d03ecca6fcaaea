"""The settings of `sku monitor`: what it watches and when it raises an alarm."""

from dataclasses import dataclass

from sku_vllm.client.url import http_url
from sku_vllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """The flags of `sku monitor`, validated.

    model: None is the name that the server's clients use.

    false_alarms: at most as many false alarms per round, over all series together. tolerate: harmful rate that raises no alarm, instead
    of the one learned from the baseline. notice: harmful rate for which the report says after how many rounds it would be noticed.

    Raises:
        ConfigError: names the flag that is missing or out of range.
    """

    metrics: str | None = None
    prometheus: str | None = None
    server: str | None = None
    probes: str | None = None
    retain: str | None = None
    judge: str | None = None
    model: str | None = None
    arm: str | None = None
    samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 128
    baseline_rounds: int = 5
    tolerate: float | None = None
    false_alarms: float = 1e-4
    notice: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.metrics) == bool(self.prometheus):
            raise ConfigError("give one of --metrics URL (the server's /metrics) and --prometheus URL (a Prometheus that scrapes it)")
        for flag, url in (("--metrics", self.metrics), ("--prometheus", self.prometheus), ("--server", self.server)):
            if url and not http_url(url):
                raise ConfigError(f"{flag} {url}: expected a URL that begins with http:// or https://")
        if self.probes and not self.judge:
            raise ConfigError("--probes needs --judge SPEC to decide which answers are harmful, for instance lexicon:FILE or answered")
        if self.retain and not self.probes:
            raise ConfigError("--retain is probed beside --probes FILE; give both")
        if self.probes and not self.address:
            raise ConfigError("--probes with --prometheus needs --server URL, the address that answers /v1/chat/completions")
        if self.samples < 1 or self.baseline_rounds < 1 or self.max_new_tokens < 1:
            raise ConfigError("--samples, --baseline-rounds and --max-new-tokens must be at least 1")
        for flag, rate in (("--tolerate", self.tolerate), ("--false-alarms", self.false_alarms), ("--notice", self.notice)):
            if rate is not None and not 0 < rate < 1:
                raise ConfigError(f"{flag} {rate:g}: must lie between 0 and 1")

    @property
    def address(self) -> str | None:
        """Where probes go: --server, or the server whose /metrics is watched."""
        found = self.server or (self.metrics.rsplit("/metrics", 1)[0] if self.metrics else None)
        return found.rstrip("/").removesuffix("/v1") if found else None
