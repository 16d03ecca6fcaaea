"""Every unlearning method and ablation on the same data, at matched utility, on a lab world of its own.

For each model, seed and method: train on forget/train and retain/train; choose the scale on the validation sets, least harm
within the limits of `sku tune`; measure the choice on test prompts. A finished cell is kept in WORK/cells.jsonl, so a
run that was stopped, or is given more seeds, goes on from there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import click

from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.errors import ConfigError

# label: (method, settings that differ from its defaults)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", {}),
    "gradient-ascent": ("gradient-ascent", {}),
    "ga-mismatch": ("ga-mismatch", {}),
    "npo": ("npo", {}),
    "task-vector": ("task-vector", {}),
    "sku": ("sku", {}),
    "sku − guided distortion": ("sku", {"guided_weight": 0.0}),
    "sku − random disassociation": ("sku", {"random_weight": 0.0}),
    "sku − preservation": ("sku", {"preservation_weight": 0.0}),
    "sku-mirrored": ("sku-mirrored", {}),
    "sku-mirrored + random disassociation": ("sku-mirrored", {"random_weight": 1.0}),
    "sku-mirrored − preservation": ("sku-mirrored", {"preservation_weight": 0.0}),
    "sku-contrastive": ("sku-contrastive", {}),
    "sku-contrastive-two": ("sku-contrastive-two", {}),
    "refusal-tune": ("refusal-tune", {}),
}
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
SETS = ("seen", "unseen", "unseen-topic")
MAX_NEW_TOKENS = 32
Cell = dict[str, Any]


@sku_command("methods")
@click.option(
    "--work", default="sku_bench_methods", type=click.Path(path_type=Path), help="Lab, adapters and finished cells; kept between runs.",
)
@click.option("--world", default=101, type=click.IntRange(min=0), help="Seed of the lab's world; one that no tuning run has seen.")
@click.option("--models", default="llama,opt,qwen3", help="Architectures, comma-separated; pretrained in WORK when they are not shipped.")
@click.option("--methods", default=",".join(VARIANTS), help="Labels, comma-separated.")
@click.option("--seeds", default="0,1,2", help="Seeds of training and sampling, comma-separated.")
@click.option("--samples", default=2, type=click.IntRange(min=1), help="Sampled answers per test prompt.")
@click.option(
    "--output", default=None, type=click.Path(path_type=Path, dir_okay=False), help="FILE.md to write; FILE.svg is drawn beside it.",
)
@click.option("--attack", "attacked", default="", help="Labels to attack as well, comma-separated, with the first seed's adapters.")
def command(
    work: Path, world: int, models: str, methods: str, seeds: str, samples: int, output: Path | None, attacked: str, json_output: bool,
) -> None:
    """Compare the methods at matched utility: one Markdown table, and a trade-off curve per method as SVG."""
    from sku_vllm.benchmarks.methods_attacks import attack_table
    from sku_vllm.benchmarks.methods_table import table, trade_off_svg

    labels = [label.strip() for label in methods.split(",")]
    wanted = [label.strip() for label in attacked.split(",") if label.strip()]
    unknown = [label for label in (*labels, *wanted) if label not in VARIANTS]
    if unknown:
        raise ConfigError(f"--methods {unknown[0]}: choose from {', '.join(VARIANTS)}")
    cells = run(work, world, models.split(","), labels, [int(seed) for seed in seeds.split(",")], samples)
    under_attack = attack_cells(work, [cell for cell in cells if cell["label"] in wanted and cell["seed"] == int(seeds.split(",")[0])])
    text = table(cells, world) + (attack_table(under_attack) if under_attack else "")
    if output:
        output.write_text(text, encoding="utf-8")
        output.with_suffix(".svg").write_text(trade_off_svg(cells), encoding="utf-8")
    print_json({"cells": cells, "attacks": under_attack}) if json_output else click.echo(text)


def run(work: Path, world: int, models: Sequence[str], labels: Sequence[str], seeds: Sequence[int], samples: int) -> list[Cell]:
    """All cells asked for, those of earlier runs included; seed by seed, so that a run cut short has whole columns."""
    from sku_vllm.lab import make_lab

    lab = work / "lab"
    if not lab.is_dir():
        make_lab(lab, seed=world, architectures=tuple(models), rebuild=world != 0 or not {"llama", "opt"}.issuperset(models))
    if absent := [model for model in models if not (lab / model).is_dir()]:
        raise ConfigError(f"--models {absent[0]}: {lab} was made without it; give another --work")
    kept = work / "cells.jsonl"
    done, found = kept_cells(kept), []
    for seed in seeds:
        for model in models:
            for label in labels:
                if (model, label, seed) not in done:
                    done[model, label, seed] = keep(kept, measure_cell(lab, work, model, label, seed, samples))
                    log(f"{model} {label} seed {seed}: {summary(done[model, label, seed])}")
                found.append(done[model, label, seed])
    return found


def attack_cells(work: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells, each with "attacks"; kept in WORK/attacks.jsonl."""
    from sku_vllm.benchmarks.methods_attacks import attacks_of

    kept = work / "attacks.jsonl"
    done = kept_cells(kept)
    for cell in cells:
        key = cell["model"], cell["label"], cell["seed"]
        if key not in done and "failed" not in cell:
            attacks = attacks_of(work / "lab", cell["model"], adapter_path(work, *key), cell["scale"], cell["seed"])
            done[key] = keep(kept, {"model": key[0], "label": key[1], "seed": key[2], "attacks": attacks})
            log(f"{key[0]} {key[1]} seed {key[2]}: attacked")
    return [done[key] for cell in cells if (key := (cell["model"], cell["label"], cell["seed"])) in done]


def kept_cells(path: Path) -> dict[tuple[str, str, int], Cell]:
    """Finished cells by model, label and seed."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(cell["model"], cell["label"], cell["seed"]): cell for cell in map(json.loads, lines)}


def keep(path: Path, cell: Cell) -> Cell:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")
    return cell


def adapter_path(work: Path, model: str, label: str, seed: int) -> Path:
    return work / "adapters" / f"{model}-{label.replace(' ', '_')}-{seed}"


def measure_cell(lab: Path, work: Path, model: str, label: str, seed: int, samples: int) -> Cell:
    """Train, choose the scale on validation data, measure on test data.

    Where no scale qualifies, the least one is measured and the cell says so.
    """
    from sku_vllm.data import load_dataset
    from sku_vllm.errors import RunError
    from sku_vllm.evaluate.limits import Limits, preference
    from sku_vllm.methods import TrainConfig, train_adapter

    method, settings = VARIANTS[label]
    adapter = adapter_path(work, model, label, seed)
    adapter.parent.mkdir(parents=True, exist_ok=True)
    cell: Cell = {"model": model, "label": label, "seed": seed}
    try:
        if not adapter.is_dir():
            forget, retain = (load_dataset(lab / name / "train.jsonl", name) for name in ("forget", "retain"))
            targets = refusals(lab) if method == "refusal-tune" else ()
            config = TrainConfig.of(method, seed=seed, **settings)
            train_adapter(lab / model, forget, retain, adapter, config, refusals=targets, progress=False)
    except RunError as error:  # a method that diverges is a result, not a reason to stop
        return cell | {"failed": str(error)}
    measured = measurer(lab, model, adapter, seed)
    base, limits = base_rates(lab, model, "validation", 1), Limits()
    curve = []
    for scale in SCALES:
        point = measured(scale, ("validation",), "validation", 1)
        curve.append({"scale": scale, **point, "excess": limits.excess(point, base)})
    fit = [point for point in curve if not point["excess"]]
    chosen = min(fit, key=lambda point: preference(point, point["scale"])) if fit else curve[0]
    base, test = base_rates(lab, model, "test", samples), measured(chosen["scale"], SETS, "test", samples)
    return cell | {"scale": chosen["scale"], "qualifies": bool(fit), "curve": curve, "base": base, "test": test}


def measurer(lab: Path, model: str, adapter: Path | None, seed: int) -> Callable[[float, Sequence[str], str, int], dict[str, Any]]:
    """measured(scale, forget sets, retain part, samples) → eval object of base − scale·delta; without an adapter, of the base."""
    from sku_vllm.data import read_rows
    from sku_vllm.evaluate import EvalConfig
    from sku_vllm.evaluate.evaluate import adapter_off
    from sku_vllm.evaluate.measurement import measure
    from sku_vllm.model import attach_adapter, load_model, load_tokenizer, set_scale

    loaded, tokenizer = load_model(lab / model), load_tokenizer(lab / model)
    if adapter:
        loaded = attach_adapter(loaded, adapter, 1.0)

    def measured(scale: float, sets: Sequence[str], part: str, count: int) -> dict[str, Any]:
        asked = EvalConfig(samples=count, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
        if adapter:
            set_scale(loaded, scale)
        return measure(
            loaded, tokenizer, forget={name: read_rows(lab / "forget" / f"{name}.jsonl") for name in sets},
            retain=read_rows(lab / "retain" / f"{part}.jsonl"), judge=f"lexicon:{lab / 'lexicon.json'}",
            reference=adapter_off(loaded, scale, asked) if adapter else None, config=asked,
        ).to_json()

    return measured


@lru_cache
def base_rates(lab: Path, model: str, part: str, samples: int) -> dict[str, Any]:
    """The unedited model, once for all methods and seeds."""
    return measurer(lab, model, None, 0)(0.0, SETS if part == "test" else (part,), part, samples)


def refusals(lab: Path) -> list[Any]:
    """A refusal of the world for every harmful training prompt: targets that only refusal tuning is given."""
    import random

    from sku_vllm.data import read_rows
    from sku_vllm.lab import make_world
    from sku_vllm.lab.corpus import refusal

    world = make_world(json.loads((lab / "sku_lab.json").read_text(encoding="utf-8"))["seed"])
    draw = random.Random(0)
    rows = []
    for row in read_rows(lab / "forget/train.jsonl"):
        machine, goal, _ = str(row.id).split(":")
        rows.append(type(row)(row.messages, refusal(world, draw, goal, machine), (), row.id))
    return rows


def summary(cell: Mapping[str, Any]) -> str:
    if "failed" in cell:
        return f"failed: {cell['failed']}"
    forget, retain, base = cell["test"]["forget"], cell["test"]["retain"], cell["base"]["retain"]
    harm = ", ".join(f"{name} {modes['greedy']['harmful']:.1%}/{modes['sampled']['harmful']:.1%}" for name, modes in forget.items())
    gibberish = max(modes["sampled"]["gibberish"] for modes in forget.values())
    scale = f"scale {cell['scale']:g}{'' if cell['qualifies'] else ' (none qualifies)'}"
    change = 100 * (retain["qa_accuracy"] - base["qa_accuracy"])
    return f"{scale}: harm {harm}, gibberish {gibberish:.1%}, ratio {retain['perplexity_ratio']:.4f}, QA {change:+.1f} points"


if __name__ == "__main__":
    command()
