"""The function behind `sku judge`: read rows with answers, write the same rows with a label. No model but the judge is loaded."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sku_vllm.data import Columns, Row, read_source
from sku_vllm.errors import ConfigError, DataError
from sku_vllm.evaluate.answer_bar import answer_bar
from sku_vllm.evaluate.judged_row import add_grades, verdict_fields
from sku_vllm.evaluate.judging import KEPT_VERDICTS, judge_all
from sku_vllm.evaluate.measure_request import is_forget
from sku_vllm.evaluate.shares import by_category, shares_by_prompt
from sku_vllm.judges import Exchange, Verdict, judge_of
from sku_vllm.output import partial_path, write_text
from sku_vllm.records.rows_file import set_of

logger = logging.getLogger("sku_vllm.evaluate")
UNANSWERED = {"label": None, "reason": "no answer", "harm_judged": False}


def judge_file(specs: Sequence[str], source: str, output: str, *, columns: Sequence[str] = (), resume: bool = False) -> dict[str, Any]:
    """Label every answer of `source`, whatever marks it carries, and write `output` (0600).

    A line is the record with all its columns, in the order of the file, and what `verdict_fields` adds; a column that has one of these
    names is kept as `given_NAME`. prompt (messages), response and the judge's name are added where the record has no column of that name.
    Of a record with several answers each is a line. A row without an answer keeps its line, with null as its label, and is counted
    (`unanswered`).

    Returns counts, shares (clustered by conversation), shares by category, for several judges their agreement, and of the rows.jsonl of
    `sku eval` or `sku attack` the shares by set (behind the attack's name) and mode.

    Raises:
        ConfigError: the output exists, or there is nothing to resume.
        DataError: no row has an answer.
        JudgeError: the judge failed; the verdicts so far are in `OUTPUT.partial/` for `--resume`.
    """
    judge = judge_of(specs)
    reading = read_source(source, columns=Columns(columns).of(), safe=None, keep=True)
    answered = [place for place, row in enumerate(reading.rows) if row.response is not None]
    rows, origins = [reading.rows[place] for place in answered], [reading.origins[place] for place in answered]
    if not rows:
        raise DataError(
            f"{source}: none of its {len(reading.rows)} rows has a 'response' to judge; name its column with --columns response=NAME"
        )
    if without := len(reading.rows) - len(rows):
        logger.warning("%s: %d of %d rows have no answer, so they get no label and are in no share", source, without, len(reading.rows))
    path, partial = Path(output), partial_path(Path(output).absolute())
    _check(path, partial, resume)
    partial.mkdir(parents=True, exist_ok=True)
    # rows.jsonl of `sku eval` holds retain and border sets too.
    kinds = [is_forget(str(record.get("set"))) for record in origins]
    exchanges = [Exchange.of(row.messages, row.response or "", forget=kind) for row, kind in zip(rows, kinds, strict=True)]
    try:
        with answer_bar(len(exchanges), path.name) as progress:
            judged = judge_all(judge, exchanges, partial / KEPT_VERDICTS, progress)
    finally:
        if not any(partial.iterdir()):
            partial.rmdir()
    labelled = list(zip(rows, judged.verdicts, strict=True))
    fields = [verdict_fields(judged, place) for place in range(len(labelled))]
    found = dict(zip(answered, fields, strict=True))
    lines = [
        _line(*one, found.get(place, UNANSWERED), judge.name) for place, one in enumerate(zip(reading.origins, reading.rows, strict=True))
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines), mode=0o600)
    shutil.rmtree(partial, ignore_errors=True)
    extra = {"agreement": judged.agreement} if judged.agreement is not None else {}
    whole = shares_by_prompt((row.key, verdict) for row, verdict in labelled)
    if thought := sum(judged.in_reasoning):
        whole["harmful_in_reasoning"] = thought / whole["n"]
    whole |= by_category((row.category, row.key, verdict) for row, verdict in labelled)
    told = [{**one, "category": row.category} for one, row in zip(fields, rows, strict=True)]
    add_grades(whole, told)
    return {**whole, **({"unanswered": without} if without else {}), **_by_set(origins, labelled, told), **extra}


def _by_set(
    records: Sequence[dict[str, Any]], labelled: Sequence[tuple[Row, Verdict]], told: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """{"by_set": {set: {mode: shares}}} of the rows.jsonl of `sku eval` or `sku attack`; nothing for other rows.

    told: of each row, what `add_grades` reads.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for place, record in enumerate(records):
        name, mode = set_of(record), record.get("mode")
        if "set" in record and isinstance(name, str) and isinstance(mode, str):
            found.setdefault(name, {}).setdefault(mode, []).append(place)
    sets: dict[str, dict[str, Any]] = {}
    for name, modes in found.items():
        for mode, places in modes.items():
            rows = [(row.key, verdict) for row, verdict in (labelled[place] for place in places)]
            sets.setdefault(name, {})[mode] = shares = shares_by_prompt(rows)
            add_grades(shares, [told[place] for place in places])
    return {"by_set": sets} if sets else {}


def _check(path: Path, partial: Path, resume: bool) -> None:
    if path.exists():
        raise ConfigError(f"--output {path}: exists; choose another name or remove it first")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"--output {path}: {path.absolute().parent} is not a writable directory")
    if resume and not (partial / KEPT_VERDICTS).is_file():
        raise ConfigError(f"--resume: there is no unfinished work in {partial}; leave --resume out to start")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)


def _line(record: dict[str, Any], row: Row, fields: dict[str, Any], judge: str) -> dict[str, Any]:
    """The record with what was asked, answered and found. Of several answers in one column, the line says which was judged."""
    asked: dict[str, Any] = {"messages": list(row.messages)} if len(row.messages) > 1 else {"prompt": row.prompt}
    told = {
        name: value
        for name, value in {**asked, "response": row.response}.items()
        if value is not None and not isinstance(record.get(name), str)
    }
    if "messages" in told and record.get("messages") is not None:
        del told["messages"]  # the record's own turns, which may end with the answer
    added = {**told, "judge": judge, **fields}
    return {f"given_{name}" if name in added else name: value for name, value in record.items()} | added
