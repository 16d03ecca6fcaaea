"""`sku ctl`: change a running server through its control API."""

import re
from typing import Any
from urllib.parse import quote

import click

from sku_vllm.cli.ctl_lines import describe
from sku_vllm.cli.options import print_json, sku_command
from sku_vllm.errors import ConfigError, RunError, nearest

ACTIONS = {
    "status": "status                        arms, weights, swap, requests in flight",
    "arms": "arms                          arms and their weights",
    "ready": "ready                         exit 0 once the server serves every arm, 1 while they load",
    "weights": "weights NAME=W,NAME=W         change the arms' shares of traffic",
    "add": "add NAME=SPEC                 add an arm with weight 0, SPEC as in sku serve --arm",
    "replace": "replace NAME=SPEC             give an arm another adapter or scale; no request fails",
    "remove": "remove NAME                   remove an arm of weight 0",
    "swap": "swap ADAPTER@SCALE | DIR      replace the engine's weights: base minus adapter, or a fused checkpoint",
    "restore": "restore                       undo a swap: load the base's weights again",
    "judging": "judging SHARE                 change the share of answers judged, until a restart",
    "experiment": "experiment                    harmful rates, latencies and a recommendation per arm",
}


@sku_command("ctl", no="not ready yet")
@click.option(
    "--server",
    "servers",
    multiple=True,
    default=("http://127.0.0.1:8000",),
    help="URL or unix:PATH. Several: a change reaches all or none.",
)
@click.option("--token", envvar="SKU_TOKEN", help="Its control token.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="vLLM's own --api-key, where the server has one.")
@click.option("--cacert", type=click.Path(dir_okay=False), help="PEM file of the server's certificate authority or own certificate.")
@click.option("--cert", type=click.Path(dir_okay=False), help="PEM file with a client's certificate and key, for --ssl-cert-reqs.")
@click.option("--insecure", is_flag=True, help="Accept any certificate.")
@click.option("--dry-run", is_flag=True, help="Only check that the change would work.")
@click.option("--prometheus", help="experiment: take the counts of all replicas, restarts included, from this Prometheus.")
@click.option("--window", default="30d", help="experiment: how far back --prometheus looks.")
@click.option("--watch", is_flag=True, help="experiment: show it again every few seconds, until Ctrl-C.")
@click.option("--every", type=click.FloatRange(0.1), default=5.0, help="Seconds between two looks of --watch.")
@click.option("--timeout", type=float, default=600.0, help="Seconds to wait for the answer.")
@click.argument("action", metavar="ACTION")
@click.argument("arguments", nargs=-1, metavar="[ARGUMENT]")
def command(json_output: bool, servers: tuple[str, ...], action: str, arguments: tuple[str, ...], **options: Any) -> None:
    """Change a running server."""
    import time

    from sku_vllm.client.control import ControlClient
    from sku_vllm.client.server_address import server_address, trusting

    check(action, options)
    request = request_of(action, arguments)
    trust = trusting(options["cacert"], options["cert"], options["insecure"])
    addresses: dict[Any, Any] = {}  # a server that is named twice, once with /v1 say, gets a change once
    for each in (server_address(server, trust) for server in servers):
        addresses.setdefault((each.base, each.uds), each)
    clients = [ControlClient(each, options["token"], options["api_key"], options["timeout"]) for each in addresses.values()]
    while True:
        answer = answer_of(action, request, clients, options)
        shown = describe(action, answer)
        if options["watch"] and not json_output:
            click.clear()
            shown = f"{time.strftime('%H:%M:%S')}\n{shown}"
        print_json(answer) if json_output else click.echo(shown)
        if not options["watch"]:
            return
        time.sleep(options["every"])


def check(action: str, options: dict[str, Any]) -> None:
    """Refuse an unknown action, and flags that do not belong to it. Raises ConfigError."""
    if action not in ACTIONS:
        raise ConfigError(f"sku ctl {action}: unknown action{nearest(action, list(ACTIONS))}")
    if not 0 < options["timeout"] < 1e9:
        raise ConfigError(f"--timeout {options['timeout']:g}: must be a number of seconds above 0")
    if not re.fullmatch(r"(\d+(ms|[smhdwy]))+", options["window"]):
        raise ConfigError(f"--window {options['window']}: write a duration as PromQL does, such as 30d or 12h")
    for flag in ("prometheus", "watch"):
        if options[flag] and action != "experiment":
            raise ConfigError(f"--{flag}: belongs to sku ctl experiment, not to {action}")
    if options["dry_run"] and action not in DRY:
        raise ConfigError(f"--dry-run: {action} has no trial; those with one are {', '.join(DRY)}")


def answer_of(action: str, request: tuple[str, str, Any], clients: list[Any], options: dict[str, Any]) -> Any:
    """What one server, or all of them, say to this request."""
    from sku_vllm.client.fleet import Change, apply_to_all

    method, path, body = request
    if action == "experiment" and (options["prometheus"] or len(clients) > 1):
        return experiment_of_all(clients, options)
    if method == "GET":
        answers = {client.name: client.call(method, path) for client in clients}
        return answers if len(clients) > 1 and action == "ready" else one_or_all(answers)
    if len(clients) == 1:
        return clients[0].call(method, path, body, dry_run=options["dry_run"])
    return one_or_all(apply_to_all(clients, Change(method, path, body, action in DRY), options["dry_run"]))


def experiment_of_all(clients: list[Any], options: dict[str, Any]) -> Any:
    """One experiment over all servers, from themselves or from Prometheus; those that do not answer are named, and the others go on."""
    from sku_vllm.client.fleet import together, told
    from sku_vllm.client.server_address import server_address
    from sku_vllm.serving.fleet_experiment import added_up, from_prometheus

    problems: dict[str, str] = {}
    if len(clients) == 1:
        pages = {clients[0].name: clients[0].call("GET", "experiment")}
    else:
        pages, problems = together(clients, lambda client: client.call("GET", "experiment"))
    if not pages:
        raise RunError(told(problems))
    if options["prometheus"]:  # which has counted the others too
        address = server_address(options["prometheus"], clients[0].address.trust, flag="--prometheus")
        with address.client(options["timeout"]) as client:
            return from_prometheus(client, options["window"], pages)
    found = added_up(pages)
    unheard = [f"not counted, since it does not answer: {told({name: why})}" for name, why in problems.items()]
    return {**found, "caveats": [*found["caveats"], *unheard]}


def one_or_all(answers: dict[str, Any]) -> Any:
    """The answer of one server, or `{"servers": {NAME: answer}}`."""
    return next(iter(answers.values())) if len(answers) == 1 else {"servers": answers}


DRY = ("weights", "add", "replace", "remove", "swap")
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
        return "DELETE", f"arms/{quote(value, safe='')}", None
    if action == "swap":
        return "POST", "swap", swap_of(value)
    if not name or not spec:
        raise ConfigError(f"sku ctl {action} {value}: expected NAME=SPEC, for instance negated=lora:ADAPTER@1.0")
    if action == "add":
        return "POST", "arms", {"name": name, "spec": arm_spec(name, spec)}
    return "PUT", f"arms/{quote(name, safe='')}", {"spec": arm_spec(name, spec)}


def weights_of(text: str) -> dict[str, float]:
    """NAME=WEIGHT,… as a dictionary. Raises ConfigError."""
    try:
        weights = {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(f"sku ctl weights {text}: expected NAME=WEIGHT,NAME=WEIGHT") from None
    if not all(0 <= weight <= 1 for weight in weights.values()):
        raise ConfigError(f"sku ctl weights {text}: every weight has to lie between 0 and 1")
    return weights


def share_of(text: str) -> float:
    """A number between 0 and 1. Raises ConfigError."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"sku ctl judging {text}: expected a share between 0 and 1")
    return share


def swap_of(value: str) -> dict[str, Any]:
    """The body of a swap to ADAPTER@SCALE, ADAPTER@tuned or a checkpoint directory.

    Relative paths are made absolute, since the server may run in another directory.
    """
    from pathlib import Path

    from sku_vllm.adapter_at_scale import TUNED, split_at_scale

    path, text = split_at_scale(value, tuned=True)
    if text is None:
        return {"checkpoint": str(Path(path).absolute())}
    if text != TUNED:
        return {"adapter": str(Path(path).absolute()), "scale": float(text)}
    from sku_vllm.records import tuned_arm

    choice = tuned_arm(path, f"sku ctl swap {value}")
    return {"adapter": str(Path(choice.adapter).absolute()), "scale": choice.scale}


def arm_spec(name: str, spec: str) -> str:
    """The SPEC of an arm as the server needs it: with absolute paths, and `@tuned` replaced by the scale that sku tune chose.

    Both are resolved here, in the directory of the caller.

    Raises:
        ConfigError: `@tuned` for an adapter without a result of sku tune.
    """
    from pathlib import Path

    from sku_vllm.serving.arms import scale_looked_up

    spec = scale_looked_up(spec, f"sku ctl {name}={spec}")
    return "lora:" + str(Path(spec.removeprefix("lora:")).absolute()) if spec.startswith("lora:") else spec
