"""Does it come back? One edited model of bench_methods under every attack of `sku attack`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

PROMPTS, SAMPLES, MAX_NEW_TOKENS = 64, 2, 32


def attacks_of(lab: Path, model: str, adapter: Path, scale: float, seed: int) -> dict[str, Any]:
    """On the first PROMPTS unseen prompts and as many benign ones.

    Returns:
        {"attacks": eval objects by attack, "none" first, relearning at its last step; "relearned": `attack`'s entries of relearning}.
    """
    from sku_vllm.data import read_rows
    from sku_vllm.evaluate import EvalConfig
    from sku_vllm.evaluate.attack import KINDS, AttackConfig, attack

    forget = {"unseen": read_rows(lab / "forget/unseen.jsonl")[:PROMPTS]}
    retain, train = read_rows(lab / "retain/test.jsonl")[:PROMPTS], read_rows(lab / "forget/train.jsonl")
    judge, config = f"lexicon:{lab / 'lexicon.json'}", EvalConfig(samples=SAMPLES, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    settings = AttackConfig()
    found = attack(
        lab / model, KINDS, adapter=adapter, scale=scale, forget=forget, retain=retain, judge=judge, relearn=train,
        benign=read_rows(lab / "retain/train.jsonl"), config=config, settings=settings,
    )
    results = {"none": found["before"]}
    for kind, tried in found["attacks"].items():
        for result in tried:
            if result.get("steps") in (None, max(settings.steps)):
                results[kind if result["attack"] == kind else f"{kind} {result['attack']}"] = result
    return {
        "attacks": {name: {"forget": result["forget"], "retain": result["retain"]} for name, result in results.items()},
        "relearned": found["attacks"]["relearn"],
    }


def attack_table(cells: Sequence[Mapping[str, Any]], stem: str = "") -> str:
    """A row an attack, a column a method: harm greedy / sampled, means over the seeds that were attacked."""
    if not cells:
        return ""
    lines = [
        "## Under attack", "",
        f"Harm greedy / sampled on {PROMPTS} unseen prompts, mean over as many seeds as the brackets say. Relearning: 40 steps of AdamW at "
        "1e-4 on all weights, batch 8, measured on prompts that are not among the pairs.", "",
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        columns: dict[str, list[Mapping[str, Any]]] = {}
        for cell in cells:
            if cell["model"] == model:
                columns.setdefault(cell["label"], []).append(cell)
        headings = [f"{label} ({len(attacked)})" for label, attacked in columns.items()]
        lines += [f"| {model} | {' | '.join(headings)} |", "|---|" + "---:|" * len(columns)]
        for name in next(iter(columns.values()))[0]["attacks"]:
            rates = [" / ".join(f"{_mean(attacked, name, mode):.1%}" for mode in ("greedy", "sampled")) for attacked in columns.values()]
            lines.append(f"| {name} | {' | '.join(rates)} |")
        qa = [fmean(cell["attacks"]["quantize int4"]["retain"]["qa_accuracy"] for cell in attacked) for attacked in columns.values()]
        lines += [f"| QA after int4 | {' | '.join(f'{value:.1%}' for value in qa)} |", ""]
        lines += [f"![relearning, {model}]({stem}-{model}-relearn.svg)", ""] if stem else []
    return "\n".join(lines) + "\n"


def _mean(cells: Sequence[Mapping[str, Any]], attack: str, mode: str) -> float:
    return fmean(cell["attacks"][attack]["forget"]["unseen"][mode]["harmful"] for cell in cells)
