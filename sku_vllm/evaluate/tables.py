"""Measurements as tables for people."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def interval(share: Mapping[str, Any]) -> str:
    """`1.6 % (0.4–5.5)`: a rate never travels without its interval."""
    if share["harmful"] is None:
        return "–"
    return f"{percent(share['harmful'])} ({100 * share['harmful_low']:.1f}–{100 * share['harmful_high']:.1f})"


def print_eval(result: Mapping[str, Any], console: Console | None = None) -> None:
    """The forget sets by mode, then the utility on the retain set."""
    console = console or Console()
    table = Table("forget set", "answers", "n", "harmful (95 %)", "refusal", "gibberish", "benign", box=box.SIMPLE)
    for name, modes in result["forget"].items():
        for mode, share in modes.items():
            rest = [percent(share[key]) for key in ("refusal", "gibberish", "benign")]
            table.add_row(name, mode, str(share["n"]), interval(share), *rest)
    console.print(table)
    retain = result["retain"]
    ratio = "" if retain["perplexity_ratio"] is None else f" ({retain['perplexity_ratio']:.4f} x base)"
    perplexity = "–" if retain["perplexity"] is None else f"{retain['perplexity']:.3f}{ratio}"
    console.print(
        f"retain, {retain['n']} prompts: perplexity {perplexity}, QA {percent(retain['qa_accuracy'])} of {retain['qa_n']}, "
        f"over-refusal {percent(retain['over_refusal'])}, gibberish {percent(retain['gibberish'])}"
    )
    for pair in result.get("agreement", ()):
        print_agreement(pair, console)


def print_agreement(pair: Mapping[str, Any], console: Console) -> None:
    first, second = pair["judges"]
    kappa = "–" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
    agreed = f"{percent(pair['agreement'])} of {pair['n']} (kappa {kappa}, {len(pair['disagreements'])} in dispute)"
    console.print(f"{first} and {second} agree on {agreed}")


def print_labels(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Shares of the labels of one file."""
    console = console or Console()
    table = Table("n", "harmful (95 %)", "refusal", "gibberish", "benign", box=box.SIMPLE)
    table.add_row(str(result["n"]), interval(result), *(percent(result[key]) for key in ("refusal", "gibberish", "benign")))
    console.print(table)
    for pair in result.get("agreement", ()):
        print_agreement(pair, console)


def print_attacks(result: Mapping[str, Any], console: Console | None = None) -> None:
    """A row an attack: harm greedy and sampled (mean of the forget sets), what came back, and the cost on the retain set."""
    console = console or Console()
    table = Table("attack", "greedy", "sampled", "recovery", "gibberish", "perplexity x base", "QA", box=box.SIMPLE)
    rows = [("before", result["before"])]
    for kind, entries in result["attacks"].items():
        rows += [(f"{kind}: {entry['attack']}" + (f", {entry['steps']} steps" if "steps" in entry else ""), entry) for entry in entries]
    for name, entry in rows:
        ratio = entry["retain"]["perplexity_ratio"]
        recovery = f"{100 * entry['recovery']:+.1f}" if "recovery" in entry else ""
        table.add_row(
            name, percent(_mean(entry, "greedy", "harmful")), percent(_mean(entry, "sampled", "harmful")), recovery,
            percent(_mean(entry, "sampled", "gibberish")), "–" if ratio is None else f"{ratio:.3f}",
            percent(entry["retain"]["qa_accuracy"]),
        )
    console.print(table)


def _mean(result: Mapping[str, Any], mode: str, key: str) -> float | None:
    found = [modes[mode][key] for modes in result["forget"].values() if mode in modes]
    return sum(found) / len(found) if found else None
