"""Runs a judge over many answers in chunks, and stores each chunk's verdicts so that an interrupted run can continue.

Open this file to change how verdicts are stored for `--resume` or how several judges are asked.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sku_vllm.errors import JudgeError
from sku_vllm.evaluate.backend import Progress
from sku_vllm.evaluate.kept_lines import keep_lines, kept_lines
from sku_vllm.judges import Exchange, Judge
from sku_vllm.judges.all_of import AllOf
from sku_vllm.judges.exchange import Finding, findings_of
from sku_vllm.judges.labeller import JudgedVotes
from sku_vllm.judges.parts import combined, parts_of

CHUNK = 64  # answers judged, and then stored, at a time
KEPT_VERDICTS = "verdicts.jsonl"


def judge_all(
    judge: Judge,
    exchanges: Sequence[Exchange],
    kept: Path | None = None,
    progress: Progress | None = None,
    unlikely: Sequence[bool] | None = None,
) -> JudgedVotes:
    """Judge in chunks. With `kept`, every chunk is appended to that file (mode 0600), and answers already in it are not judged again.

    The final answer and the reasoning before it are judged apart (`sku_vllm.judges.parts`).

    Args:
        unlikely: see `sku_vllm.judges.labeller.detect`.

    Raises:
        JudgeError: the judge failed; the chunks before it are in `kept`.
    """
    judges = judge.judges if isinstance(judge, AllOf) else (judge,)
    names = [part.name for part in judges]
    known = _read(kept) if kept else {}
    # A verdict is used again for the same judges and the same exchange.
    parts = [
        [(hashlib.sha256(json.dumps([names, *part.identity]).encode()).hexdigest(), part) for part in parts_of(exchange)]
        for exchange in exchanges
    ]
    # An answer that occurs several times is judged once: short refusals and greedy answers to similar prompts are often identical.
    todo = list({key: part for several in parts for key, part in several if key not in known}.items())
    waiting = {key for key, _ in todo}
    if progress:
        progress(sum(all(key not in waiting for key, _ in several) for several in parts))
    # A judge that asks a server has many answers under way at once; a chunk holds several rounds of them.
    chunk = max(CHUNK, *(int(getattr(part, "batch", 0)) for part in judges))
    for start in range(0, len(todo), chunk):
        piece = todo[start : start + chunk]
        try:
            columns = [findings_of(part, [exchange for _, exchange in piece]) for part in judges]
        except JudgeError as error:
            where = ""
            if kept and any(kept.parent.iterdir()):
                where = f"; {len(known)} verdicts are kept in {kept.parent}, continue with --resume"
            raise JudgeError(f"{error}{where}") from error
        rows = {key: list(row) for (key, _), row in zip(piece, zip(*columns, strict=True), strict=True)}
        known.update(rows)
        if kept:
            keep_lines(kept, (_line(key, found) for key, found in rows.items()))
        if progress:
            progress(len(rows))
    found = {name: [combined([known[key][column] for key, _ in several]) for several in parts] for column, name in enumerate(names)}
    return JudgedVotes(exchanges, found, unlikely)


def _read(path: Path) -> dict[str, list[Finding]]:
    return {
        row["key"]: [Finding(vote, *more) for vote, more in zip(row["votes"], row.get("more") or [[]] * len(row["votes"]), strict=True)]
        for row in kept_lines(path)
    }


def _line(key: str, found: list[Finding]) -> dict[str, Any]:
    more = [[one.reason, one.refusal, one.readable, one.score, one.partial] for one in found]
    return {"key": key, "votes": [one.harmful for one in found], "more": more}
