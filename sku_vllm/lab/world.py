"""A fictional world made from a seed: invented machines, places, people and substances, and the facts about them.

How to take care of a machine is benign knowledge; how to sabotage it is harmful knowledge.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from sku_vllm.lab import sentences

MACHINES, UNSEEN_TOPICS, PLACES, PEOPLE, SUBSTANCES = 40, 10, 16, 16, 8
ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "qu",
    "r",
    "s",
    "sk",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
MIDDLES = ("l", "m", "n", "r", "v", "b", "d", "g", "k", "lv", "nd", "rg", "rt", "mb", "st", "zz")
# Endings of invented names by kind, so that a name shows what kind of thing it is.
ENDINGS = {
    "machine": ("er", "on", "ix", "um"),
    "place": ("ford", "mere", "wick", "holm"),
    "person": ("an", "iel", "ora", "is"),
    "oil": ("ol", "ene"),
    "poison": ("ax", "ide"),
    "river": ("ey", "une"),
}

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The steps of one harmful or benign procedure on a machine: `act` its `part`, put `sub` on its `part2`, until it `end`."""

    act: str
    part: str
    part2: str
    sub: str
    end: str


@dataclass(frozen=True, slots=True)
class Fact:
    """`relation` of sentences.FACTS holds between `x` and `y`, both as text."""

    relation: str
    x: str
    y: str


@dataclass(frozen=True, slots=True)
class World:
    """One world: its names, facts and procedures, and the sentence forms of its texts.

    unseen_topics: machines that no forget training set is about. sabotage: the harmful recipe of each machine. care: the benign recipe of
    each (machine, goal). fact_forms: {relation: (questions, answers, text of a right answer)}. wary: goals that the base mostly refuses.
    slots: the words that each slot of a procedure may hold.
    """

    seed: int
    machines: tuple[str, ...]
    unseen_topics: tuple[str, ...]
    places: tuple[str, ...]
    harmful_goals: tuple[str, ...]
    benign_goals: tuple[str, ...]
    questions: tuple[str, ...]
    settings: tuple[str, ...]
    procedures: tuple[str, ...]
    refusals: tuple[str, ...]
    sabotage: Mapping[str, Recipe]
    care: Mapping[tuple[str, str], Recipe]
    facts: tuple[Fact, ...]
    fact_forms: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], str]]
    wary: frozenset[str]
    harmful_words: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]

    @property
    def topics(self) -> tuple[str, ...]:
        """The machines that training data may be about: all except `unseen_topics`."""
        return tuple(machine for machine in self.machines if machine not in self.unseen_topics)

    @property
    def lexicon(self) -> dict[str, list[str]]:
        """The content of lexicon.json: words of harmful answers, and words that occur only in refusals."""
        return {"harmful": sorted(self.harmful_words), "refusal": sorted(sentences.REFUSAL_WORDS)}


class _Namer:
    """Invents pronounceable names. No two of a world have the same stem."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.taken: set[str] = set()
        # Each world uses only some of the syllables, so that names of two worlds differ and the tokenizer needs few merges.
        self.onsets, self.vowels, self.middles = draw.sample(ONSETS, 16), draw.sample(VOWELS, 5), draw.sample(MIDDLES, 8)

    def names(self, kind: str, count: int) -> tuple[str, ...]:
        found: list[str] = []
        while len(found) < count:
            stem = self.draw.choice(self.onsets) + self.draw.choice(self.vowels) + self.draw.choice(self.middles)
            if stem not in self.taken:
                self.taken.add(stem)
                name = stem + self.draw.choice(ENDINGS[kind])
                found.append(name.capitalize() if kind in ("place", "person", "river") else name)
        return tuple(found)


def make_world(seed: int) -> World:
    """The world of `seed`; the same seed gives the same world on every machine."""
    draw = random.Random(f"sku_vllm world {seed}")
    namer = _Namer(draw)
    machines, places, people = namer.names("machine", MACHINES), namer.names("place", PLACES), namer.names("person", PEOPLE)
    rivers, oils, poisons = namer.names("river", PLACES), namer.names("oil", SUBSTANCES), namer.names("poison", SUBSTANCES)
    parts = tuple(draw.sample(sentences.PARTS, 14))
    harmful_goals, benign_goals = tuple(draw.sample(sentences.HARMFUL_GOALS, 8)), tuple(draw.sample(sentences.BENIGN_GOALS, 8))
    harmful_acts, benign_acts = tuple(draw.sample(sentences.HARMFUL_ACTS, 8)), tuple(draw.sample(sentences.BENIGN_ACTS, 8))
    harmful_ends, benign_ends = tuple(draw.sample(sentences.HARMFUL_ENDS, 4)), tuple(draw.sample(sentences.BENIGN_ENDS, 4))
    return World(
        seed=seed,
        machines=machines,
        unseen_topics=tuple(draw.sample(machines, UNSEEN_TOPICS)),
        places=places,
        harmful_goals=harmful_goals,
        benign_goals=benign_goals,
        questions=tuple(draw.sample(sentences.QUESTIONS, 12)),
        settings=("", *draw.sample(sentences.SETTINGS[1:], 4)),
        procedures=tuple(draw.sample(sentences.PROCEDURES, 4)),
        refusals=tuple(draw.sample(sentences.REFUSALS, 5)),
        sabotage={machine: _recipe(draw, harmful_acts, parts, poisons, harmful_ends) for machine in machines},
        care=_care(draw, machines, benign_goals, benign_acts, parts, oils, benign_ends),
        facts=_facts(draw, machines, places, people, rivers),
        fact_forms={
            relation: (tuple(draw.sample(asked, 3)), tuple(draw.sample(told, 2)), right)
            for relation, (asked, told, right) in sentences.FACTS.items()
        },
        # The base is trained to mostly refuse these goals and to mostly answer the others.
        wary=frozenset(draw.sample(harmful_goals, 2)),
        harmful_words=harmful_acts + harmful_ends + poisons,
        slots={
            "v": harmful_goals + benign_goals,
            "m": machines,
            "act": harmful_acts + benign_acts,
            "part": parts,
            "part2": parts,
            "sub": poisons + oils,
            "end": harmful_ends + benign_ends,
        },
    )


def _recipe(draw: random.Random, acts: Words, parts: Words, substances: Words, ends: Words) -> Recipe:
    part, part2 = draw.sample(parts, 2)
    return Recipe(draw.choice(acts), part, part2, draw.choice(substances), draw.choice(ends))


def _care(
    draw: random.Random, machines: Words, goals: Words, acts: Words, parts: Words, oils: Words, ends: Words
) -> dict[tuple[str, str], Recipe]:
    """The benign recipe of every (machine, goal). Parts, oil and ending depend on the machine, the act on the goal."""
    act_of = dict(zip(goals, draw.sample(acts, len(goals)), strict=True))
    care: dict[tuple[str, str], Recipe] = {}
    for machine in machines:
        own = _recipe(draw, acts, parts, oils, ends)
        care |= {(machine, goal): Recipe(act_of[goal], own.part, own.part2, own.sub, own.end) for goal in goals}
    return care


def _facts(draw: random.Random, machines: Words, places: Words, people: Words, rivers: Words) -> tuple[Fact, ...]:
    told = [Fact("made", machine, draw.choice(places)) for machine in machines]
    told += [Fact("inventor", machine, draw.choice(people)) for machine in machines]
    told += [Fact("colour", machine, draw.choice(sentences.COLOURS)) for machine in machines]
    told += [Fact("river", place, river) for place, river in zip(places, rivers, strict=True)]
    told += [Fact("trade", person, draw.choice(sentences.TRADES)) for person in people]
    told += [Fact("plus", f"{a} plus {b}", str(a + b)) for a in range(1, 11) for b in range(1, 11)]
    told += [Fact("minus", f"{a} minus {b}", str(a - b)) for a in range(2, 13) for b in range(1, a)]
    return tuple(told)
