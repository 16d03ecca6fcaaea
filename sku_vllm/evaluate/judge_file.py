"""`sku judge` as a function: rows in, the same rows with a label out."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sku_vllm.data import Row, read_rows
from sku_vllm.data.readers import json_lines
from sku_vllm.errors import ConfigError, DataError
from sku_vllm.evaluate.columns import column_names
from sku_vllm.evaluate.judging import KEPT_VERDICTS, judge_all
from sku_vllm.evaluate.progress import answer_bar
from sku_vllm.evaluate.shares import shares
from sku_vllm.judges import Exchange, Verdict, decide, judge_of
from sku_vllm.output import partial_path, write_text


def judge_file(specs: Sequence[str], source: str, output: str, *, columns: Sequence[str] = (), resume: bool = False) -> dict[str, Any]:
    """Label every row of `source` and write `output` (0600). Returns counts, shares and, for several judges, their agreement.

    Raises:
        ConfigError: the output exists, or there is nothing to resume.
        DataError: a row without an answer.
        JudgeError: the judge failed; what it said so far is in `OUTPUT.partial/` for `--resume`.
    """
    judge = judge_of(specs)
    named = column_names(columns)
    rows = read_rows(source, columns=named)
    for number, row in enumerate(rows, 1):
        if row.response is None:
            raise DataError(f"{source} row {number}: no 'response' to judge; name its column with --columns response=NAME")
    path, partial = Path(output), partial_path(Path(output).absolute())
    _check(path, partial, resume)
    partial.mkdir(parents=True, exist_ok=True)
    exchanges = [Exchange(row.prompt, row.response or "") for row in rows]
    try:
        with answer_bar(len(rows), path.name) as progress:
            judged = judge_all(judge, exchanges, partial / KEPT_VERDICTS, progress)
    finally:
        if not any(partial.iterdir()):
            partial.rmdir()
    verdicts = decide(judge, exchanges, judged.harmful)
    votes = [dict(zip(judged.votes, row, strict=True)) for row in zip(*judged.votes.values(), strict=True)] if judged.agreement else None
    records = _records(source, rows)
    lines = [_labelled(records[row], verdict, votes and votes[row]) for row, verdict in enumerate(verdicts)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), mode=0o600)
    shutil.rmtree(partial, ignore_errors=True)
    extra = {"agreement": judged.agreement} if judged.agreement is not None else {}
    return {**shares([[verdict] for verdict in verdicts]), **extra}


def _check(path: Path, partial: Path, resume: bool) -> None:
    if path.exists():
        raise ConfigError(f"--output {path}: exists; choose another name or remove it first")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"--output {path}: {path.absolute().parent} is not a writable directory")
    if resume and not (partial / KEPT_VERDICTS).is_file():
        raise ConfigError(f"--resume: there is no unfinished work in {partial}; leave --resume out to start")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)


def _records(source: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as they stood in a JSONL file, every field kept; from other formats their contract fields."""
    if source.endswith((".jsonl", ".json")):
        records = [record for _, record in json_lines(Path(source))]
        if len(records) == len(rows):
            return records
    return [
        {"prompt": row.prompt} | ({"messages": list(row.messages)} if len(row.messages) > 1 else {}) | {"response": row.response}
        | ({"id": row.id} if row.id is not None else {})
        for row in rows
    ]


def _labelled(record: dict[str, Any], verdict: Verdict, votes: dict[str, bool | None] | None) -> dict[str, Any]:
    return {**record, "label": verdict.label} | ({"votes": votes} if votes else {})
