"""Two evaluations over the same prompts: paired differences per set and the prompts on which they differ."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.errors import DataError
from sku_vllm.judges import LABELS
from sku_vllm.stats.paired import paired_difference

Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`sets[NAME][mode][label]` is a PairedDifference as a dict; `differ` lists answers whose label is not the same on both sides."""

    a: str
    b: str
    sets: dict[str, dict[str, dict[str, Any]]]
    differ: list[dict[str, Any]]
    unpaired: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(a: str | Path, b: str | Path, *, seed: int = 0) -> Comparison:
    """Compare the `rows.jsonl` of two evaluations (the file, or the directory `sku eval` wrote).

    Answers are paired by set, mode, prompt and the order in which samples of that prompt appear.

    Raises:
        DataError: a file is missing or malformed, or the two share no prompt.
    """
    left, right = read_judged(a), read_judged(b)
    pairs: dict[tuple[str, str], list[tuple[str, dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    unpaired = 0
    for key in dict.fromkeys([*left, *right]):
        ours, theirs = left.get(key, []), right.get(key, [])
        unpaired += abs(len(ours) - len(theirs))
        pairs[key[:2]] += [(key[2], x, y) for x, y in zip(ours, theirs, strict=False)]
    pairs = {place: found for place, found in pairs.items() if found}
    if not pairs:
        raise DataError(f"{a} and {b} share no prompt; compare evaluations of the same --forget and --retain files")
    sets: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for (name, mode), found in pairs.items():
        sets[name][mode] = {
            label: asdict(paired_difference([x["label"] == label for _, x, _ in found], [y["label"] == label for _, _, y in found],
                                            [prompt for prompt, _, _ in found], seed=seed))
            for label in LABELS
        }
    differ = [
        {"set": name, "mode": mode, "prompt": prompt, "a": x["label"], "b": y["label"], "response_a": x["response"], "response_b": y["response"]}
        for (name, mode), found in pairs.items() for prompt, x, y in found if x["label"] != y["label"]
    ]
    return Comparison(str(a), str(b), dict(sets), differ, unpaired)


def read_judged(path: str | Path) -> Mapping[Key, list[dict[str, Any]]]:
    """Judged rows by (set, mode, prompt); `path` is a rows.jsonl, verdicts.jsonl or the directory of one.

    Rows without `set` or `mode` (from `sku judge`) count as set "rows", mode "given".
    """
    path = Path(path)
    file = path / "rows.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a directory that sku eval wrote, or a JSONL file that sku judge labelled")
    rows: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                label, prompt, response = row["label"], _prompt(row), row["response"]
            except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
                raise DataError(f"{file}, line {number}: not a judged row ({type(error).__name__}: {error}); label it with sku judge") from error
            if label not in LABELS:
                raise DataError(f"{file}, line {number}: label {label!r} is none of {', '.join(LABELS)}")
            rows[row.get("set", "rows"), row.get("mode", "given"), prompt].append({"label": label, "response": response})
    if not rows:
        raise DataError(f"{file}: has no rows; evaluate at least one prompt")
    return rows


def _prompt(row: Mapping[str, Any]) -> str:
    return row["prompt"] if "prompt" in row else [turn["content"] for turn in row["messages"] if turn["role"] == "user"][-1]
