"""Generates the answers of a measurement: greedy and sampled ones to the forget prompts, greedy ones to all others.

Open this file to change how answers are generated, or how they are stored for `--resume`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.errors import DataError
from sku_vllm.evaluate.backend import Backend, Generated, Progress
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.kept_lines import keep_lines, kept_lines
from sku_vllm.evaluate.measure_request import Questions, is_forget
from sku_vllm.evaluate.work import NEW_TOKEN
from sku_vllm.judges.repetition import says_again

KEPT_ANSWERS = "answers.jsonl"


class Ending(NamedTuple):
    """How an answer ends. tokens: its length. ended: whether by itself; False where the length limit cut it. repeated: whether it says a
    sentence again."""

    tokens: int
    ended: bool
    repeated: bool


class Reply(NamedTuple):
    """What a model said, and how that ends."""

    text: str
    ending: Ending


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: row is the prompt's row with the model's text as its response.

    right: whether the text holds every string of the row's `must_contain`; None for a row without any.
    """

    set: str
    mode: str
    row: Row
    ending: Ending
    right: bool | None

    @classmethod
    def of(cls, name: str, mode: str, row: Row, reply: Reply) -> "Answer":
        """The reply to a row of the set `name`."""
        right = row.told_by(reply.text) if row.must_contain else None
        return cls(name, mode, dataclasses.replace(row, response=reply.text), reply.ending, right)


def answer_all(
    backend: Backend,
    template: PromptTemplate,
    questions: Questions,
    config: EvalConfig,
    *,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """All answers, in the order set, prompt, mode. Batches that are already in `kept/answers.jsonl` are read from there.

    progress: called with the work done since the last call, in the units of `Work.answers`.

    Raises:
        DataError: a prompt longer than the model's context.
    """
    answers: list[Answer] = []
    for name, rows in questions.sets.items():
        modes = ["greedy"] + ["sampled"] * (config.samples if is_forget(name) else 0)
        temperatures = [config.temperature * (mode == "sampled") for mode in modes]
        replies = answer_rows(backend, template, name, rows, temperatures, config, kept=kept, progress=progress)
        for row, answered in zip(rows, replies, strict=True):
            answers += [Answer.of(name, mode, row, reply) for mode, reply in zip(modes, answered, strict=True)]
    return answers


def answer_rows(
    backend: Backend,
    template: PromptTemplate,
    name: str,
    rows: Sequence[Row],
    temperatures: Sequence[float],
    config: EvalConfig,
    *,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> list[list[Reply]]:
    """For every row of the set `name` one reply per temperature (0 is greedy).

    Raises:
        DataError: a prompt longer than the model's context.
    """
    prompts = [template.prompt_ids(row) for row in rows]
    if backend.context_length is not None:
        for number, prompt in enumerate(prompts, 1):
            if len(prompt) >= backend.context_length:
                raise DataError(
                    f"{name} set, row {number}: its prompt has {len(prompt)} tokens and the model's context is {backend.context_length}; "
                    "shorten or remove it"
                )
    found = backend.generate(
        prompts,
        temperatures,
        max_new_tokens=config.max_new_tokens,
        stop_ids=template.stop_ids,
        seed=config.seed,
        journal=_Kept(kept, name, list(map(len, prompts)), progress),
    )
    texts = [[str(template.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids, _ in answers] for answers in found]
    return [
        [Reply(text, Ending(len(ids), ended, says_again(text, ended))) for text, (ids, ended) in zip(told, answers, strict=True)]
        for told, answers in zip(texts, found, strict=True)
    ]


class _Kept:
    """The `Journal` of one set: a line of `kept/answers.jsonl` for every batch (mode 0600), and progress.

    Args:
        kept: None keeps nothing. lengths: of the prompts, in tokens.
    """

    def __init__(self, kept: Path | None, name: str, lengths: Sequence[int], progress: Progress | None) -> None:
        self._file, self._name, self._lengths, self._progress = kept / KEPT_ANSWERS if kept else None, name, lengths, progress
        self.known: dict[int, list[Generated]] = {}
        for entry in kept_lines(self._file) if self._file else ():
            if entry["set"] == name:
                self.known |= {index: [Generated(*answer) for answer in answers] for index, answers in entry["answers"]}

    def keep(self, answers: Mapping[int, list[Generated]]) -> None:
        """Append one line with the answers of a batch."""
        if self._file:
            keep_lines(self._file, [{"set": self._name, "answers": list(answers.items())}])
        self._advance(sum(self._lengths[index] for index in answers))

    def advance(self, new_tokens: int) -> None:
        """Count generated tokens."""
        self._advance(new_tokens * NEW_TOKEN)

    def _advance(self, work: float) -> None:
        if self._progress:
            self._progress(work)
