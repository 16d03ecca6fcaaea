"""Unlearning methods on a real model and real prompts, each beside what a linear probe of the base can tell apart.

For each method and seed: train on DATA's forget and retain rows; choose the scale on half of the validation sets as `sku tune` does;
measure the choice on the other half and on benchmarks. A finished cell is kept in WORK/cells.jsonl and a stopped one is continued; the
page shows every kept cell. Model and data stay where they are: pages hold numbers only.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sku_vllm.benchmarks.real_setup import METHODS, OWN, PUBLISHED, Setup
from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.errors import ConfigError, SkuError

if TYPE_CHECKING:
    from sku_vllm.benchmarks.real_data import RealData

PATH = click.Path(path_type=Path)
WORLD, TEACHING_STEPS = 101, 400


@sku_command("real")
@click.option("--model", required=True, type=PATH, help="Directory of the base, a chat model.")
@click.option("--data", required=True, type=PATH, help="Directory of rows; docs/benchmarks.md lists its files.")
@click.option("--work", default="sku_bench_real", type=PATH, help="Adapters, answers and finished cells; kept between runs.")
@click.option("--methods", default=",".join(METHODS), help="Comma-separated.")
@click.option("--seeds", default="0", help="Seeds of training and sampling, comma-separated.")
@click.option("--base-forget", "forget_answers", default=PUBLISHED, help=f"{PUBLISHED} or {OWN}: whose forget answers are trained on.")
@click.option("--targets", default="auto", help="As in sku train.")
@click.option("--steps", type=int, help="As in sku train; each method has its own default.")
@click.option("--samples", type=int, help="As in sku train.")
@click.option("--forget-rows", type=click.IntRange(min=1), help="Most forget rows to train on.")
@click.option("--retain-rows", type=click.IntRange(min=1), help="Most retain rows to train on.")
@click.option("--measured", type=click.IntRange(min=1), help="Most rows of each set that tunes or is measured, and documents of a task.")
@click.option("--scales", help="Scales to try, comma-separated; default as in sku tune.")
@click.option("--sampled", default=1, type=int, help="Sampled answers per forget prompt, beside the greedy one.")
@click.option("--max-new-tokens", default=48, type=int, help="Longest answer in tokens.")
@click.option("--dtype", default="auto", help="As in sku train.")
@click.option("--lm-eval", is_flag=True, help="Also run the tasks in DATA/lm_eval.")
@click.option("--attack", "kinds", default="", help="Attacks, comma-separated, as in sku attack; needs --attacked.")
@click.option("--attacked", default="", help="Methods to attack, comma-separated.")
@click.option("--relearn-steps", default="40,200", help="Steps of relearning after which it is measured, comma-separated.")
@click.option("--organism", is_flag=True, help="First teach the model the lab's fictional world, and unlearn that.")
@click.option("--world", default=WORLD, type=click.IntRange(min=0), help="Seed of that world.")
@click.option("--teaching-steps", default=TEACHING_STEPS, type=click.IntRange(min=1), help="Steps of teaching it, 8 rows each.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="FILE.md to write; FILE-PAIR.svg are drawn beside it.")
def command(methods: str, seeds: str, kinds: str, attacked: str, output: Path | None, json_output: bool, **given: Any) -> None:
    """Measure unlearning methods on a real model: answers, over-refusal, attacks and utility, beside a linear probe of the base."""
    from sku_vllm.evaluate.attack.attack_config import AttackConfig
    from sku_vllm.evaluate.attack.kinds import chosen_kinds

    organism, world, teaching_steps = (given.pop(name) for name in ("organism", "world", "teaching_steps"))
    relearn_steps = numbers("--relearn-steps", given.pop("relearn_steps"))
    scales = given.pop("scales")
    if scales:
        given["scales"] = tuple(numbers("--scales", scales, float))
    setup = Setup(**given)
    keys = [(label, seed) for seed in numbers("--seeds", seeds) for label in names(methods)]
    under_attack = [key for key in keys if key[0] in names(attacked)]
    attacks = chosen_kinds(names(kinds)) if kinds or attacked else ()
    check(setup, keys, names(attacked), kinds)
    AttackConfig(steps=tuple(relearn_steps))
    if output and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is no directory; make it first")
    if organism:
        from sku_vllm.benchmarks.real_organism import make_organism

        setup = make_organism(setup, world, teaching_steps)
    results = measure_all(setup, keys, under_attack, attacks, relearn_steps)
    text = write_page(setup, results, output)
    if json_output:
        print_json({name: results[name] for name in ("base", "cells", "attacks")})
    else:
        click.echo(text)


def check(setup: Setup, keys: Sequence[tuple[str, int]], attacked: Sequence[str], kinds: str) -> None:
    """Raise ConfigError for flags that cannot be used, before anything is loaded or written."""
    from sku_vllm.evaluate.tune_request import check_scales
    from sku_vllm.model import resolve_model

    if setup.forget_answers not in (PUBLISHED, OWN):
        raise ConfigError(f"--base-forget {setup.forget_answers}: choose from {PUBLISHED}, {OWN}")
    for label, seed in keys:
        setup.train_config(label, seed)
    if missing := [label for label in attacked if label not in [key[0] for key in keys]]:
        raise ConfigError(f"--attacked {missing[0]}: is not among --methods")
    if bool(attacked) != bool(kinds):
        raise ConfigError("--attack and --attacked belong together; give both or neither")
    setup.eval_config()
    check_scales(setup.scales)
    resolve_model(setup.model)


def measure_all(
    setup: Setup, keys: Sequence[tuple[str, int]], under_attack: Sequence[tuple[str, int]], kinds: Sequence[str], steps: Sequence[int]
) -> dict[str, Any]:
    """Measure what is not kept yet: the base, its probe, every cell, and attacks. Returns {"data", "base", "probe", "cells", "attacks"}."""
    from sku_vllm.benchmarks.real_attacks import attacks_of
    from sku_vllm.benchmarks.real_cell import measure_cell, summary
    from sku_vllm.benchmarks.real_data import RealData
    from sku_vllm.benchmarks.real_probe import probe_of

    data = RealData(setup)
    setup.claim()
    for name in data.missing:
        log(f"{setup.data / name}: not there, so not measured")
    base, probe = base_of(setup, data), probe_of(setup, data)
    cells = kept(setup.work / "cells.jsonl", "label", "seed")
    for label, seed in keys:
        if (label, seed) not in cells:
            log(f"{label} {seed}: begun")
            cells[label, seed] = keep(setup.work / "cells.jsonl", measure_cell(setup, data, label, seed))
            log(f"{label} {seed}: {summary(cells[label, seed])}")
    attacked = kept(setup.work / "attacks.jsonl", "label", "seed", "kinds", "steps")
    for label, seed in under_attack:
        key = (label, seed, str(list(kinds)), str(list(steps)))
        if key not in attacked and "failed" not in cells[label, seed]:
            attacked[key] = keep(setup.work / "attacks.jsonl", attacks_of(setup, data, cells[label, seed], kinds, steps))
            log(f"{label} {seed}: attacked")
    return {"data": data, "base": base, "probe": probe, "cells": list(cells.values()), "attacks": list(attacked.values())}


def base_of(setup: Setup, data: "RealData") -> dict[str, Any]:
    """What is measured of the base, kept in WORK/base.json."""
    from sku_vllm.benchmarks.real_measure import measured
    from sku_vllm.model_spec import ModelSpec
    from sku_vllm.output import write_json

    file = setup.work / "base.json"
    if not file.is_file():
        log("measuring the base")
        write_json(file, measured(setup, data, ModelSpec(setup.model, dtype=setup.dtype), setup.work / "base"))
    return dict(json.loads(file.read_text(encoding="utf-8")))


def write_page(setup: Setup, results: Mapping[str, Any], output: Path | None) -> str:
    """The page, written with its drawings if there is an output."""
    from sku_vllm.benchmarks.real_attacks import attack_table
    from sku_vllm.benchmarks.real_goals import goals_table
    from sku_vllm.benchmarks.real_table import draw, page

    data, base, probe, cells = (results[name] for name in ("data", "base", "probe", "cells"))
    text = page(setup, data, base, cells, probe, output.stem if output else "")
    text += goals_table(base, cells, probe, organism=setup.world is not None) + attack_table(results["attacks"])
    if output:
        for name, drawing in draw(base, cells, probe).items():
            output.with_name(f"{output.stem}-{name}.svg").write_text(drawing, encoding="utf-8")
        output.write_text(text, encoding="utf-8")
    return text


def names(given: str) -> list[str]:
    """The parts of a comma-separated value."""
    return [part.strip() for part in given.split(",") if part.strip()]


def numbers(flag: str, given: str, kind: type[Any] = int) -> list[Any]:
    """The numbers of a comma-separated value. Raises ConfigError if one is none."""
    try:
        return [kind(part) for part in names(given)]
    except ValueError as error:
        raise ConfigError(f"{flag} {given}: has to be numbers with commas between") from error


def kept(path: Path, *key: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Finished entries of a file by the values of some of their keys; of two the later. Raises SkuError for a damaged line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        entries = [json.loads(line) for line in lines]
    except ValueError as error:
        raise SkuError(f"{path}: a line of it is not JSON ({error}); remove that line") from error
    return {tuple(str(one[name]) if isinstance(one[name], list) else one[name] for name in key): one for one in entries}


def keep(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Append a finished entry to a file of them; returns it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    return entry


if __name__ == "__main__":
    command()
