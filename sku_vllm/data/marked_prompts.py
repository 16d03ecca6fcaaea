"""Published sets that mark prompts as harmful, not answers: WildJailbreak and ToxicChat.

To a harmful prompt they hold refusals, or whatever a model said, so a forget set takes the prompts alone; `sku judge` takes the answers.
Open this file to add such a set.
"""

from collections.abc import Iterator, Sequence

from sku_vllm.data.answer_texts import Record
from sku_vllm.data.known_set import KnownSet
from sku_vllm.data.rows import BadRow, LeftOut, Row

KINDS = frozenset(("vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign"))


def wildjailbreak(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """WildJailbreak (Jiang et al. 2024), training and evaluation files: the adversarial prompt where there is one, else the vanilla one."""
    kind = str(record.get("data_type")).strip().casefold()
    if kind not in KINDS:
        raise BadRow(f"'data_type' is {kind!r}, expected one of {', '.join(sorted(KINDS))}; take the set's file as published")
    yield _row(record, ("adversarial", "vanilla"), "completion", kind.endswith("_harmful"), (kind, place, wanted))


def toxicchat(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """ToxicChat (Lin et al. 2023): what users of a chatbot asked, marked in `toxicity`."""
    mark = str(record.get("toxicity")).strip().casefold()
    if mark not in ("0", "1", "0.0", "1.0", "false", "true"):
        raise BadRow(f"'toxicity' is {mark!r}, expected 0 or 1; take the set's file as published")
    toxic = mark in ("1", "1.0", "true")
    identity = place if record.get("conv_id") is None else str(record["conv_id"])
    yield _row(record, ("user_input",), "model_output", toxic, (None, identity, wanted))


def _row(record: Record, prompts: Sequence[str], answer: str, harmful: bool, rest: tuple[str | None, str, bool | None]) -> Row:
    category, identity, wanted = rest
    if wanted is not None and wanted is harmful:
        raise LeftOut("safe prompts" if harmful is False else "unsafe prompts")
    asked = next((text for name in prompts if isinstance(text := record.get(name), str) and text.strip()), None)
    if asked is None:
        raise LeftOut("without a prompt")
    text = record.get(answer)
    said = text if isinstance(text, str) and text.strip() and wanted is not False else None
    return Row.ask(asked.strip(), said, id=identity, category=category)


def _is_wildjailbreak(columns: set[str], sample: Sequence[Record]) -> bool:
    return {"adversarial", "data_type"} <= columns and any(str(record.get("data_type")).strip().casefold() in KINDS for record in sample)


MARKED_PROMPTS = (
    KnownSet("WildJailbreak, prompts marked harmful or benign", wildjailbreak, _is_wildjailbreak),
    KnownSet(
        "ToxicChat, prompts marked toxic or not", toxicchat, lambda columns, sample: {"user_input", "model_output", "toxicity"} <= columns
    ),
)
