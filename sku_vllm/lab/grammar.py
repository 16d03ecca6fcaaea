"""An exact check of whether an answer is a sentence of a world: what gibberish detectors are held against."""

import re
from functools import lru_cache

from sku_vllm.lab import sentences
from sku_vllm.lab.world import World, make_world


def is_well_formed(text: str, world: World | int = 0) -> bool:
    """Whether `text` is an answer that the world's grammar can produce, true or not.

    `world` is a World or its seed. Right words in a wrong slot, a cut-off sentence and two answers run together are not well formed.
    """
    return _pattern(world.seed if isinstance(world, World) else world).fullmatch(text.strip()) is not None


@lru_cache(maxsize=8)
def _pattern(seed: int) -> re.Pattern[str]:
    """One expression for all answer forms; a slot accepts any word of its kind, whichever answer that makes true."""
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


def _compile(form: str, slots: dict[str, tuple[str, ...]]) -> str:
    pieces = re.split(r"\{(\w+)\}", form)
    return "".join(f"(?:{'|'.join(sorted(slots[piece]))})" if number % 2 else re.escape(piece) for number, piece in enumerate(pieces))
