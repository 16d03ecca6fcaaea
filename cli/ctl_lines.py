"""What `sku ctl` prints: the control API's answers as lines of text."""

import json
from collections.abc import Iterator
from typing import Any


def describe(action: str, answer: Any) -> str:
    """The server's answer as a few lines of text."""
    if action == "ready":
        return "ready: every arm is served"
    if action == "experiment":
        return "\n".join(experiment_lines(answer))
    if action in ("swap", "restore"):
        return swap_line(answer)
    if "servers" in answer:
        return "\n".join(f"{server}: {describe(action, each)}" for server, each in answer["servers"].items())
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
    """The lines of `status` after the list of arms."""
    ending = answer.get("closing") and "shutting down"
    yield "ready" if answer["ready"] else f"NOT READY: {answer['broken'] or ending or 'arms are still loading'}"
    yield from (f"arm {name} answers 503: {why}" for name, why in answer["failures"].items())
    yield f"{answer['in_flight']} requests in flight"
    if answer["judge"]:
        health = answer["judge_health"]
        yield f"judge {answer['judge']} on {answer['judge_sample']:.0%} of answers, {answer['judge_waiting']} waiting for it"
        yield from [health["blind"].upper()] if health["blind"] else []
        if health["last_error"]:
            last = health["last_error"]
            yield f"no verdict on {health['unread_share']:.0%} of its last answers; last at {last['time']}: {last['reason']}"
    else:
        yield "no judge: rates are not measured (start with --judge)"
    yield f"state in {answer['state']}" if answer["state"] else "no --state: a restart forgets weights and arms that were changed"
    follow = answer["follow"]
    if follow:
        yield f"follows {follow['file']}" + (f", which is NOT IN FORCE: {follow['problem']}" if follow["problem"] else "")
    yield f"clients ask for {' or '.join(answer['aliases'])}"
    shown = "clients may choose an arm" if answer["expose_arms"] else "only X-SKU-Token may choose an arm"
    yield f"sku {answer['version']}; {shown}{'; responses do not name it' if answer['blind'] else ''}"


def swap_line(answer: Any) -> str:
    """The result of a whole-model swap or of a restore in one line."""
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
    """The source of a whole-model swap as `sku ctl swap` takes it."""
    return f"{swap['adapter']}@{swap['scale']:g}" if "adapter" in swap else str(swap["checkpoint"])


def experiment_lines(answer: Any) -> list[str]:
    """One line per arm, per comparison, and per caveat or note."""
    lines = []
    for name, row in answer["arms"].items():
        rate = (
            "not judged"
            if row["harmful_rate"] is None
            else f"harmful {row['harmful_rate']:.1%} [{row['harmful_low']:.1%}, {row['harmful_high']:.1%}] of {row['judged']}"
        )
        cut, p50 = row["length_limited_rate"], row["latency_s"]["p50"]
        lines.append(
            f"{name:16} {rate}  refusals {row['refusal_rate'] or 0:.1%}  gibberish {row['gibberish_rate'] or 0:.1%}  "
            f"cut by the length limit {'-' if cut is None else f'{cut:.1%}'}  p50 {'-' if p50 is None else f'{p50:.3f} s'}"
        )
    for name, each in answer["comparisons"].items():
        worth = "; ".join(f"{size:.0f}" for size in each["effective"])
        lines.append(
            f"{name} against {answer['reference']}: {each['recommendation']} (answers of one user correlate by "
            f"{each['correlation']:.2f}, so these are worth {worth} independent ones)"
        )
    return [*lines, *(f"note: {text}" for text in [*answer["caveats"], *answer.get("notes", [])])]
