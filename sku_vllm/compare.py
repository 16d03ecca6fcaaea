"""Two evaluations, or two arms of a running server, over the same prompts: paired differences, and the prompts on which they differ."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.data import Row
from sku_vllm.data.readers import json_lines
from sku_vllm.errors import DataError
from sku_vllm.judges import LABELS
from sku_vllm.stats.paired import paired_difference

Key = tuple[str, str, str]
Judged = Mapping[Key, list[dict[str, Any]]]


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

    Raises:
        DataError: a file is missing or malformed, or the two share no prompt.
    """
    return compare_judged(str(a), read_judged(a), str(b), read_judged(b), seed=seed)


def compare_judged(a: str, left: Judged, b: str, right: Judged, *, seed: int = 0) -> Comparison:
    """Answers are paired by set, mode, prompt and the order in which samples of that prompt appear."""
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
            label: asdict(
                paired_difference(
                    [x["label"] == label for _, x, _ in found],
                    [y["label"] == label for _, _, y in found],
                    [prompt for prompt, _, _ in found],
                    seed=seed,
                )
            )
            for label in LABELS
        }
    differ = [
        {
            "set": name,
            "mode": mode,
            "prompt": prompt,
            "a": x["label"],
            "b": y["label"],
            "response_a": x["response"],
            "response_b": y["response"],
        }
        for (name, mode), found in pairs.items()
        for prompt, x, y in found
        if x["label"] != y["label"]
    ]
    return Comparison(a, b, dict(sets), differ, unpaired)


def read_judged(path: str | Path) -> Judged:
    """Judged rows by (set, mode, prompt); `path` is a rows.jsonl, verdicts.jsonl or the directory of one.

    Rows without `set` or `mode` (from `sku judge`) count as set "rows", mode "given".
    """
    path = Path(path)
    file = path / "rows.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a directory that sku eval wrote, or a JSONL file that sku judge labelled")
    rows: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for where, row in json_lines(file):
        try:
            label, response = row["label"], row["response"]
            key = row.get("set", "rows"), row.get("mode", "given"), _prompt(row)
            if not all(isinstance(text, str) for text in (*key, response)):
                raise TypeError("set, mode, prompt and response have to be text")
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{where}: not a judged row ({type(error).__name__}: {error}); label it with sku judge") from error
        if label not in LABELS:
            raise DataError(f"{where}: label {label!r} is none of {', '.join(LABELS)}")
        rows[key].append({"label": label, "response": response})
    if not rows:
        raise DataError(f"{file}: has no rows; evaluate at least one prompt")
    return rows


def ask_arm(
    address: str,
    forget: Mapping[str, Sequence[Row]],
    judge: str,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 128,
    seed: int = 0,
) -> Judged:
    """Judged answers of one arm or model of a running server; `address` is URL#MODEL.

    Raises:
        RunError: the server does not answer. ConfigError, DataError: a judge that cannot be loaded.
    """
    from sku_vllm.judges import Exchange, load_labeller
    from sku_vllm.probe import ask

    server, _, model = address.rpartition("#")
    label = load_labeller(judge)
    rows: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for name, asked in forget.items():
        many = [row for row in asked for _ in range(samples)]
        answers = ask(
            server.rstrip("/").removesuffix("/v1"),
            model,
            [row.messages for row in many],
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
        )
        verdicts = label([Exchange(row.prompt, answer) for row, answer in zip(many, answers, strict=True)])
        for row, answer, verdict in zip(many, answers, verdicts, strict=True):
            rows[name, "sampled" if temperature else "greedy", row.prompt].append({"label": verdict.label, "response": answer})
    return rows


def _prompt(row: Mapping[str, Any]) -> str:
    return row["prompt"] if "prompt" in row else [turn["content"] for turn in row["messages"] if turn["role"] == "user"][-1]
