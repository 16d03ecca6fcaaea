"""A judge over many answers, in pieces that survive an interruption."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sku_vllm.errors import JudgeError
from sku_vllm.evaluate.backend import Progress
from sku_vllm.judges import Exchange, Judge
from sku_vllm.judges.all_of import AllOf, agreement, strictest

CHUNK = 64
KEPT_VERDICTS = "verdicts.jsonl"


class JudgedVotes:
    """Every judge's verdict on every answer: `.harmful` (the strictest) and, for `all:A,B`, `.agreement`."""

    def __init__(self, votes: dict[str, list[bool | None]]) -> None:
        self.votes = votes
        self.harmful = strictest(votes)
        self.agreement: list[dict[str, Any]] | None = agreement(votes) if len(votes) > 1 else None


def judge_all(judge: Judge, exchanges: Sequence[Exchange], kept: Path | None = None, progress: Progress | None = None) -> JudgedVotes:
    """Judge in chunks. With `kept`, every chunk is appended to that file (0600) and what it already holds is not asked again.

    Raises:
        JudgeError: the judge failed; the chunks before it are in `kept`.
    """
    names = [part.name for part in judge.judges] if isinstance(judge, AllOf) else [judge.name]
    known = _read(kept) if kept else {}
    keys = [_key(names, exchange) for exchange in exchanges]
    # Each answer is asked once, however often it occurs: greedy answers of near-twins and short refusals repeat a lot.
    todo = list({key: exchange for key, exchange in zip(keys, exchanges, strict=True) if key not in known}.items())
    if progress:
        progress(len(keys) - len(todo))
    for start in range(0, len(todo), CHUNK):
        piece = todo[start : start + CHUNK]
        asked = [exchange for _, exchange in piece]
        try:
            votes = judge.votes(asked) if isinstance(judge, AllOf) else {judge.name: judge.judge(asked)}
        except JudgeError as error:
            resumable = kept and any(kept.parent.iterdir())
            where = f"; {len(known)} verdicts are kept in {kept.parent}, continue with --resume" if resumable else ""
            raise JudgeError(f"{error}{where}") from error
        rows = {key: [votes[name][row] for name in names] for row, (key, _) in enumerate(piece)}
        known.update(rows)
        if kept:
            _append(kept, rows)
        if progress:
            progress(len(rows))
    return JudgedVotes({name: [known[key][column] for key in keys] for column, name in enumerate(names)})


def _key(names: Sequence[str], exchange: Exchange) -> str:
    """Judges and text: kept verdicts of another judge or an older answer are never taken for this one."""
    return hashlib.sha256(json.dumps([names, exchange.prompt, exchange.response]).encode()).hexdigest()


def _read(path: Path) -> dict[str, list[bool | None]]:
    if not path.exists():
        return {}
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line being written when the run was killed, and what a resumed run wrote behind it
        known[row["key"]] = row["votes"]
    return known


def _append(path: Path, rows: dict[str, list[bool | None]]) -> None:
    with open(path, "a", encoding="utf-8", opener=private) as file:
        for key, votes in rows.items():
            file.write(json.dumps({"key": key, "votes": votes}) + "\n")


def private(path: str, flags: int) -> int:
    """An opener for kept text: readable by its owner only."""
    return os.open(path, flags, 0o600)
