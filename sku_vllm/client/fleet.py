"""One change on several servers: on all of them, or on none.

What needs to be agreed on between requests (who is in which arm) is a pure function of key and split, so replicas need no protocol of
their own: it is enough that every one of them gets the same change.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from sku_vllm.client.control import ControlClient
from sku_vllm.errors import RunError, SkuError

Request = tuple[str, str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A request to the control API. trial: whether it can be tried first (`dry_run`)."""

    method: str
    path: str
    body: Any
    trial: bool

    def undone(self, before: Mapping[str, Any]) -> Request:
        """The request that undoes it on a server whose status was `before`."""
        name = self.path.partition("/")[2]
        arms = before["arms"]
        if self.path == "weights":
            return "PUT", "weights", {"weights": {arm: each["weight"] for arm, each in arms.items()}}
        if self.path == "judging":
            return "PUT", "judging", {"sample": before["judge_sample"]}
        if self.path in ("swap", "restore"):
            return ("POST", "swap", before["swap"]) if before["swap"] else ("POST", "restore", None)
        if self.method == "POST":
            return "DELETE", f"arms/{self.body['name']}", None
        if self.method == "DELETE":
            place = list(arms).index(name)  # their order says which keys each arm gets, and it is the same on every replica
            return "POST", "arms", {"name": name, "spec": arms[name]["spec"], "version": arms[name]["version"], "place": place}
        return "PUT", self.path, {"spec": arms[name]["spec"], "version": arms[name]["version"]}

    def same_version(self) -> "Change":
        """This change with a new version for the arm, the same on every server, so that their verdicts can be added up."""
        if self.path.partition("/")[0] != "arms" or self.method == "DELETE":
            return self
        return replace(self, body={**self.body, "version": secrets.token_hex(6)})


def apply_to_all(clients: Sequence[ControlClient], change: Change, dry_run: bool) -> dict[str, Any]:
    """{server: its answer}. Every server is asked first whether it is ready and could make the change; if one cannot, none does.

    Raises:
        RunError: a server cannot be reached, refuses or fails; those that had changed are as before, or are named.
    """
    change = change.same_version()
    before, problems = together(clients, lambda client: client.call("GET", "status"))
    problems |= {name: "is not ready" for name, status in before.items() if not status["ready"]}
    if not problems and change.trial:
        tried, problems = together(clients, lambda client: client.call(change.method, change.path, change.body, dry_run=True))
        if dry_run and not problems:
            return tried
    if problems:
        raise RunError(f"nothing was changed: {told(problems)}")
    done, problems = together(clients, lambda client: client.call(change.method, change.path, change.body))
    if not problems:
        return done
    changed = [client for client in clients if client.name in done]
    _, stuck = together(changed, lambda client: client.call(*change.undone(before[client.name])))
    if stuck:
        raise RunError(f"{told(problems)}; and these could not be changed back, look at them with sku ctl status: {told(stuck)}")
    raise RunError(f"{told(problems)}; {'the others were changed back' if changed else 'nothing was changed'}")


def together(clients: Sequence[ControlClient], ask: Callable[[ControlClient], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers by server, and the problems by server, of one request to each at the same time."""

    def one(client: ControlClient) -> tuple[str, Any, str | None]:
        try:
            return client.name, ask(client), None
        except SkuError as error:
            return client.name, None, str(error)

    with ThreadPoolExecutor(max(1, len(clients))) as pool:
        found = list(pool.map(one, clients))
    return {name: answer for name, answer, problem in found if problem is None}, {name: problem for name, _, problem in found if problem}


def told(problems: Mapping[str, str]) -> str:
    """The problems in one line."""
    return "; ".join(f"{name}: {problem}" if not problem.startswith(name) else problem for name, problem in problems.items())
