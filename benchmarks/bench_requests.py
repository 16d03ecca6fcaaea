"""`sku bench requests`: five requests to forget one after another, and the second withdrawn.

A request is a group of a lab world's topics. Two ways of serving requests over time: **stacked**, where each request's adapter is trained
on the base and all of them are subtracted from it at once; and **in turn**, where each is trained on the model that the requests before
it left, and fused into that. A request is withdrawn by subtracting the other adapters from the base. After every event the model is asked
about each group: what was forgotten should be refused, what was not (or no longer) should be answered as the base does. Results and
models are kept below --work, so an interrupted benchmark goes on where it was.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sku_vllm.benchmarks.erase_measure import relearned, right, rows_of
from sku_vllm.benchmarks.machine import machine
from sku_vllm.benchmarks.methods_cell import lab_of
from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.output import write_json

WAYS = ("stacked", "in turn")


@sku_command("requests")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for models and results; what is there is used again.")
@click.option("--world", type=click.IntRange(min=0), default=0, help="Seed of the lab's world.")
@click.option("--architecture", default="llama", help="llama, opt or qwen3.")
@click.option("--requests", "count", type=click.IntRange(min=2), default=5, help="Requests, among which the world's topics are shared out.")
@click.option("--steps", type=int, help="Training steps of a request; default: the default method's.")
@click.option("--relearn-steps", type=int, default=200, help="Steps of relearning on 26 pairs after every event; 0 leaves it out.")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file for the results.")
def command(
    work: Path, world: int, architecture: str, count: int, steps: int | None, relearn_steps: int, output: str | None, json_output: bool
) -> None:
    """Harm, utility and what relearning brings back after each of several requests to forget, and after one is withdrawn."""
    work.mkdir(parents=True, exist_ok=True)
    lab, file = lab_of(work, world, architecture), work / "requests.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    groups = groups_of(world, count)
    for way in WAYS:
        model, adapters = lab / architecture, []
        events: list[tuple[str, Path]] = [("base", model)]
        for number, group in enumerate(groups, 1):
            adapter = trained(work, lab, model if way == "in turn" else lab / architecture, f"{way}-{number}", group, steps)
            adapters.append(adapter)
            before = [adapter] if way == "in turn" else adapters
            model = fused(model if way == "in turn" else lab / architecture, before, work / f"{way.replace(' ', '-')}-after-{number}")
            events.append((f"request {number}", model))
        left = [adapter for number, adapter in enumerate(adapters, 1) if number != 2]
        events.append(("second withdrawn", fused(lab / architecture, left, work / f"{way.replace(' ', '-')}-withdrawn")))
        for event, place in events:
            key = f"{way}: {event}"
            if key not in results:
                results[key] = measured(place, lab, world, groups, relearn_steps)
                write_json(file, results)
            log(f"{key}: {results[key]}")
    document = {"machine": machine(), "world": world, "results": results}
    if output:
        Path(output).write_text(markdown(document), encoding="utf-8")
    print_json(document) if json_output else log(markdown(document))


def groups_of(world: int, count: int) -> list[tuple[str, ...]]:
    """The world's topics in `count` groups of about equal size."""
    from sku_vllm.lab.world import make_world

    topics = make_world(world).topics
    return [topics[len(topics) * at // count : len(topics) * (at + 1) // count] for at in range(count)]


def of_group(rows: Sequence[dict[str, Any]], group: Sequence[str]) -> list[dict[str, Any]]:
    """The forget rows about a topic of the group."""
    return [row for row in rows if row["id"].split(":")[0] in group]


def trained(work: Path, lab: Path, model: Path, name: str, group: Sequence[str], steps: int | None) -> Path:
    """The adapter of one request, trained on `model` by the default method."""
    from sku_vllm.data import load_dataset
    from sku_vllm.methods import TrainConfig, train_adapter
    from sku_vllm.train.train_request import TrainRequest

    place = work / f"adapter-{name.replace(' ', '-')}"
    if not place.is_dir():
        everything = load_dataset(lab / "forget/train.jsonl", "forget")
        mine = [row for row in everything.rows if str(row.id).split(":")[0] in group]
        forget, retain = load_dataset(mine, "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
        config = TrainConfig.of() if steps is None else TrainConfig.of(steps=steps)
        train_adapter(TrainRequest(model, forget, retain, place, config, resume=True))
    return place


def fused(model: Path, adapters: Sequence[Path], place: Path) -> Path:
    """`model` − the adapters at scale 1; adapters that were trained on a later model are taken too."""
    from sku_vllm.fuse import FuseRequest, fuse_checkpoint

    if not place.is_dir():
        fuse_checkpoint(FuseRequest(model, [(adapter, 1.0) for adapter in adapters], place, any_base=True))
    return place


def measured(place: Path, lab: Path, world: int, groups: Sequence[Sequence[str]], relearn_steps: int) -> dict[str, Any]:
    """Harmful share and right recipes of sampled answers to unseen prompts of each group, QA and over-refusal on retain/test, and what
    relearning brings back of the recipes of all groups."""
    from sku_vllm.lab.measure import answers, share
    from sku_vllm.lab.world import make_world
    from sku_vllm.model import load_model, load_tokenizer

    made, model, tokenizer = make_world(world), load_model(place), load_tokenizer(place)
    found: dict[str, Any] = {"harmful": [], "recipes": []}
    for group in groups:
        rows = of_group(rows_of(lab / "forget/unseen.jsonl"), group)
        told = answers(model, tokenizer, rows, sample=True)  # type: ignore[arg-type]
        found["harmful"].append(share(told, made.lexicon["harmful"]))
        found["recipes"].append(right(told, rows))
    rows = rows_of(lab / "retain/test.jsonl")
    told = answers(model, tokenizer, rows)  # type: ignore[arg-type]
    asked = [(row["must_contain"], text) for row, text in zip(rows, told, strict=True) if "must_contain" in row]
    found["qa_accuracy"] = sum(all(part in text for part in wanted) for wanted, text in asked) / len(asked)
    found["over_refusal"] = share(told, made.lexicon["refusal"])
    if relearn_steps:
        (found["relearned"],) = (point["own"] for point in relearned(place, lab, world, 26, [relearn_steps], 1e-4))
    return found


def markdown(document: dict[str, Any]) -> str:
    """A row an event: harmful answers and right recipes by request, utility, and right recipes after relearning."""
    results = document["results"]
    count = len(next(iter(results.values()))["harmful"])
    heads = [f"request {number}: harmful / right" for number in range(1, count + 1)]
    lines = [f"| after | {' | '.join(heads)} | QA | over-refusal | right after relearning |", "|---" * (count + 4) + "|"]
    for name, found in results.items():
        shares = [f"{harmful:.0%} / {told:.0%}" for harmful, told in zip(found["harmful"], found["recipes"], strict=True)]
        again = f"{found['relearned']:.0%}" if "relearned" in found else ""
        lines.append(f"| {name} | {' | '.join(shares)} | {found['qa_accuracy']:.3f} | {found['over_refusal']:.1%} | {again} |")
    by = document["machine"]
    return "\n".join([*lines, "", f"World {document['world']}; {by['cpu']}, {by['date']}, torch {by['versions'].get('torch')}."]) + "\n"
