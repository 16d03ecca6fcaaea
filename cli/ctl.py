"""`sku ctl`: change a running server through its control API."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import click

from sku_vllm.cli.options import print_json, sku_command
from sku_vllm.errors import ConfigError, NegativeResult, RunError

ACTIONS = {
    "status": "status                        arms, weights, swap, requests in flight",
    "arms": "arms                          arms and their weights",
    "ready": "ready                         exit 0 once the server serves every arm, 1 while they load",
    "weights": "weights NAME=W,NAME=W         change the split at once, in every process",
    "add": "add NAME=SPEC                 a new arm with weight 0, SPEC as in sku serve --arm",
    "replace": "replace NAME=SPEC             another adapter or scale under the same name, nothing fails",
    "remove": "remove NAME                   an arm of weight 0",
    "swap": "swap ADAPTER@SCALE | DIR      the engine's own weights: minus an adapter, or a fused checkpoint",
    "restore": "restore                       the base's own weights again",
    "judging": "judging SHARE                 judge this share of answers from now on, until a restart",
    "experiment": "experiment                    rates, intervals, latencies, recommendation",
}


@sku_command("ctl", no="not ready yet")
@click.option("--server", default="http://127.0.0.1:8000", help="Where the server listens.")
@click.option("--token", envvar="SKU_TOKEN", help="Its control token.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="vLLM's own --api-key, where the server has one.")
@click.option("--timeout", type=float, default=600.0, help="Seconds to wait for the answer.")
@click.argument("action", metavar="ACTION")
@click.argument("arguments", nargs=-1, metavar="[ARGUMENT]")
def command(
    json_output: bool, server: str, token: str | None, api_key: str | None, timeout: float, action: str, arguments: tuple[str, ...]
) -> None:
    """Change a running server."""
    from sku_vllm.cli.options import nearest
    from sku_vllm.probe import http_url

    if action not in ACTIONS:
        raise ConfigError(f"sku ctl {action}: unknown action{nearest(action, list(ACTIONS))}")
    if not http_url(server):
        raise ConfigError(f"--server {server}: expected a URL that begins with http:// or https://")
    if not 0 < timeout < 1e9:
        raise ConfigError(f"--timeout {timeout:g}: must be a number of seconds above 0")
    method, path, body = request_of(action, arguments)
    headers = {
        "Content-Type": "application/json",
        **({"X-SKU-Token": token} if token else {}),
        **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
    }
    answer = call(f"{server.rstrip('/').removesuffix('/v1')}/v1/sku/{path}", method, body, headers, timeout)
    print_json(answer) if json_output else click.echo(describe(action, answer))


EXAMPLE = "sku ctl --server http://host:8000 weights original=0.9,negated=0.1"
command.help = "\n".join(["Change a running server. ACTION is one of\n\n\b", *ACTIONS.values(), "\n\b", EXAMPLE])


def request_of(action: str, arguments: tuple[str, ...]) -> tuple[str, str, Any]:
    """(method, path below /v1/sku/, body) of an action.

    Raises:
        ConfigError: arguments that do not belong to it.
    """
    wanted = 0 if action in ("status", "arms", "ready", "restore", "experiment") else 1
    if len(arguments) != wanted:
        raise ConfigError(f"sku ctl {action}: expected {ACTIONS[action].split('  ')[0]}")
    if not wanted:
        return ("POST" if action == "restore" else "GET"), action, None
    value = arguments[0]
    name, _, spec = value.partition("=")
    if action == "weights":
        return "PUT", "weights", {"weights": weights_of(value)}
    if action == "judging":
        return "PUT", "judging", {"sample": share_of(value)}
    if action == "remove":
        return "DELETE", f"arms/{path_safe(value)}", None
    if action == "swap":
        return "POST", "swap", swap_of(value)
    if not name or not spec:
        raise ConfigError(f"sku ctl {action} {value}: expected NAME=SPEC, for instance negated=lora:ADAPTER@1.0")
    if action == "add":
        return "POST", "arms", {"name": name, "spec": absolute(spec)}
    return "PUT", f"arms/{path_safe(name)}", {"spec": absolute(spec)}


def weights_of(text: str) -> dict[str, float]:
    try:
        weights = {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(f"sku ctl weights {text}: expected NAME=WEIGHT,NAME=WEIGHT") from None
    if not all(0 <= weight <= 1 for weight in weights.values()):
        raise ConfigError(f"sku ctl weights {text}: every weight has to lie between 0 and 1")
    return weights


def share_of(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"sku ctl judging {text}: expected a share between 0 and 1")
    return share


def swap_of(value: str) -> dict[str, Any]:
    """ADAPTER@SCALE or a checkpoint directory; relative paths are this shell's, not the server's."""
    from pathlib import Path

    from sku_vllm.cli.options import adapter_at_scale

    path, scale = adapter_at_scale(value)
    if scale is not None:
        return {"adapter": str(Path(path).absolute()), "scale": scale}
    return {"checkpoint": str(Path(value).absolute())}


def absolute(spec: str) -> str:
    from pathlib import Path

    if not spec.startswith("lora:"):
        return spec
    return "lora:" + str(Path(spec.removeprefix("lora:")).absolute())


def path_safe(name: str) -> str:
    import urllib.parse

    return urllib.parse.quote(name, safe="")


def call(url: str, method: str, body: Any, headers: dict[str, str], timeout: float) -> Any:
    """The server's JSON answer.

    Raises:
        ConfigError: the server refused what was asked (4xx). RunError: it could not be reached, or failed.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers, method=method), timeout=timeout) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = text[:500]
        if error.code == 503 and url.endswith("/ready"):
            raise NegativeResult(message) from error
        hint = "; set --token or SKU_TOKEN" if error.code == 401 else ""
        raise (RunError if error.code >= 500 else ConfigError)(f"{url}: {error.code}: {message}{hint}") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{url}: {error}; is the server up, and is --server right?") from error


def describe(action: str, answer: Any) -> str:
    """A few lines for people."""
    if action == "ready":
        return "ready: every arm is served"
    if action == "experiment":
        return "\n".join(experiment_lines(answer))
    if action in ("swap", "restore"):
        return swap_line(answer)
    if "arms" not in answer:
        return json.dumps(answer, indent=2)
    lines = [f"{name:16} {arm['weight']:6.1%}  {arm['spec']}" for name, arm in answer["arms"].items()]
    if answer.get("swap"):
        what = source_of(answer["swap"])
        lines.append(f"whole-model swap in force: {what} has all of this engine's traffic; undo it with sku ctl restore")
    if action == "status":
        lines += status_lines(answer)
    if "seconds" in answer:
        lines.append(f"the new version answers, {answer['seconds']:.3f} s after it was on disk")
    return "\n".join([*lines, *answer.get("notes", [])])


def status_lines(answer: Any) -> Iterator[str]:
    """What beside the arms an operator wants to know."""
    yield "ready" if answer["ready"] else f"NOT READY: {answer['broken'] or 'arms are still loading'}"
    yield from (f"arm {name} answers 503: {why}" for name, why in answer["failures"].items())
    yield f"{answer['in_flight']} requests in flight"
    if answer["judge"]:
        yield f"judge {answer['judge']} on {answer['judge_sample']:.0%} of answers, {answer['judge_waiting']} waiting for it"
    else:
        yield "no judge: rates are not measured (start with --judge)"
    yield f"state in {answer['state']}" if answer["state"] else "no --state: a restart forgets weights and arms that were changed"
    shown = "clients may choose an arm" if answer["expose_arms"] else "only X-SKU-Token may choose an arm"
    yield f"sku {answer['version']}; {shown}{'; responses do not name it' if answer['blind'] else ''}"


def swap_line(answer: Any) -> str:
    """How a whole-model swap or its undoing went."""
    off, source = answer["probe"], answer["swap"]
    if source is None:
        exact = "" if off["from_base"] is None else f"; its probe is {off['from_base']:.2g} nats from the one before any swap"
        return f"the base serves again after {answer['seconds']:.3f} s{exact}"
    near = "" if off["from_expected"] is None else f" and {off['from_expected']:.2g} from the same edit as an adapter"
    return (
        f"{source_of(source)} serves after {answer['seconds']:.3f} s, of which requests waited {answer['stalled_seconds']:.3f} s "
        f"({'edited in place' if answer['in_place'] else 'reloaded'}); its probe is {off['from_base']:.2g} nats from the base{near}"
    )


def source_of(swap: Any) -> str:
    return f"{swap['adapter']}@{swap['scale']:g}" if "adapter" in swap else str(swap["checkpoint"])


def experiment_lines(answer: Any) -> list[str]:
    lines = []
    for name, row in answer["arms"].items():
        rate = (
            "not judged"
            if row["harmful_rate"] is None
            else f"harmful {row['harmful_rate']:.1%} [{row['harmful_low']:.1%}, {row['harmful_high']:.1%}] of {row['judged']}"
        )
        p50 = row["latency_s"]["p50"]
        lines.append(
            f"{name:16} {rate}  refusals {row['refusal_rate'] or 0:.1%}  gibberish {row['gibberish_rate'] or 0:.1%}  "
            f"p50 {'-' if p50 is None else f'{p50:.3f} s'}"
        )
    lines += [f"{name} against {answer['reference']}: {each['recommendation']}" for name, each in answer["comparisons"].items()]
    return [*lines, *(f"note: {text}" for text in [*answer["caveats"], *answer["notes"]])]
