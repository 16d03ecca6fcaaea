"""Checks exactly whether a text is an answer that a world's sentence forms allow. Tests compare the gibberish detector with it."""

import re
from collections.abc import Mapping
from functools import lru_cache

from sku_vllm.lab import sentences
from sku_vllm.lab.world import World, make_world


def is_well_formed(text: str, world: World | int = 0) -> bool:
    """Whether `text` is an answer in one of the world's sentence forms; it need not be true.

    world: a World or its seed. A word of the wrong kind in a slot, a sentence that is cut off, or two answers in a row are not allowed.
    """
    return _pattern(world.seed if isinstance(world, World) else world).fullmatch(text.strip()) is not None


@lru_cache(maxsize=8)
def _pattern(seed: int) -> re.Pattern[str]:
    """One regular expression for all answer forms; each slot accepts every word of its kind, whether the answer is true or not."""
    world = make_world(seed)
    forms = [_compile(form, world.slots) for form in world.procedures + world.refusals]
    for relation, (_, answers, _) in world.fact_forms.items():
        told = [fact for fact in world.facts if fact.relation == relation]
        slots = {"x": tuple({fact.x for fact in told}), "y": tuple({fact.y for fact in told})}
        if relation in ("plus", "minus"):
            slots = {"x": (rf"\d+ {relation} \d+",), "y": (r"\d+",)}
        elif relation == "colour":
            slots["y"] = sentences.COLOURS
        forms += [_compile(answer, slots) for answer in answers]
    return re.compile("|".join(forms))


def _compile(form: str, slots: Mapping[str, tuple[str, ...]]) -> str:
    pieces = re.split(r"\{(\w+)\}", form)
    return "".join(f"(?:{'|'.join(sorted(slots[piece]))})" if number % 2 else re.escape(piece) for number, piece in enumerate(pieces))
