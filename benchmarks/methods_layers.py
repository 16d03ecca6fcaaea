"""What `sku tune --per-layer` adds to the one scale of bench_methods: both measured on the same test data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.methods_cell import MAX_NEW_TOKENS, SETS, Cell


def layers_of_cell(lab: Path, adapter: Path, cell: Cell, samples: int) -> dict[str, Any]:
    """Search on validation data from the scale chosen for the cell; {"layers": factors, "test": eval object of the choice}."""
    from sku_vllm.data import read_rows
    from sku_vllm.evaluate import EvalConfig
    from sku_vllm.evaluate.tune import tune_scale
    from sku_vllm.evaluate.tune_request import TuneRequest
    from sku_vllm.model_spec import ModelSpec

    def sets(names: Sequence[str], part: str) -> tuple[dict[str, Any], list[Any]]:
        return {name: read_rows(lab / f"forget/{name}.jsonl") for name in names}, read_rows(lab / f"retain/{part}.jsonl")

    forget, retain = sets(("validation",), "validation")
    test_forget, test_retain = sets(SETS, "test")
    request = TuneRequest(
        ModelSpec(lab / cell["model"], adapter=adapter),
        forget=forget,
        retain=retain,
        judge=f"lexicon:{lab / 'lexicon.json'}",
        scales=(cell["scale"],),
        config=EvalConfig(samples=samples, max_new_tokens=MAX_NEW_TOKENS, seed=cell["seed"]),
        test_forget=test_forget,
        test_retain=test_retain,
        per_layer=True,
    )
    found = tune_scale(request)
    return {"layers": found.layers, "test": found.test}


def layers_table(cells: Mapping[Any, Cell], searched: Mapping[Any, Cell]) -> str:
    """Two rows an adapter: one scale for all layers, then a scale for each third of them."""
    if not searched:
        return ""
    lines = [
        "## One scale, or one a layer",
        "",
        "`sku tune --per-layer`: from the scale chosen above, each third of the layers tried at 0.5, 0.75, 1.25 and 1.5 of it on "
        "validation data; measured on test data.",
        "",
        "| model | method, seed | scale by layer | greedy harm, worst set | sampled harm, worst set | sampled gibberish, worst set | "
        "perplexity ratio | QA change, points |",
        "|---|---|---|" + "---:|" * 5,
    ]
    for key, found in searched.items():
        plain = cells[key]
        scale, of_layer = plain["scale"], found["layers"]
        told = ", ".join(f"{scale * factor:g}" for factor in of_layer.values()) if of_layer else "no scale qualified"
        for name, test in ((f"{scale:g}", plain["test"]), (told, found["test"])):
            if test:
                lines.append(f"| {key[0]} | {key[1]}, {key[2]} | {name} | {_measured(test, plain['base'])} |")
    return "\n".join(lines) + "\n\n"


def _measured(test: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    retain, shares = test["retain"], list(test["forget"].values())
    asked = (("greedy", "harmful"), ("sampled", "harmful"), ("sampled", "gibberish"))
    rates = [max(modes[mode][key] for modes in shares) for mode, key in asked]
    change = 100 * (retain["qa_accuracy"] - base["retain"]["qa_accuracy"])
    return f"{' | '.join(f'{rate:.1%}' for rate in rates)} | {retain['perplexity_ratio']:.4f} | {change:+.1f}"
