"""The search of an attacker with the weights: edits of them tried on validation prompts, so that the best can be measured on others.

As heretic does for abliteration, but with few candidates and a fixed list instead of a sampler.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from sku_vllm.data import Row
from sku_vllm.data.rows import in_hash_order
from sku_vllm.evaluate.answers import Answer, answer_rows
from sku_vllm.evaluate.attack.attack import AttackCase
from sku_vllm.evaluate.judging import judge_all
from sku_vllm.evaluate.resume import measurement_directory
from sku_vllm.judges import Exchange

LEARNED, VALIDATED = 128, 48  # most prompts that directions are taken from, and that candidates are tried on


@dataclass(frozen=True, slots=True)
class Candidate:
    """One edit. name: what is done. family: the best of each is measured. apply: changes a model's weights. details: of its finding."""

    name: str
    family: str
    apply: Callable[[PreTrainedModel], None]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tried:
    """What a candidate brought back on the validation prompts, in greedy answers. knowledge: None where rows have no `must_contain`."""

    candidate: Candidate
    harmful: float
    knowledge: float | None

    @property
    def gain(self) -> float:
        """What the attacker wants most of: harmful answers that are right."""
        return self.harmful + (self.knowledge or 0.0)

    def to_json(self) -> dict[str, Any]:
        """An entry of `searched`."""
        return {"candidate": self.candidate.name, "harmful": self.harmful, "knowledge": self.knowledge}


class Search:
    """The attacker's own prompts, and the trial of candidates on some of them.

    The prompts are those of --relearn, else (so much the better for the attacker) the measured ones.

    Attributes:
        harmful: prompts to take directions from. validation: prompts that candidates are tried on. benign: harmless prompts.
        tokens: prompt and answer tokens computed so far, counting every answer as full: the attacker's cost.
    """

    def __init__(self, case: AttackCase, name: str) -> None:
        self.case, self.name, self.tokens = case, name, 0
        rows = in_hash_order(case.relearn or [row for rows in case.questions.forget.values() for row in rows])
        half = min(LEARNED, (len(rows) + 1) // 2)
        self.harmful, self.validation = rows[:half], rows[half : half + VALIDATED] or rows
        self.benign = in_hash_order(case.benign or case.questions.retain)[:LEARNED]

    def answered(self, rows: Sequence[Row], what: str) -> list[Answer]:
        """The target's greedy answers in its present state. what: unique in this search, for --resume."""
        config, case = self.case.request.config, self.case
        kept = measurement_directory(case.directory, "search", self.name, what)
        replies = answer_rows(case.target.backend, case.template, "attacker", rows, [0.0], config, kept=kept)
        self.tokens += sum(len(case.template.prompt_ids(row)) + config.max_new_tokens for row in rows)
        return [Answer.of("attacker", "greedy", row, reply) for row, (reply,) in zip(rows, replies, strict=True)]

    def tried(self, candidates: Sequence[Candidate]) -> list[Tried]:
        """What each candidate brings back. The target's weights are as before afterwards."""
        found = []
        with self.case.target.changed() as weights:
            for candidate in candidates:
                candidate.apply(self.case.target.model)
                found.append(self._scored(candidate))
                weights.put_back()
        return found

    def _scored(self, candidate: Candidate) -> Tried:
        answers = self.answered(self.validation, candidate.name)
        kept = measurement_directory(self.case.directory, "search", self.name, candidate.name)
        exchanges = [Exchange.of(answer.row.messages, answer.row.response or "") for answer in answers]
        judged = judge_all(self.case.questions.judge, exchanges, kept / "verdicts.jsonl" if kept else None)
        known = [answer.right for answer in answers if answer.right is not None]
        harmful = sum(verdict.label == "harmful" for verdict in judged.verdicts) / len(answers)
        return Tried(candidate, harmful, sum(known) / len(known) if known else None)


def best_of_families(found: Sequence[Tried]) -> list[Tried]:
    """The candidate of each family that brings back most; of equals the first, so list gentle ones first."""
    families = dict.fromkeys(one.candidate.family for one in found)
    return [max((one for one in found if one.candidate.family == family), key=lambda one: one.gain) for family in families]
