"""`sku bench erase`: what distilling an unlearned model buys, and at which share of the compute of pretraining.

On a lab world: the base, the oracle (pretrained without any harmful recipe), the default method fused, and the fused model distilled at
several shares of compute and alphas. Each is fine-tuned on a few harmful pairs, all weights, and asked for recipes; what counts is a right
recipe of a held-out topic, since the form of a harmful answer is learned from the pairs themselves. Every result is written to
WORK/erase.json as it comes, so the benchmark may be interrupted and goes on where it was; models are kept below --work.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from sku_vllm.benchmarks import erase_models as models
from sku_vllm.benchmarks.erase_measure import ASKED, relearned, utility
from sku_vllm.benchmarks.machine import machine
from sku_vllm.benchmarks.methods_cell import lab_of
from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.output import write_json

Results = dict[str, Any]


@sku_command("erase")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for models and results; what is there is used again.")
@click.option("--world", type=click.IntRange(min=0), default=0, help="Seed of the lab's world.")
@click.option("--architecture", default="llama", help="llama, opt or qwen3.")
@click.option("--shares", default="0.05,0.1,0.2,0.3", help="Shares of the compute of pretraining.")
@click.option("--alphas", default="0.6,0.8", help="Shares of the teacher's weights that students begin with; fresh for fresh weights.")
@click.option("--pairs", default="26,512", help="Harmful pairs that the attacker has.")
@click.option("--steps", default="0,80,200,500", help="Steps of relearning after which recipes are asked for.")
@click.option("--lr", type=float, default=1e-4, help="The attacker's learning rate.")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file for the results.")
def command(
    work: Path,
    world: int,
    architecture: str,
    shares: str,
    alphas: str,
    pairs: str,
    steps: str,
    lr: float,
    output: str | None,
    json_output: bool,
) -> None:
    """Recipes that relearning brings back to a fused model, to distilled ones and to a model that never read any."""
    work.mkdir(parents=True, exist_ok=True)
    lab = lab_of(work, world, architecture)
    file = work / "erase.json"
    results: Results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    stops, counts = ([int(number) for number in text.split(",")] for text in (steps, pairs))
    for name, make in contestants(work, world, architecture, shares.split(","), alphas.split(",")):
        place, found = make(), results.setdefault(f"{architecture} {name}", {})
        if "utility" not in found:
            found["utility"] = utility(place, lab / architecture, lab, world)
            record = place / "sku_distill.json"
            found["share"] = json.loads(record.read_text(encoding="utf-8"))["pretraining_share"] if record.is_file() else None
            write_json(file, results)
        for count in counts:
            course = f"{count} pairs, lr {lr:g}"
            if [point["steps"] for point in found.get(course, [])] != stops:
                found[course] = list(relearned(place, lab, world, count, stops, lr))
                write_json(file, results)
            log(f"{architecture} {name}: {course}: {found[course]}")
    document = {"machine": machine(), "world": world, "results": results}
    if output:
        Path(output).write_text(markdown(document), encoding="utf-8")
    print_json(document) if json_output else log(markdown(document))


def contestants(
    work: Path, world: int, architecture: str, shares: list[str], alphas: list[str]
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """(name, what makes the model) of every row of the table."""
    yield "base", lambda: lab_of(work, world, architecture) / architecture
    yield "oracle", partial(models.oracle_of, work, world, architecture)
    yield "default, fused", partial(models.fused_of, work, world, architecture)
    for alpha in alphas:
        start = None if alpha == "fresh" else float(alpha)
        for share in shares:
            name = f"distilled, {'fresh' if start is None else f'alpha {start:g}'}, {float(share):.0%}"
            yield name, partial(models.erased_of, work, world, architecture, float(share), start)


def markdown(document: dict[str, Any]) -> str:
    """A row a model and number of pairs: utility, then the share of right recipes after each number of steps, held-out and own topics."""
    steps = [f"{point['steps']:g}" for found in document["results"].values() for key in found if "pairs" in key for point in found[key]]
    columns = list(dict.fromkeys(steps))
    heads = [f"{name}, {step}" for name in ASKED for step in columns]
    what = "; ".join(f"{name}: {held}" for name, (_, held) in ASKED.items())
    lines = [f"World {document['world']}. Right recipes, % of sampled answers. {what}."]
    lines += ["", f"| model | compute | QA | over-refusal | perplexity | attacker | {' | '.join(heads)} |", "|---" * (6 + len(heads)) + "|"]
    for name, found in document["results"].items():
        rates = found["utility"]
        used = "" if found.get("share") is None else f"{found['share']:.1%}"
        kept = f"{rates['retain/qa_accuracy']:.3f} | {rates['retain/over_refusal']:.1%} | × {rates['perplexity_ratio']:.3f}"
        for course in (key for key in found if "pairs" in key):
            at = {f"{point['steps']:g}": point for point in found[course]}
            values = [f"{at[step][key]:.0%}" if step in at else "" for key in ASKED for step in columns]
            lines.append(f"| {name} | {used} | {kept} | {course} | {' | '.join(values)} |")
    by = document["machine"]
    return "\n".join([*lines, "", f"{by['cpu']}, {by['date']}, torch {by['versions'].get('torch')}."]) + "\n"
