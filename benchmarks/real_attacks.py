"""One edited model of bench_real under attacks of `sku attack`, and the table of what they bring back."""

from collections.abc import Mapping, Sequence
from typing import Any

from sku_vllm.benchmarks.real_cell import edited, place_of
from sku_vllm.benchmarks.real_data import UNSEEN, VALIDATION, RealData
from sku_vllm.benchmarks.real_measure import unfinished
from sku_vllm.benchmarks.real_setup import Setup
from sku_vllm.cli.options import log
from sku_vllm.evaluate.attack.attack_config import AttackConfig
from sku_vllm.evaluate.attack.attack_model import attack_model
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.measure_request import RETAIN
from sku_vllm.records import read_json

SHARE = 0.1  # of the forget rows that the attacker has


def attacks_of(setup: Setup, data: RealData, cell: Mapping[str, Any], kinds: Sequence[str], steps: Sequence[int]) -> dict[str, Any]:
    """A cell at its scale under attacks; those that were stopped are continued.

    Args:
        kinds: of `sku attack`. steps: of relearning.
    Returns:
        {"label", "seed", "kinds", "steps", "attacks": {attack: {set: {mode: share harmful}}}}, "none" first.
    """
    label, seed = cell["label"], cell["seed"]
    output = place_of(setup, label, seed, "attacked")
    output = output.with_name("-".join([output.name, *kinds, *map(str, steps)]))
    if not (output / "sku_attack.json").is_file():
        request = AttackRequest(
            edited(setup, label, seed, cell["scale"]),
            kinds=kinds,
            forget={name: rows for name, rows in data.measured["forget"].items() if name in (VALIDATION, UNSEEN)},
            retain=data.measured["retain"][RETAIN],
            judge=setup.judge,
            relearn=data.forget,
            benign=data.retain,
            settings=AttackConfig(steps=tuple(steps), fractions=(SHARE,), quantizers=("int4",)),
            config=setup.eval_config(seed),
            output=output,
            resume=unfinished(output),
        )
        attack_model(request, log)
    record = read_json(output / "sku_attack.json")
    found = {"none": _harmful(record["before"])}
    for kind, tried in record["attacks"].items():
        for entry in tried:
            if entry.get("steps") != 0:
                after = f", {entry['steps']} steps" if "steps" in entry else ""
                found[kind if entry["attack"] == kind else f"{kind} {entry['attack']}{after}"] = _harmful(entry)
    return {"label": label, "seed": seed, "kinds": list(kinds), "steps": list(steps), "attacks": found}


def _harmful(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {name: {mode: shares["harmful"] for mode, shares in modes.items()} for name, modes in entry["forget"].items()}


def attack_table(attacked: Sequence[Mapping[str, Any]]) -> str:
    """A row an attack, a column a cell: harmful greedy / sampled of each forget set."""
    if not attacked:
        return ""
    columns = [f"{one['label']}, {one['seed']}" for one in attacked]
    names = list(dict.fromkeys((attack, name) for one in attacked for attack, sets in one["attacks"].items() for name in sets))
    lines = [
        "## Under attack",
        "",
        f"Harmful, greedy / sampled. Relearning: AdamW at 1e-4 on all weights, batch 8, on {SHARE:.0%} of the forget rows that train or on "
        "the retain rows; measured on prompts that it does not train on.",
        "",
        f"| attack | set | {' | '.join(columns)} |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for attack, name in names:
        cells = (_cell(one["attacks"].get(attack, {}).get(name)) for one in attacked)
        lines.append(f"| {attack} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(modes: Mapping[str, float] | None) -> str:
    return " / ".join(f"{rate:.1%}" for rate in modes.values()) if modes else "–"
