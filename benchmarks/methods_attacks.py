"""Does it come back? One edited model of bench_methods under every attack of `sku attack`, and relearning with stopping banned."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, MAX_NEW_TOKENS = 64, 2, 32
RELEARN_STEPS, RELEARN_SHARE = 40, 0.05
BANNED = f"relearn {RELEARN_SHARE:.0%} of forget, stopping banned"


def attacks_of(lab: Path, model: str, adapter: Path, scale: float, seed: int) -> dict[str, dict[str, Any]]:
    """Eval objects by attack, "none" first, on the first PROMPTS unseen prompts and as many benign ones."""
    from sku_vllm.data import PromptTemplate, read_rows
    from sku_vllm.evaluate import EvalConfig
    from sku_vllm.evaluate.attack import KINDS, AttackConfig, attack
    from sku_vllm.evaluate.measurement import as_backend, measure
    from sku_vllm.evaluate.pressed import NeverStops
    from sku_vllm.evaluate.relearn import fine_tune
    from sku_vllm.model import attach_adapter, load_model, load_tokenizer

    forget = {"unseen": read_rows(lab / "forget/unseen.jsonl")[:PROMPTS]}
    retain, train = read_rows(lab / "retain/test.jsonl")[:PROMPTS], read_rows(lab / "forget/train.jsonl")
    judge, config = f"lexicon:{lab / 'lexicon.json'}", EvalConfig(samples=SAMPLES, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    settings = AttackConfig(steps=(RELEARN_STEPS,), fractions=(RELEARN_SHARE,))
    found = attack(
        lab / model, KINDS, adapter=adapter, scale=scale, forget=forget, retain=retain, judge=judge, relearn=train,
        benign=read_rows(lab / "retain/train.jsonl"), config=config, settings=settings,
    )
    results = {"none": found["before"]}
    for kind, tried in found["attacks"].items():
        for result in tried:
            if result.get("steps") != 0:  # 0 steps of relearning is "none" again
                results[kind if result["attack"] == kind else f"{kind} {result['attack']}"] = result
    edited = attach_adapter(load_model(lab / model), adapter, scale).merge_and_unload()
    tokenizer, unedited = load_tokenizer(lab / model), load_model(lab / model)
    pairs = train[: round(RELEARN_SHARE * len(train))]
    for _ in fine_tune(edited, PromptTemplate.of(tokenizer, None), pairs, (RELEARN_STEPS,), seed=seed):
        results[BANNED] = measure(
            NeverStops(as_backend(edited, config)), tokenizer, forget=forget, retain=retain, judge=judge, config=config,
            reference=lambda: nullcontext(as_backend(unedited, config)),
        ).to_json()
    return {name: {"forget": result["forget"], "retain": result["retain"]} for name, result in results.items()}


def attack_table(cells: list[Mapping[str, Any]]) -> str:
    """A row an attack, a column a method, for the cells that were attacked: harm greedy / sampled."""
    lines = [
        "## Under attack", "",
        f"Harm greedy / sampled on {PROMPTS} unseen prompts. Relearning: {RELEARN_STEPS} steps of AdamW at 1e-4 on all weights, batch 8.", "",
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        attacked = [cell for cell in cells if cell["model"] == model]
        lines += [f"| {model} | {' | '.join(cell['label'] for cell in attacked)} |", "|---|" + "---:|" * len(attacked)]
        for name in attacked[0]["attacks"]:
            found = [cell["attacks"][name]["forget"]["unseen"] for cell in attacked]
            rates = [f"{modes['greedy']['harmful']:.1%} / {modes['sampled']['harmful']:.1%}" for modes in found]
            lines.append(f"| {name} | {' | '.join(rates)} |")
        qa = [cell["attacks"].get("quantize int4", cell["attacks"]["none"])["retain"]["qa_accuracy"] for cell in attacked]
        lines += [f"| QA after int4 | {' | '.join(f'{value:.1%}' for value in qa)} |", ""]
    return "\n".join(lines)
