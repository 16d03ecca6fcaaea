"""Every answer a measurement looks at: greedy and sampled to the forget prompts, greedy to the retain prompts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.errors import DataError
from sku_vllm.evaluate.backend import Backend, Progress
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.judging import private
from sku_vllm.judges import Exchange

RETAIN = "retain"
KEPT_ANSWERS = "answers.jsonl"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: row is the prompt's row with the model's text as its response, index the prompt's number in its set."""

    set: str
    mode: str
    index: int
    row: Row

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.row.prompt, self.row.response or "")


def answer_all(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    config: EvalConfig,
    *,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answers set by set, prompt by prompt. Sets already in `kept/answers.jsonl` are read from there."""
    answers: list[Answer] = []
    for name, rows in {**forget, RETAIN: retain}.items():
        modes = ["greedy"] + ["sampled"] * (config.samples if name != RETAIN else 0)
        texts = _kept(kept, name)
        if texts is None:
            temperatures = [config.temperature * (mode == "sampled") for mode in modes]
            texts = answer_rows(backend, tokenizer, template, name, rows, temperatures, config, progress)
            _keep(kept, name, texts)
        elif progress:
            progress(len(rows) * len(modes))
        for index, (row, answered) in enumerate(zip(rows, texts, strict=True)):
            for mode, text in zip(modes, answered, strict=True):
                answers.append(Answer(name, mode, index, dataclasses.replace(row, response=text)))
    return answers


def answer_rows(
    backend: Backend,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    name: str,
    rows: Sequence[Row],
    temperatures: Sequence[float],
    config: EvalConfig,
    progress: Progress | None = None,
) -> list[list[str]]:
    """For every row of the set `name` one text per temperature (0 is greedy)."""
    prompts = [template.prompt_ids(row) for row in rows]
    if backend.context_length is not None:
        for number, prompt in enumerate(prompts, 1):
            if len(prompt) >= backend.context_length:
                raise DataError(
                    f"{name} set, row {number}: its prompt has {len(prompt)} tokens and the model's context is {backend.context_length}; "
                    "shorten or remove it"
                )
    tokens = backend.generate(
        prompts, temperatures, max_new_tokens=config.max_new_tokens, stop_ids=template.stop_ids, seed=config.seed, progress=progress
    )
    return [[tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers] for answers in tokens]


def _kept(kept: Path | None, name: str) -> list[list[str]] | None:
    if kept is None or not (kept / KEPT_ANSWERS).exists():
        return None
    for line in (kept / KEPT_ANSWERS).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line being written when the run was killed, and what a resumed run wrote behind it
        if entry["set"] == name:
            return entry["texts"]
    return None


def _keep(kept: Path | None, name: str, texts: list[list[str]]) -> None:
    if kept is None:
        return
    with open(kept / KEPT_ANSWERS, "a", encoding="utf-8", opener=private) as file:
        file.write(json.dumps({"set": name, "texts": texts}) + "\n")
