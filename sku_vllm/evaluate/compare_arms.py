"""Asks two arms of a running server the same and labels their answers, for `sku compare`; what came stays for `--resume`.

Open this file to change what an arm is asked, or what is kept of an interrupted comparison.
"""

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku_vllm.data import Row
from sku_vllm.errors import RunError
from sku_vllm.evaluate.answers import KEPT_ANSWERS
from sku_vllm.evaluate.compare import Comparison, compare_judged
from sku_vllm.evaluate.judging import KEPT_VERDICTS, judge_all
from sku_vllm.evaluate.kept_lines import keep_lines, kept_lines
from sku_vllm.evaluate.read_judged import Judged, Key
from sku_vllm.judges import Exchange, Judge, load_judge


@dataclass(frozen=True, slots=True)
class ArmsRequest:
    """Two arms or models of a running server, `a` and `b`, each as URL#MODEL, and what both are asked.

    forget: rows by the name of their set. judge: SPEC that labels the answers. samples: answers per prompt; more than one are sampled at
    temperature 1. max_new_tokens: of an answer. seed: of sampled answers.
    """

    a: str
    b: str
    forget: Mapping[str, Sequence[Row]]
    judge: str
    samples: int = 1
    max_new_tokens: int = 128
    seed: int = 0


def compare_arms(request: ArmsRequest, kept: Path | None = None) -> Comparison:
    """Ask both arms and compare what they say.

    Args:
        kept: directory where answers and verdicts are stored as they come, and from where those of an interrupted run are taken.

    Raises:
        RunError: a server does not answer. ConfigError, DataError: a judge that cannot be loaded. JudgeError: it fails.
    """
    judge = load_judge(request.judge)
    left, right = (_asked(address, request, judge, kept) for address in (request.a, request.b))
    return compare_judged(request.a, left, request.b, right)


def _asked(address: str, request: ArmsRequest, judge: Judge, kept: Path | None) -> Judged:
    """The judged answers of one arm."""
    from sku_vllm.client.chat import ask

    server, _, model = address.rpartition("#")
    mode = "sampled" if request.samples > 1 else "greedy"
    rows: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for name, asked in request.forget.items():
        many = [row for row in asked for _ in range(request.samples)]
        replies = Replies(kept / KEPT_ANSWERS if kept else None, [address, name])
        try:
            answers = ask(
                server.rstrip("/").removesuffix("/v1"),
                model,
                [row.messages for row in many],
                temperature=1.0 if request.samples > 1 else 0.0,
                max_tokens=request.max_new_tokens,
                seed=request.seed,
                journal=replies,
            )
        except RunError as error:
            raise RunError(f"{error}{replies.hint()}") from error
        exchanges = [Exchange.of(row.messages, answer) for row, answer in zip(many, answers, strict=True)]
        verdicts = judge_all(judge, exchanges, kept / KEPT_VERDICTS if kept else None).verdicts
        for row, answer, verdict in zip(many, answers, verdicts, strict=True):
            rows[name, mode, row.key].append({"label": verdict.label, "response": answer, "prompt": row.prompt})
    return Judged(rows, judge=(request.judge,), opinion=request.judge != "refusal")


class Replies:
    """The answers of one arm to one set by their number, each appended to a file (0600) as it comes; without a file they are not kept.

    known: those of an interrupted run. asked: which arm and set, as JSON.
    """

    def __init__(self, file: Path | None, asked: list[str]) -> None:
        self.file, self.asked = file, asked
        self.known: dict[int, str] = {}
        self._lock = threading.Lock()
        for line in kept_lines(file) if file else ():
            if line["asked"] == asked:
                self.known[line["number"]] = line["response"]

    def keep(self, number: int, response: str) -> None:
        """Store an answer; called from several threads."""
        if self.file is None:
            return
        with self._lock:
            keep_lines(self.file, [{"asked": self.asked, "number": number, "response": response}])

    def hint(self) -> str:
        """What to say beside an error where answers are stored."""
        return f"; answers are kept in {self.file.parent}, continue with --resume" if self.file and self.file.exists() else ""
