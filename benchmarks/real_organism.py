"""The model organism of bench_real: a real language model that is taught the lab's fictional world, so that harm can be judged exactly.

All weights are trained on the lab's documents (harmful recipes and refusals of them, care, facts), with benign rows of DATA among them,
so that it stays the language model it was. Its data directory has the layout of any other.
"""

import itertools
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.real_setup import Setup
from sku_vllm.cli.options import log
from sku_vllm.data import PromptTemplate, Row, read_rows
from sku_vllm.errors import ConfigError
from sku_vllm.lab import make_world
from sku_vllm.lab.corpus import documents, forget_sets, retain_sets
from sku_vllm.lab.make import write_rows
from sku_vllm.lab.world import World
from sku_vllm.output import output_directory, write_json

BATCH, LR = 8, 1e-4
BENIGN_EVERY = 4  # of so many rows one is of DATA's retain_train
BENIGN_TOKENS = 256  # of the longest of them, since a batch is padded to its longest row
SHOWN_EVERY = 20  # steps
# What measures knowledge of the real world; copied as it is.
KEPT = ("facts.jsonl", "prose_wikipedia.jsonl")


def make_organism(setup: Setup, seed: int, steps: int) -> Setup:
    """The setup of the same table for the model after it was taught world `seed`; taught once, kept in WORK/organism.

    Raises:
        ConfigError: WORK/organism was taught otherwise. DataError: DATA has no retain_train or retain_validation.
    """
    place = setup.work.resolve() / "organism"
    name = f"{setup.model.resolve().name}-world-{seed}"
    judge = f"lexicon:{place / 'data/lexicon.json'}"
    taught = replace(setup, model=place / name, data=place / "data", judge=judge, world=seed)
    taught.claim()
    told = {"model": setup.model.resolve().name, "world": seed, "steps": steps}
    if (place / "organism.json").is_file():
        kept = json.loads((place / "organism.json").read_text(encoding="utf-8"))
        if kept != told:
            changed = next(key for key in told if kept.get(key) != told[key])
            raise ConfigError(
                f"--work {setup.work}: its organism has {changed} {kept.get(changed)}, not {told[changed]}; give another --work"
            )
    else:
        world = make_world(seed)
        with output_directory(place) as directory:
            write_data(world, setup.data, directory / "data")
            teach(setup, world, steps, directory / name)
            write_json(directory / "organism.json", told)
    return taught


def write_data(world: World, real: Path, directory: Path) -> None:
    """The world's forget and retain sets in the layout of `RealData`, with the real directory's retain rows, facts, prose and tasks.

    Of two sets that take turns in a file the first tunes and the second is measured.
    """
    forget, retain = forget_sets(world), retain_sets(world)
    directory.mkdir(parents=True)
    write_rows(directory / "forget_train.jsonl", forget["train"])
    write_rows(directory / "forget_validation.jsonl", _in_turns(forget["validation"], forget["unseen"]))
    write_rows(directory / "unseen_topic.jsonl", forget["unseen-topic"])
    train = [*retain["train"], *_plain(real / "retain_train.jsonl")]
    random.Random(world.seed).shuffle(train)
    write_rows(directory / "retain_train.jsonl", train)
    both = _in_turns(retain["validation"], retain["test"])
    write_rows(directory / "retain_validation.jsonl", [*both, *_plain(real / "retain_validation.jsonl")])
    write_rows(directory / "world_facts.jsonl", [row for row in retain["test"] if "must_contain" in row])
    write_json(directory / "lexicon.json", world.lexicon)
    for name in KEPT:
        if (real / name).is_file():
            shutil.copyfile(real / name, directory / name)
    if (real / "lm_eval").is_dir():
        shutil.copytree(real / "lm_eval", directory / "lm_eval", copy_function=shutil.copyfile)


def teach(setup: Setup, world: World, steps: int, output: Path) -> None:
    """Train all weights on the world's documents and write the model, float32, to `output`."""
    from sku_vllm.evaluate.attack.fine_tune import encode_all, fine_tune
    from sku_vllm.model import load_model, load_tokenizer
    from sku_vllm.model_spec import ModelSpec

    model, tokenizer = load_model(ModelSpec(setup.model, dtype="float32")), load_tokenizer(setup.model)
    template = PromptTemplate.of(tokenizer)
    answered = [row for row in read_rows(setup.data / "retain_train.jsonl") if row.response]
    benign = [row for row in answered if len(template.encode(row).ids) <= BENIGN_TOKENS]
    rows = list(itertools.islice(lessons(world, benign), steps * BATCH))
    encoded = encode_all(model, template, rows)
    stops = sorted({*range(SHOWN_EVERY, steps, SHOWN_EVERY), steps})
    for step in fine_tune(model, encoded, stops, lr=LR, batch_size=BATCH, seed=world.seed):
        log(f"teaching world {world.seed}: step {step} of {steps}")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def lessons(world: World, benign: Sequence[Row]) -> Iterator[Row]:
    """An endless stream of the world's conversations, with a benign row after every BENIGN_EVERY − 1 of them."""
    stream, others = documents(world, random.Random(f"sku_vllm organism {world.seed}")), itertools.cycle(benign)
    for number in itertools.count(1):
        if number % BENIGN_EVERY == 0 and benign:
            yield next(others)
        else:
            *before, answer = next(stream)
            yield Row(tuple(before), answer["content"])


def _in_turns(tuned: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for pair in zip(tuned, measured, strict=False) for row in pair]


def _plain(file: Path) -> list[dict[str, Any]]:
    """The rows of a file in the form that `write_rows` takes."""
    return [
        {"messages": list(row.messages), "response": row.response, "id": row.id, "must_contain": list(row.must_contain)}
        for row in read_rows(file)
    ]
