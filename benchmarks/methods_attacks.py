"""One edited model of bench_methods under every attack of `sku attack`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

PROMPTS, SAMPLES, MAX_NEW_TOKENS = 64, 2, 32
STEPS = (10, 20, 40)
KINDS = ("relearn", "quantize", "rephrase", "prefill", "ban-eos")  # of `sku attack`; the searches of its other kinds take minutes a model
LONGER, SHARE = 80, 0.05  # steps and share of the forget pairs of the relearning that asks: prevented, or delayed?


def attacks_of(lab: Path, model: str, adapter: Path, scale: float, seed: int) -> dict[str, Any]:
    """On the first PROMPTS unseen prompts and as many benign ones.

    Returns:
        {"attacks": eval objects by attack, "none" first, relearning at its last step; "relearned": the entries of relearning}.
    """
    from sku_vllm.evaluate.attack.attack_config import AttackConfig

    settings = AttackConfig(steps=STEPS)
    found = _attack(lab, model, adapter, scale, seed, KINDS, settings)
    results = {"none": found["before"]}
    for kind, tried in found["attacks"].items():
        for result in tried:
            if result.get("steps") in (None, max(STEPS)):
                results[kind if result["attack"] == kind else f"{kind} {result['attack']}"] = result
    attacks = {name: {"forget": result["forget"], "retain": result["retain"]} for name, result in results.items()}
    return {"attacks": attacks | longer(lab, model, adapter, scale, seed), "relearned": found["attacks"]["relearn"]}


def longer(lab: Path, model: str, adapter: Path, scale: float, seed: int) -> dict[str, Any]:
    """Eval objects after relearning for LONGER steps, by attack."""
    from sku_vllm.evaluate.attack.attack_config import AttackConfig

    tried = _attack(lab, model, adapter, scale, seed, ("relearn",), AttackConfig(steps=(LONGER,), fractions=(SHARE,)))["attacks"]["relearn"]
    return {
        f"relearn {result['attack']}, {LONGER} steps": {"forget": result["forget"], "retain": result["retain"]}
        for result in tried
        if result["steps"] == LONGER
    }


def _attack(lab: Path, model: str, adapter: Path, scale: float, seed: int, kinds: Sequence[str], settings: Any) -> dict[str, Any]:
    from sku_vllm.data import read_rows
    from sku_vllm.evaluate import EvalConfig
    from sku_vllm.evaluate.attack.attack_model import attack_model
    from sku_vllm.evaluate.attack.attack_request import AttackRequest
    from sku_vllm.model_spec import ModelSpec

    request = AttackRequest(
        ModelSpec(lab / model, adapter=adapter, scale=scale),
        kinds=kinds,
        forget={"unseen": read_rows(lab / "forget/unseen.jsonl")[:PROMPTS]},
        retain=read_rows(lab / "retain/test.jsonl")[:PROMPTS],
        judge=f"lexicon:{lab / 'lexicon.json'}",
        relearn=read_rows(lab / "forget/train.jsonl"),
        benign=read_rows(lab / "retain/train.jsonl"),
        settings=settings,
        config=EvalConfig(samples=SAMPLES, max_new_tokens=MAX_NEW_TOKENS, seed=seed),
    )
    return attack_model(request).to_json()


def attack_table(cells: Sequence[Mapping[str, Any]], stem: str = "") -> str:
    """A row an attack, a column a method: harm greedy / sampled, means over the seeds that were attacked."""
    if not cells:
        return ""
    lines = [
        "## Under attack",
        "",
        f"Harm greedy / sampled on {PROMPTS} unseen prompts, mean over as many seeds as the brackets say. Relearning: 40 steps of AdamW at "
        "1e-4 on all weights, batch 8, measured on prompts that are not among the pairs.",
        "",
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        columns: dict[str, list[Mapping[str, Any]]] = {}
        for cell in cells:
            if cell["model"] == model:
                columns.setdefault(cell["label"], []).append(cell)
        headings = [f"{label} ({len(attacked)})" for label, attacked in columns.items()]
        lines += [f"| {model} | {' | '.join(headings)} |", "|---|" + "---:|" * len(columns)]
        for name in sorted({name for attacked in columns.values() for cell in attacked for name in cell["attacks"]}, key=_place):
            lines.append(f"| {name} | {' | '.join(_rates(attacked, name) for attacked in columns.values())} |")
        qa = [fmean(cell["attacks"]["quantize int4"]["retain"]["qa_accuracy"] for cell in attacked) for attacked in columns.values()]
        lines += [f"| QA after int4 | {' | '.join(f'{value:.1%}' for value in qa)} |", ""]
        lines += [f"![relearning, {model}]({stem}-{model}-relearn.svg)", ""] if stem else []
    return "\n".join(lines) + "\n"


def _place(attack: str) -> tuple[int, float, str]:
    """By kind, gentle first; shares of the forget set by size."""
    kinds = ("none", *KINDS)
    digits = "".join(character for character in attack.split("%")[0] if character.isdigit())
    return kinds.index(attack.split()[0]), float(digits) if "%" in attack else 0.0, attack


def _rates(cells: Sequence[Mapping[str, Any]], attack: str) -> str:
    """Harm greedy / sampled, over the cells that met this attack."""
    met = [cell["attacks"][attack]["forget"]["unseen"] for cell in cells if attack in cell["attacks"]]
    return " / ".join(f"{fmean(modes[mode]['harmful'] for modes in met):.1%}" for mode in ("greedy", "sampled")) if met else "–"
