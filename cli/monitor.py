"""`sku monitor`: ask a running server the same prompts at intervals and raise an alarm when harmful answers come back."""

import time
from pathlib import Path
from typing import Any

import click

from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.errors import ConfigError, NegativeResult, RunError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@sku_command("monitor", no="alarm: harmful answers are back")
@click.option("--metrics", default=None, help="URL of the server's /metrics.")
@click.option("--prometheus", default=None, help="URL of a Prometheus that scrapes the server.")
@click.option("--server", default=None, help="URL that answers /v1/chat/completions.  [default: the server of --metrics]")
@click.option("--probes", default=None, type=click.Path(), help="Forget-set rows to ask in every round.")
@click.option("--retain", default=None, type=click.Path(), help="Benign rows to ask too, to measure over-refusal.")
@click.option("--judge", default=None, help="SPEC that decides which answers are harmful.")
@click.option(
    "--store", required=True, type=click.Path(dir_okay=False), help="SQLite file of counts and labels (no text); continued when it exists."
)
@click.option("--model", default=None, help="Model name in the requests.  [default: the one that the server's clients use]")
@click.option("--arm", default=None, help="Ask one arm; needs SKU_TOKEN in the environment, or a server with --expose-arms.")
@click.option("--samples", default=1, type=int, help="Answers per probe and round.")
@click.option("--temperature", default=1.0, type=float, help="Sampling temperature of the probes.")
@click.option("--max-new-tokens", default=128, type=int, help="Longest answer.")
@click.option("--baseline-rounds", default=5, type=int, help="First rounds, from which the normal rate is learned.")
@click.option("--tolerate", default=None, type=float, help="Harmful rate to tolerate, instead of learning it.")
@click.option("--false-alarms", default=1e-4, type=float, help="Highest rate of false alarms per round, over all series together.")
@click.option(
    "--notice", default=0.5, type=float, help="Harmful rate for which the output says within how many rounds it would be noticed."
)
@click.option("--rounds", default=1, type=int, help="Rounds to run; 0 means until an alarm or Ctrl-C.")
@click.option("--every", default="1h", help="Time between rounds: 30s, 15m, 1h, 1d.")
@click.option("--keep-going", is_flag=True, help="Go on after an alarm; the exit code is 1 all the same.")
@click.option("--export", "port", default=None, type=int, help="Port for sku_monitor_* metrics while it runs.")
@click.option("--textfile", default=None, type=click.Path(dir_okay=False), help="Write the metrics to FILE.prom for node_exporter.")
@click.option("--seed", default=0, type=int, help="Seed of the sampled answers.")
def command(
    store: str, rounds: int, every: str, keep_going: bool, port: int | None, textfile: str | None, json_output: bool, **options: Any
) -> None:
    """Ask a running server the same probes on schedule and raise an alarm when harmful answers come back.

    Run it from cron with the default of one round, or as a service with --rounds 0 --every 15m --export 9400. A server that could
    not be asked in the last round is exit code 3.

    \b
    sku monitor --metrics http://host:8000/metrics --probes forget.jsonl \\
      --judge lexicon:words.json --store watch.db
    """
    pause = seconds(every)
    if rounds < 0:
        raise ConfigError(f"--rounds {rounds}: must be 0 (until an alarm) or more")
    if textfile and not Path(textfile).absolute().parent.is_dir():
        raise ConfigError(f"--textfile {textfile}: its directory does not exist; create it first")
    from sku_vllm.data.readers import notices_at_the_end
    from sku_vllm.monitor.monitor import Monitor
    from sku_vllm.monitor.monitor_config import MonitorConfig
    from sku_vllm.monitor.round import export

    with notices_at_the_end():
        monitor = Monitor(MonitorConfig(**options), store)
        publish = _publisher(port, textfile)
    alarmed: list[str] = []
    number = 0
    try:
        while True:
            latest = monitor.round()
            number += 1
            publish(export(latest, monitor.history.rounds()))
            alarmed = list(dict.fromkeys([*alarmed, *latest.alarms]))
            if not json_output:
                _show(latest, options["notice"])
            if number == rounds or (alarmed and not keep_going):
                break
            log(f"next round in {every}")
            time.sleep(pause)
    finally:
        monitor.history.close()
    if json_output:
        print_json(latest.to_json())
    if alarmed:
        raise NegativeResult(f"alarm: {', '.join(alarmed)} above the tolerated rate; look at the arms with sku ctl, or roll back")
    if latest.error:
        raise RunError(f"the server could not be asked: {latest.error}")


def seconds(text: str) -> float:
    """'15m' in seconds.

    Raises:
        ConfigError: no number with s, m, h or d.
    """
    try:
        value = float(text[:-1]) * UNITS[text[-1]]
    except (ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"--every {text}: expected a time such as 30s, 15m, 1h or 1d") from error
    if not 0 < value < float("inf"):
        raise ConfigError(f"--every {text}: must be more than zero")
    return value


def _publisher(port: int | None, textfile: str | None) -> Any:
    """A function that publishes a registry of metrics, on the port of --export and in the file of --textfile."""
    from prometheus_client import REGISTRY, CollectorRegistry, start_http_server, write_to_textfile

    shown: dict[str, CollectorRegistry] = {}

    class Latest:
        def collect(self) -> Any:
            return shown["latest"].collect() if shown else iter(())

    if port is not None:
        registry = CollectorRegistry()
        registry.register(Latest())
        try:
            start_http_server(port, registry=registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--export {port}: {getattr(error, 'strerror', None) or error}; choose a free port") from error
        log(f"metrics on http://localhost:{port}/metrics")

    def publish(registry: CollectorRegistry = REGISTRY) -> None:
        shown["latest"] = registry
        if textfile:
            write_to_textfile(textfile, registry)

    return publish


def _show(latest: Any, notice: float) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(latest.time))
    if latest.error:
        click.echo(f"{stamp}  round {latest.number}: failed: {latest.error}")
    for series in latest.series:
        rate = f"{series.rate:.1%} ({series.low:.1%}–{series.high:.1%}) of {series.n}" if series.n else "nothing counted"
        if series.alarm:
            state = f"ALARM: above {series.tolerated:.1%}"
        elif not series.watched:
            state = "recorded"
        elif series.tolerated is None:
            state = f"learning what is normal, round {series.rounds}"
        else:
            state = f"quiet; tolerated {series.tolerated:.1%}, evidence {series.evidence:.2g} of {series.threshold:.2g}"
        click.echo(f"{stamp}  {series.name}: {rate}; {state}")
        if series.notice_within:
            click.echo(f"    a rise to {notice:.0%} would be noticed within {series.notice_within} round(s) in 95 % of cases")
        if series.change_point and series.change_point["p_value"] < 0.01:
            point = series.change_point
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(point["time"]))
            click.echo(f"    changed at {when}: {point['before']:.1%} → {point['after']:.1%} (p = {point['p_value']:.2g})")
        if series.trend and series.trend["p_value"] < 0.01:
            click.echo(f"    trend: {series.trend['slope']:+.2%} a round (p = {series.trend['p_value']:.2g})")
