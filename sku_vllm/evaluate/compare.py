"""Compares judged answers of two models to the same prompts: paired differences of label rates.

Open this file to change how answers are paired or how judged files are read.
"""

import hashlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError, DataError
from sku_vllm.evaluate.read_judged import DECODING, Judged, Key, read_judged, same_judges
from sku_vllm.judges import LABELS
from sku_vllm.stats.paired import paired_difference


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing A with B.

    sets: {set: {mode: {label: PairedDifference as a dict}}}; without `harmful` where no judge decided harm. differ: answers labelled
    differently in A and B, with their text. unpaired: answers without a partner, which are left out. unjudged: answers that no judge
    decided. warnings: what else differs between A and B.
    """

    a: str
    b: str
    sets: dict[str, dict[str, dict[str, Any]]]
    differ: list[dict[str, Any]]
    unpaired: int
    unjudged: int
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """The fields by name; `differ` holds judged text."""
        return asdict(self)


def compare(a: str | Path, b: str | Path, *, any_judge: bool = False) -> Comparison:
    """Compare the `rows.jsonl` of two evaluations (the file, or the directory `sku eval` wrote).

    any_judge: compare labels of different judges, with a warning.

    Raises:
        ConfigError: different judges labelled the two. DataError: a file is missing or malformed, or the two share no prompt.
    """
    return compare_judged(str(a), read_judged(a), str(b), read_judged(b), any_judge=any_judge)


def compare_judged(a: str, left: Judged, b: str, right: Judged, *, any_judge: bool = False) -> Comparison:
    """Compare judged answers, paired by set, mode, conversation and, among answers to one conversation, by their order.

    Where one side has fewer answers to a conversation, as many of the other are taken, by the sha256 of their text.

    Raises:
        ConfigError: different judges labelled the two. DataError: the two share no prompt.
    """
    warnings = _differences(a, left, b, right, any_judge)
    pairs: dict[tuple[str, str], list[tuple[Key, dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    unpaired = 0
    for key in dict.fromkeys([*left.rows, *right.rows]):
        answers_a, answers_b = _as_many(left.rows.get(key, []), right.rows.get(key, []))
        unpaired += len(left.rows.get(key, [])) + len(right.rows.get(key, [])) - 2 * len(answers_a)
        pairs[key[:2]] += [(key, x, y) for x, y in zip(answers_a, answers_b, strict=True)]
    pairs = {place: found for place, found in pairs.items() if found}
    if not pairs:
        raise DataError(f"{a} and {b} share no prompt; compare evaluations of the same --forget and --retain files")
    undecided = {name for name, _ in pairs if not (left.opinion and right.opinion)} | left.undecided | right.undecided
    sets: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for (name, mode), found in pairs.items():
        keys = [key for key, _, _ in found]
        labels = LABELS[1:] if name in undecided else LABELS
        sets[name][mode] = {
            label: asdict(paired_difference([x["label"] == label for _, x, _ in found], [y["label"] == label for _, _, y in found], keys))
            for label in labels
        }
    differ = [
        {"set": name, "mode": mode, "prompt": x["prompt"], "a": x["label"], "b": y["label"]}
        | {"response_a": x["response"], "response_b": y["response"]}
        for (name, mode), found in pairs.items()
        for _, x, y in found
        if x["label"] != y["label"]
    ]
    return Comparison(a, b, dict(sets), differ, unpaired, left.unjudged + right.unjudged, warnings)


def _as_many(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Equally many answers of both: those of the longer list whose text has the smallest sha256, so that their order is of no account."""
    size = min(len(one), len(other))

    def fewer(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(answers) == size:
            return answers
        return sorted(answers, key=lambda answer: (hashlib.sha256(answer["response"].encode()).digest(), answer["label"]))[:size]

    return fewer(one), fewer(other)


def _differences(a: str, left: Judged, b: str, right: Judged, any_judge: bool) -> list[str]:
    """What besides the models differs between two sides, as sentences.

    Raises:
        ConfigError: the judges differ, and `any_judge` is not given.
    """
    warnings = [side.changed for side in (left, right) if side.changed]
    if left.judge and right.judge and not same_judges(left.judge, right.judge):
        told = f"A was judged by {', '.join(left.judge)}, B by {', '.join(right.judge)}"
        if not any_judge:
            raise ConfigError(
                f"{told}: a difference could be the judges' own; label both with one, sku judge --judge SPEC --input {a}/rows.jsonl, "
                "or compare all the same with --any-judge"
            )
        warnings.append(told)
    elif left.opinion is not right.opinion:
        raise ConfigError(
            f"{a if right.opinion else b} was labelled without an opinion on harm, the other with one; label both with one judge"
        )
    if not left.judge or not right.judge:
        warnings.append(f"which judge labelled {a if not left.judge else b} is not known; make sure it is the same for both")
    for name in DECODING:
        if name in left.settings and name in right.settings and left.settings[name] != right.settings[name]:
            warnings.append(f"{name.replace('_', '-')} differs: {left.settings[name]} in A, {right.settings[name]} in B")
    templates = left.settings.get("prompt_template"), right.settings.get("prompt_template")
    if all(templates) and templates[0] != templates[1]:
        warnings.append("the two models were asked in different prompt templates")
    return warnings
