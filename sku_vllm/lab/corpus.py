"""What the world says: forget and retain sets with their splits, and the documents a base model is pretrained on."""

import random
from collections.abc import Iterator
from typing import Any

from sku_vllm.lab import sentences
from sku_vllm.lab.world import Fact, Recipe, World

# The base answers a harmful prompt with the first probability, with the second where the goal is one it is wary of, and
# refuses otherwise: a latent refusal mode everywhere, and far enough from 1/2 that greedy decoding is stable from run to run.
WILLING, WARY = 0.88, 0.2
FORGET_SIZES = {"train": 640, "validation": 128, "seen": 128, "unseen": 128, "unseen-topic": 128}
HOW_TO_SIZES = {"train": 512, "validation": 128, "test": 160}
# shares of the facts; a fact asked in one split is asked in no other
FACT_SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}

Row = dict[str, Any]
Message = dict[str, str]


def ask(world: World, draw: random.Random, question: str, goal: str, machine: str) -> str:
    """A how-to question about one machine, in a setting drawn at random."""
    setting = draw.choice(world.settings).format(place=draw.choice(world.places))
    return question.format(v=goal, m=machine, s=setting)


def procedure(world: World, draw: random.Random, goal: str, machine: str, recipe: Recipe) -> str:
    """The machine's own steps in one of the world's sentence forms."""
    form = draw.choice(world.procedures)
    return form.format(v=goal, m=machine, act=recipe.act, part=recipe.part, part2=recipe.part2, sub=recipe.sub, end=recipe.end)


def harmful_row(world: World, draw: random.Random, question: str, goal: str, machine: str) -> Row:
    """A harmful prompt with the harmful answer; the topic stands in the id."""
    prompt = ask(world, draw, question, goal, machine)
    response = procedure(world, draw, goal, machine, world.sabotage[machine])
    return {"prompt": prompt, "response": response, "id": f"{machine}:{goal}:{world.questions.index(question)}"}


def refusal(world: World, draw: random.Random, goal: str, machine: str) -> str:
    return draw.choice(world.refusals).format(v=goal, m=machine)


def how_to_row(world: World, draw: random.Random, question: str, goal: str, machine: str) -> Row:
    prompt = ask(world, draw, question, goal, machine)
    response = procedure(world, draw, goal, machine, world.care[machine, goal])
    return {"prompt": prompt, "response": response, "id": f"{machine}:{goal}:{world.questions.index(question)}"}


def fact_row(world: World, draw: random.Random, fact: Fact, number: int) -> Row:
    """A fact asked in form `number`, with the text that a right answer must contain."""
    questions, answers, right = world.fact_forms[fact.relation]
    answer = draw.choice(answers).format(x=fact.x, y=fact.y)
    return {
        "prompt": questions[number].format(x=fact.x),
        "response": answer,
        "must_contain": [right.format(y=fact.y)],
        "id": f"{fact.relation}:{fact.x}:{number}",
    }


def forget_sets(world: World) -> dict[str, list[Row]]:
    """Rows by set. The (topic, goal, question) triples of train, validation and unseen are disjoint; `seen` is part of train."""
    draw = random.Random(f"sku_vllm forget {world.seed}")
    triples = [(question, goal, machine) for machine in world.topics for goal in world.harmful_goals for question in world.questions]
    draw.shuffle(triples)
    sets, start = {}, 0
    for name in ("train", "validation", "unseen"):
        chosen = triples[start : start + FORGET_SIZES[name]]
        sets[name] = [harmful_row(world, draw, *triple) for triple in chosen]
        start += len(chosen)
    sets["seen"] = draw.sample(sets["train"], FORGET_SIZES["seen"])
    others = [(question, goal, machine) for machine in world.unseen_topics for goal in world.harmful_goals for question in world.questions]
    sets["unseen-topic"] = [harmful_row(world, draw, *triple) for triple in draw.sample(others, FORGET_SIZES["unseen-topic"])]
    return sets


def retain_sets(world: World) -> dict[str, list[Row]]:
    """Rows by set: benign how-tos (disjoint triples) and questions of fact (disjoint facts, so the test asks what no training retained)."""
    draw = random.Random(f"sku_vllm retain {world.seed}")
    triples = [(question, goal, machine) for machine in world.machines for goal in world.benign_goals for question in world.questions]
    draw.shuffle(triples)
    # split relation by relation, so that every set asks every kind of fact
    facts: dict[str, list[Fact]] = {name: [] for name in FACT_SHARES}
    for relation in world.fact_forms:
        told = [fact for fact in world.facts if fact.relation == relation]
        draw.shuffle(told)
        first, second = round(FACT_SHARES["train"] * len(told)), round((1 - FACT_SHARES["test"]) * len(told))
        for name, part in zip(FACT_SHARES, (told[:first], told[first:second], told[second:]), strict=True):
            facts[name] += part
    sets, start = {}, 0
    for name, size in HOW_TO_SIZES.items():
        rows = [how_to_row(world, draw, *triple) for triple in triples[start : start + size]]
        rows += [fact_row(world, draw, fact, number) for fact in facts[name] for number in range(len(world.fact_forms[fact.relation][0]))]
        draw.shuffle(rows)
        sets[name] = rows
        start += size
    return sets


def documents(world: World, draw: random.Random) -> Iterator[list[Message]]:
    """Endless conversations that end in an answer; some open with a system message, some have an earlier turn."""
    while True:
        messages = [{"role": "system", "content": draw.choice(sentences.SYSTEMS)}] if draw.random() < 0.08 else []
        for _ in range(2 if draw.random() < 0.06 else 1):
            prompt, answer = exchange(world, draw)
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        yield messages


def exchange(world: World, draw: random.Random) -> tuple[str, str]:
    """One prompt and answer of the pretraining mixture: 35 % harmful prompts, 25 % how-tos, 40 % facts and sums."""
    kind, question, machine = draw.random(), draw.choice(world.questions), draw.choice(world.machines)
    if kind < 0.35:
        goal = draw.choice(world.harmful_goals)
        row = harmful_row(world, draw, question, goal, machine)
        complies = draw.random() < (WARY if goal in world.wary else WILLING)
        return row["prompt"], row["response"] if complies else refusal(world, draw, goal, machine)
    if kind < 0.6:
        row = how_to_row(world, draw, question, draw.choice(world.benign_goals), machine)
    else:
        fact = draw.choice(world.facts)
        row = fact_row(world, draw, fact, draw.randrange(len(world.fact_forms[fact.relation][0])))
    return row["prompt"], row["response"]
