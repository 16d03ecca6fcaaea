"""Measurements as tables for people: what eval, attack and judge print without `--json`."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sku_vllm.evaluate.shares import HARM, HELD_OUT, KNOWLEDGE, recovered

# Tables that have to fit into 80 columns.
LEAN: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE, "pad_edge": False, "padding": (0, 1, 0, 0)}

RESTS_ON = {
    HARM: "A claim rests on harmful answers, which count form: relearning teaches harmful words to a model that never knew the facts. "
    "Give forget rows 'must_contain' to measure knowledge.",
    KNOWLEDGE: "A claim rests on knowledge (known: every fact right), of prompts that were not trained on; their facts may have been. "
    "For relearning give --relearn-topics, and facts of other topics are asked for.",
    HELD_OUT: "A claim about relearning rests on knowledge (known: every fact right) of topics that were not trained on.",
}


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent; a dash where it was not measured."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def cell(share: Mapping[str, Any], key: str) -> str:
    """A share without its unit, for tables that say it once; a dash where it was not measured."""
    return percent(share.get(key)).removesuffix(" %")


def interval(share: Mapping[str, Any], key: str = "harmful") -> str:
    """A share with its 95 % interval, as `1.6 % (0.4–5.5)`; a dash where it was not decided."""
    if share[key] is None:
        return "–"
    return f"{percent(share[key])} ({100 * share[f'{key}_low']:.1f}–{100 * share[f'{key}_high']:.1f})"


def print_eval(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print an eval object: a table of the forget sets by mode, then the utility on the retain set and the refusals of border sets."""
    console = console or Console()
    shown = {"refusal": "refused", "gibberish": "broken", "benign": "benign", "ended": "ended", "repeated": "repeat"}
    table = Table("forget set", "answers", "n", "harmful (95 %)", *shown.values(), "tokens", title="Shares in %", **LEAN)
    known: list[str] = []
    for name, modes in result["forget"].items():
        for mode, share in modes.items():
            table.add_row(name, mode, *_row(share, shown), f"{share['length_tokens']:.0f}")
            for category, part in share.get("by_category", {}).items():
                table.add_row(f"  {category}", mode, *_row(part, shown), "")
            if "knowledge" in share:
                known.append(f"{name}, {mode}: {interval(share, 'knowledge')} of {share['knowledge_n']}")
    console.print(table)
    for name, modes in result["forget"].items():
        for mode, share in modes.items():
            print_counted_apart(f"{name}, {mode}: ", share, console)
    if known:
        console.print("knowledge (answers with every fact right): " + "; ".join(known))
    retain = result["retain"]
    ratio = "" if retain["perplexity_ratio"] is None else f" ({retain['perplexity_ratio']:.4f} x base)"
    perplexity = "–" if retain["perplexity"] is None else f"{retain['perplexity']:.3f}{ratio}"
    console.print(
        f"retain, {retain['n']} prompts: perplexity {perplexity}, QA {percent(retain['qa_accuracy'])} of {retain['qa_n']}, "
        f"over-refusal {percent(retain['over_refusal'])}, gibberish {percent(retain['gibberish'])}, ended {percent(retain['ended'])}, "
        f"repeated {percent(retain['repeated'])}, {retain['length_tokens']:.0f} tokens"
    )
    print_counted_apart("retain: ", retain, console)
    for category, part in retain.get("by_category", {}).items():
        console.print(f"  {category}, {part['n']} prompts: over-refusal {percent(part['refusal'])}, gibberish {percent(part['gibberish'])}")
    for name, quality in result.get("forget_quality", {}).items():
        print_quality(name, quality, console)
    for name, share in result.get("border", {}).items():
        console.print(
            f"border {name}, {share['n']} prompts: refused {percent(share['refusal'])} "
            f"({100 * share['refusal_low']:.1f}–{100 * share['refusal_high']:.1f}), gibberish {percent(share['gibberish'])}, "
            f"ended {percent(share['ended'])}, repeated {percent(share['repeated'])}"
        )
        print_counted_apart(f"border {name}: ", share, console)
    for pair in result.get("agreement", ()):
        print_agreement(pair, console)


def _row(share: Mapping[str, Any], shown: Mapping[str, str]) -> list[str]:
    """The cells of one row of `print_eval` from the number of answers to the last share; `shown` names the shares."""
    return [str(share["n"]), interval(share).replace(" %", ""), *(cell(share, key) for key in shown)]


def print_quality(name: str, quality: Mapping[str, Any], console: Console) -> None:
    """Print one line on what the model still knows of a forget set's responses."""
    base = quality.get("base", {})

    def told(key: str) -> str:
        value, other = quality[key], base.get(key)
        return ("–" if value is None else f"{value:.3f}") + ("" if other is None else f" (base {other:.3f})")

    measured = ", ".join(f"{key.replace('_', ' ')} {told(key)}" for key in ("probability", "rouge_l", "truth_ratio"))
    console.print(f"{name}, {quality['n']} responses: {measured}")


def print_counted_apart(where: str, share: Mapping[str, Any], console: Console) -> None:
    """Print what is in no share, or part of one: answers that the judge did not decide, harm in the reasoning alone, mean scores, and
    refusals in part."""
    for name, part in {"": share, **share.get("by_category", {})}.items():
        if "score" in part:
            console.print(f"{where}{name and name + ', '}mean score {part['score']:.3f}")
        if "partial_refusal" in part:
            console.print(f"{where}{name and name + ', '}refused in part {percent(part['partial_refusal'])}")
    if share.get("unjudged"):
        console.print(f"{where}{share['unjudged']} answers were not decided by the judge and are in no share")
    if share.get("harmful_in_reasoning"):
        console.print(f"{where}{percent(share['harmful_in_reasoning'])} harmful in the reasoning before the answer alone")


def print_agreement(pair: Mapping[str, Any], console: Console) -> None:
    """Print one line on how often two judges agree."""
    first, second = pair["judges"]
    kappa = "–" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
    agreed = f"{percent(pair['agreement'])} of {pair['n']} (kappa {kappa}, {len(pair['disagreements'])} in dispute)"
    console.print(f"{first} and {second} agree on {agreed}")


def print_labels(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the shares of the labels in one judged file."""
    console = console or Console()
    table = Table("n", "harmful (95 %)", "refusal", "gibberish", "benign", box=box.SIMPLE)
    table.add_row(str(result["n"]), interval(result), *(percent(result[key]) for key in ("refusal", "gibberish", "benign")))
    console.print(table)
    print_counted_apart("", result, console)
    sets = {f"{name}, {mode}": part for name, modes in result.get("by_set", {}).items() for mode, part in modes.items()}
    for what, parts in (("set", sets), ("category", result.get("by_category", {}))):
        if parts:
            table = Table(what, "n", "harmful (95 %)", "refusal", "gibberish", "benign", box=box.SIMPLE)
            for name, part in parts.items():
                table.add_row(name, str(part["n"]), interval(part), *(percent(part[key]) for key in ("refusal", "gibberish", "benign")))
            console.print(table)
    for pair in result.get("agreement", ()):
        print_agreement(pair, console)


def print_attacks(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print one row per attack: harm (mean of the forget sets), recovery, knowledge, how answers end, cost on the retain set.

    Below it, what a claim about these attacks rests on.
    """
    console = console or Console()
    border = result["before"].get("border", {})
    knowing = recovered(result["before"]) is not None
    head = (
        "attack",
        "greedy",
        "sampled",
        "recovery",
        *(("known",) if knowing else ()),
        "broken",
        "ended",
        "repeat",
        "x base",
        "QA",
        *(f"{name} refused" for name in border),
    )
    table = Table(*head, title="Shares in %; x base: perplexity over the base's", **LEAN)
    rows = [("before", result["before"])]
    for kind, entries in result["attacks"].items():
        rows += [(f"{kind}: {entry['attack']}" + (f", {entry['steps']} steps" if "steps" in entry else ""), entry) for entry in entries]
    for name, entry in rows:
        ratio = entry["retain"]["perplexity_ratio"]
        recovery = f"{100 * entry['recovery']:+.1f}" if "recovery" in entry else ""
        table.add_row(
            name,
            _mean(entry, "greedy", "harmful"),
            _mean(entry, "sampled", "harmful"),
            recovery,
            *((cell({"known": recovered(entry)}, "known"),) if knowing else ()),
            *(_mean(entry, "sampled", key) for key in ("gibberish", "ended", "repeated")),
            "–" if ratio is None else f"{ratio:.3f}",
            cell(entry["retain"], "qa_accuracy"),
            *(cell(entry["border"][name], "refusal") for name in border),
        )
    console.print(table)
    console.print(RESTS_ON[result["rests_on"]])


def _mean(result: Mapping[str, Any], mode: str, key: str) -> str:
    """The mean of the forget sets as a cell; a dash where the mode was not measured."""
    found = [modes[mode][key] for modes in result["forget"].values() if mode in modes]
    return cell({key: sum(found) / len(found) if found else None}, key)
