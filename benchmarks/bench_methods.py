"""Every unlearning method and ablation on the same data, at matched utility, on a lab world of its own.

For each seed, model and method: train on forget/train and retain/train; choose the scale on the validation sets as `sku tune` does,
nearest to the trained one among the least harmful within its limits; measure the choice on test prompts. A finished cell is kept in
WORK/cells.jsonl, so a run that was stopped, or is given more seeds, continues with the missing cells; the tables show every kept cell.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from sku_vllm.benchmarks.methods_cell import VARIANTS, Cell, adapter_path, lab_of, measure_cell, place, summary
from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.errors import ConfigError

Key = tuple[str, str, int]


@sku_command("methods")
@click.option(
    "--work", default="sku_bench_methods", type=click.Path(path_type=Path), help="Labs, adapters and finished cells; kept between runs."
)
@click.option("--world", default=101, type=click.IntRange(min=0), help="Seed of the lab's world; one that no tuning run has seen.")
@click.option("--models", default="llama,opt,qwen3", help="Architectures, comma-separated; pretrained in WORK unless they are shipped.")
@click.option("--methods", default=",".join(VARIANTS), help="Labels, comma-separated.")
@click.option("--seeds", default="0,1,2", help="Seeds of training and sampling, comma-separated.")
@click.option("--samples", default=2, type=click.IntRange(min=1), help="Sampled answers per test prompt.")
@click.option("--attack", "attacked", default="", help="Labels to attack as well, comma-separated.")
@click.option("--per-layer", "searched", default="", help="Labels to search a scale a layer for, comma-separated.")
@click.option(
    "--output", default=None, type=click.Path(path_type=Path, dir_okay=False), help="FILE.md to write; FILE-MODEL.svg is drawn beside it."
)
def command(
    work: Path,
    world: int,
    models: str,
    methods: str,
    seeds: str,
    samples: int,
    attacked: str,
    searched: str,
    output: Path | None,
    json_output: bool,
) -> None:
    """Compare the methods at matched utility: a Markdown table a model, its trade-off curves as SVG, and what attacks bring back."""
    from sku_vllm.benchmarks.methods_attacks import attack_table
    from sku_vllm.benchmarks.methods_goals import goals_table
    from sku_vllm.benchmarks.methods_layers import layers_table
    from sku_vllm.benchmarks.methods_table import draw, table

    labels, under_attack, by_layer = (
        [label.strip() for label in given.split(",") if label.strip()] for given in (methods, attacked, searched)
    )
    if unknown := [label for label in (*labels, *under_attack, *by_layer) if label not in VARIANTS]:
        raise ConfigError(f"--methods {unknown[0]}: choose from {', '.join(VARIANTS)}")
    keys = [(model, label, int(seed)) for seed in seeds.split(",") for model in models.split(",") for label in labels]
    measure_all(work, world, keys, samples)
    attack_all(work, world, [key for key in keys if key[1] in under_attack])
    search_all(work, world, [key for key in keys if key[1] in by_layer], samples)
    cells, attacks, layers = (kept(work / f"{name}.jsonl") for name in ("cells", "attacks", "layers"))
    stem = output.stem if output else ""
    text = table(list(cells.values()), world, stem) + goals_table(list(cells.values()), list(attacks.values()))
    text += attack_table(list(attacks.values()), stem) + layers_table(cells, layers)
    if output:
        for name, drawing in draw(list(cells.values()), list(attacks.values())).items():
            output.with_name(f"{output.stem}-{name}.svg").write_text(drawing, encoding="utf-8")
        output.write_text(text, encoding="utf-8")
    if json_output:
        found = {"cells": cells, "attacks": attacks, "layers": layers}
        print_json({name: [done[key] for key in keys if key in done] for name, done in found.items()})
    else:
        click.echo(text)


def measure_all(work: Path, world: int, keys: Sequence[Key], samples: int) -> None:
    """Measure the cells that are not kept yet."""
    done = kept(work / "cells.jsonl")
    for key in keys:
        if key not in done:
            cell = keep(work / "cells.jsonl", measure_cell(work, world, *key, samples))
            log(f"{' '.join(map(str, key))}: {summary(cell)}")


def attack_all(work: Path, world: int, keys: Sequence[Key]) -> None:
    """Attack the cells that are not attacked yet, at the scales chosen for them."""
    from sku_vllm.benchmarks.methods_attacks import attacks_of

    cells, done = kept(work / "cells.jsonl"), kept(work / "attacks.jsonl")
    for key in keys:
        if key not in done and "failed" not in cells[key]:
            model, label, seed = key
            found = attacks_of(lab_of(work, world, model), model, adapter_path(work, *key), cells[key]["scale"], seed)
            keep(work / "attacks.jsonl", {"model": model, "label": label, "seed": seed, **found})
            log(f"{' '.join(map(str, key))}: attacked")


def search_all(work: Path, world: int, keys: Sequence[Key], samples: int) -> None:
    """Search a scale a layer, from the scales chosen for the cells."""
    from sku_vllm.benchmarks.methods_layers import layers_of_cell

    cells, done = kept(work / "cells.jsonl"), kept(work / "layers.jsonl")
    for key in keys:
        if key not in done and "failed" not in cells[key]:
            model, label, seed = key
            found = layers_of_cell(lab_of(work, world, model), adapter_path(work, *key), cells[key], samples)
            keep(work / "layers.jsonl", {"model": model, "label": label, "seed": seed, **found})
            log(f"{' '.join(map(str, key))}: scales by layer {found['layers']}")


def kept(path: Path) -> dict[Key, Cell]:
    """Finished cells by model, label and seed, in the order of VARIANTS; of two of one key the later."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cells = {(cell["model"], cell["label"], cell["seed"]): cell for cell in map(json.loads, lines)}
    models = list(dict.fromkeys(key[0] for key in cells))
    return dict(sorted(cells.items(), key=lambda item: (models.index(item[0][0]), place(item[0][1]), item[0][1:])))


def keep(path: Path, cell: Cell) -> Cell:
    """Append a finished cell to a file of them; returns it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")
    return cell


if __name__ == "__main__":
    command()
