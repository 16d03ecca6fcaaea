"""Written examples of refusals and of answers: forms with slots, filled with words in turn.

    {"slots": {"do": ["rob a shop", …], …}, "refusal": ["I won't tell you how to {do}.", …], "compliance": […]}

A filler may hold slots itself. The same slot means the same words throughout a form; {do2} draws again from the slot `do`.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

FORMS = Path(__file__).with_name("refusal_seeds.json")
# Slots of openings have a hundred fillers and dozens of forms, so each is still seen often.
MOST = 32
_SLOT = re.compile(r"\{([a-z]+)\d?\}")


@dataclass(frozen=True, slots=True)
class Example:
    """One written answer, whether it refuses, and which form it fills (its number, and how many answers that form gave)."""

    answer: str
    refuses: bool
    form: int
    siblings: int


def written_examples(path: Path = FORMS) -> list[Example]:
    """All forms, each filled as often as its longest slot has fillers, but at most MOST times; the same file gives the same examples."""
    written = json.loads(path.read_text(encoding="utf-8"))
    forms = [(form, True) for form in written["refusal"]] + [(form, False) for form in written["compliance"]]
    draw, examples = random.Random(0), []
    for number, (form, refuses) in enumerate(forms):
        answers = _filled(form, written["slots"], draw)
        examples += [Example(answer, refuses, number, len(answers)) for answer in answers]
    return examples


def _filled(form: str, slots: dict[str, list[str]], draw: random.Random) -> list[str]:
    columns = {slot.group(0): _shuffled(slots[slot.group(1)], draw) for slot in _SLOT.finditer(form)}
    count = min(MOST, max(map(len, columns.values()), default=1))
    return [_fill(form, slots, {slot: fillers[k % len(fillers)] for slot, fillers in columns.items()}, draw) for k in range(count)]


def _shuffled(fillers: list[str], draw: random.Random) -> list[str]:
    return draw.sample(fillers, len(fillers))


def _fill(text: str, slots: dict[str, list[str]], chosen: dict[str, str], draw: random.Random) -> str:
    while _SLOT.search(text):
        for slot in _SLOT.finditer(text):
            chosen.setdefault(slot.group(0), draw.choice(slots[slot.group(1)]))
        text = _SLOT.sub(lambda slot: chosen[slot.group(0)], text)
    return text
