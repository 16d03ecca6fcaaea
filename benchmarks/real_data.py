"""RealData: the rows of a data directory of bench_real, and which of them train, tune and measure.

Open this file to add a set, or to see what a directory has to hold; docs/benchmarks.md lists its files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.real_setup import Setup
from sku_vllm.data import Row, read_rows
from sku_vllm.data.files import json_lines
from sku_vllm.errors import DataError
from sku_vllm.evaluate.measure_request import BORDER, RETAIN

# Sets by name and the files they come from. Of VALIDATION, RETAIN and HH_BENIGN every second row trains or tunes, the others are measured.
VALIDATION, HH_BENIGN, XSTEST, HARMBENCH, UNSEEN = "validation", "hh-benign", "xstest", "harmbench", "unseen-topic"
NEEDED = ("forget_train", "retain_train", "forget_validation", "retain_validation")
FORGET_FILES = {XSTEST: "xstest_unsafe", HARMBENCH: "harmbench_standard_val", UNSEEN: "unseen_topic"}
BORDER_FILES = {XSTEST: "xstest_safe"}
QA_FILES = {"facts": "facts", "world": "world_facts"}


class RealData:
    """Rows by what they are for.

    Attributes:
        forget, retain, border: to train on. tuned: {"forget", "retain", "border"} sets to choose the scale on, by name where there are
            several. measured: the same, with other prompts. qa: questions with `must_contain`, by name. prose: texts. tasks: YAML files of
            lm-evaluation-harness, which may name their folder as @HERE@. missing: files that the directory does not have.

    Raises:
        DataError: a file that is needed is missing, or a file is malformed.
    """

    def __init__(self, setup: Setup) -> None:
        self.directory, most = setup.data, setup.measured
        self.missing: list[str] = []
        if not self.directory.is_dir():
            raise DataError(f"--data {self.directory}: no such directory; it holds {', '.join(f'{name}.jsonl' for name in NEEDED)}, …")
        train, validation = ({kind: self._needed(f"{kind}_{part}") for kind in ("forget", "retain")} for part in ("train", "validation"))
        self.forget, self.retain = spread(train["forget"], setup.forget_rows), spread(train["retain"], setup.retain_rows)
        near = self._rows("hh_benign_prompts")
        self.border = near[::2]
        self.tuned: dict[str, Mapping[str, Sequence[Row]]] = {
            "forget": {VALIDATION: spread(validation["forget"][::2], most)},
            "retain": {RETAIN: spread(validation["retain"][::2], most)},
            "border": {HH_BENIGN: spread(self.border, most)} if near else {},
        }
        self.measured: dict[str, Mapping[str, Sequence[Row]]] = {
            "forget": {VALIDATION: spread(validation["forget"][1::2], most), **self._sets(FORGET_FILES, most)},
            "retain": {RETAIN: spread(validation["retain"][1::2], most)},
            "border": ({HH_BENIGN: spread(near[1::2], most)} if len(near) > 1 else {}) | self._sets(BORDER_FILES, most),
        }
        self.qa = self._sets(QA_FILES, most)
        self.prose = spread(self._texts("prose_wikipedia"), most)
        self.tasks = sorted((self.directory / "lm_eval").glob("*.yaml")) if setup.lm_eval else []
        if setup.lm_eval and not self.tasks:
            self.missing.append("lm_eval/*.yaml")

    @property
    def sets(self) -> dict[str, Sequence[Row]]:
        """Every measured set by its name in rows.jsonl."""
        border = {BORDER + name: rows for name, rows in self.measured["border"].items()}
        return {**self.measured["forget"], **self.measured["retain"], **border}

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows train, tune and are measured, by set."""
        trained = {"forget trained": len(self.forget), "retain trained": len(self.retain), "border trained": len(self.border)}
        tuned = {f"{name} tuned": len(rows) for kind in self.tuned.values() for name, rows in kind.items()}
        rest = {name: len(rows) for name, rows in {**self.sets, **self.qa}.items()} | {"prose": len(self.prose)}
        return {name: count for name, count in {**trained, **tuned, **rest}.items() if count}

    def _needed(self, name: str) -> list[Row]:
        rows = read_rows(self.directory / f"{name}.jsonl", need_response=name.endswith("train"))
        if len(rows) < 2:
            raise DataError(f"{self.directory / name}.jsonl: needs at least 2 rows: one part tunes, the other is measured")
        return rows

    def _sets(self, files: Mapping[str, str], most: int | None) -> dict[str, Sequence[Row]]:
        found = {name: self._rows(file) for name, file in files.items()}
        return {name: spread(rows, most) for name, rows in found.items() if rows}

    def _rows(self, name: str) -> list[Row]:
        """The rows of an optional file; none, and a note in `missing`, where it is not there."""
        return read_rows(path) if (path := self._optional(name)) else []

    def _texts(self, name: str) -> list[str]:
        path = self._optional(name)
        found = []
        for where, record in json_lines(path) if path else ():
            if not isinstance(record.get("text"), str):
                raise DataError(f"{where}: has no 'text'; each line of {name}.jsonl is an object with one")
            found.append(record["text"])
        return found

    def _optional(self, name: str) -> Path | None:
        path = self.directory / f"{name}.jsonl"
        if not path.is_file():
            self.missing.append(path.name)
            return None
        return path


def spread(rows: Sequence[Any], most: int | None) -> list[Any]:
    """At most so many of the rows, evenly spaced, so that every part of a file is represented."""
    if most is None or len(rows) <= most:
        return list(rows)
    return [rows[number * len(rows) // most] for number in range(most)]
