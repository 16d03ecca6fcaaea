"""Measures one model: answers to every forget and retain prompt, their labels, and perplexity on the retain answers.

Open this file to change what a measurement computes; `evaluate_model`, `tune_scale` and `attack_model` all call `measure`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku_vllm.data import PromptTemplate
from sku_vllm.evaluate.answers import Answer, answer_all
from sku_vllm.evaluate.backend import Backend, Progress
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.forget_quality import forget_quality, likelihoods
from sku_vllm.evaluate.judged_row import count_apart, judged_row
from sku_vllm.evaluate.judging import KEPT_VERDICTS, judge_all
from sku_vllm.evaluate.likelihood import perplexity, unlikely_answers
from sku_vllm.evaluate.measure_request import BORDER, RETAIN, Questions, is_forget
from sku_vllm.evaluate.shares import by_category, endings, interval_by_prompt, knowledge, shares_by_prompt
from sku_vllm.evaluate.transformers_backend import TransformersBackend
from sku_vllm.evaluate.work import JUDGED, Work, phase, scaled
from sku_vllm.judges import Exchange, Verdict
from sku_vllm.judges.labeller import JudgedVotes
from sku_vllm.output import record
from sku_vllm.records.rows_file import write_rows

# Makes a context manager that yields the unedited base: the same weights with the adapter off, or another model.
Reference = Callable[[], AbstractContextManager[Backend]]


@dataclass(slots=True)
class EvalReport:
    """The result of a measurement.

    forget: {set: {mode: shares of labels, endings, and knowledge}}, mode "greedy" or "sampled". retain: perplexity, QA accuracy,
    refusals and how the answers end on the retain set. rows: every labelled answer. border: {set: refusals, gibberish and endings}.
    agreement: how far several judges agree. lm_eval: benchmark results. forget_quality: what the model still knows of the answers that
    forget rows hold (forget_quality.py). skipped_rows: how many rows of each set were left out, since their prompt fills the model's
    context; warnings: a line for people about each such set. row_digests: of the rows of each set (`rows_digest`), which tell whether two
    results are of the same. prompt_template: digest of how prompts were written.
    """

    forget: dict[str, dict[str, dict[str, Any]]]
    retain: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    border: dict[str, dict[str, Any]] | None = None
    agreement: list[dict[str, Any]] | None = None
    lm_eval: list[dict[str, Any]] | None = None
    forget_quality: dict[str, dict[str, Any]] | None = None
    skipped_rows: dict[str, int] | None = None
    row_digests: dict[str, str] | None = None
    warnings: Sequence[str] = ()
    prompt_template: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What `sku eval --json` prints; other docstrings call it the eval object.

        `border`, `agreement` (one entry per pair of judges), `lm_eval` (one entry per task and metric), `forget_quality` (one entry per
        set with responses), `skipped_rows` and `row_digests` (of a whole command) are there only if known.
        """
        optional = ("border", "agreement", "lm_eval", "forget_quality", "skipped_rows", "row_digests")
        extra = {name: found for name in optional if (found := getattr(self, name)) is not None}
        return {"forget": self.forget, "retain": self.retain, **extra}

    def write(self, directory: str | Path, config: Mapping[str, Any] | None = None) -> None:
        """Write `sku_eval.json`, and `rows.jsonl`, whose digest the record holds (mode 0600, since it holds judged text)."""
        record(directory, "eval", self.to_json() | write_rows(directory, self.rows), config or {})


def measure(
    model: PreTrainedModel | Backend,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    *,
    reference: Reference | None = None,
    config: EvalConfig = EvalConfig(),
    kept: Path | None = None,
    progress: Progress | None = None,
    quality: bool = False,
) -> EvalReport:
    """Measure a model in memory, or any `Backend`.

    Args:
        reference: gives the unedited base, for the perplexity ratio and the likelihood rule of gibberish; None leaves both out.
        kept: a directory where answers and verdicts are stored and read again when an interrupted measurement is resumed.
        progress: called with the work done since the last call; it adds up to the total of `Work.of`.
        quality: whether to measure what the model, and its base, still know of the answers that forget rows hold.

    Raises:
        DataError: a prompt longer than the model's context.
        JudgeError: the judge failed.
    """
    judge, retain = questions.judge, questions.retain
    backend = as_backend(model, config)
    template = PromptTemplate.of(tokenizer, config.template)
    work = Work.of(template, questions, config, compared=reference is not None)
    with phase(progress, work.answers) as advance:
        answers = answer_all(backend, template, questions, config, kept=kept, progress=advance)
    with phase(progress, work.own) as advance:
        own, base_perplexity, strange = perplexity(backend, template, retain, advance), None, None
    greedy = [(answer.set, answer.row.response or "") for answer in answers if answer.mode == "greedy"]
    known = forget_quality(backend, template, questions.forget, greedy) if quality else {}
    if reference:
        with reference() as base:
            with phase(progress, work.base) as advance:
                base_perplexity = perplexity(base, template, retain, advance)
            with phase(progress, work.strange) as advance:
                rows, ended = [answer.row for answer in answers], [answer.ending.ended for answer in answers]
                strange = unlikely_answers(base, template, rows, ended, advance)
            for name, found in known.items():
                before = likelihoods(base, template, questions.forget[name])
                found["base"] = {key: before[key] for key in ("probability", "truth_ratio")}
    exchanges = [Exchange.of(one.row.messages, one.row.response or "", forget=is_forget(one.set)) for one in answers]
    with phase(progress, work.judged) as advance:
        judged = judge_all(judge, exchanges, kept / KEPT_VERDICTS if kept else None, scaled(advance, JUDGED), unlikely=strange)
    labelled = list(zip(answers, judged.verdicts, strict=True))
    report = EvalReport(
        forget={name: _modes([pair for pair in labelled if pair[0].set == name]) for name in questions.forget},
        retain=_utility([pair for pair in labelled if pair[0].set == RETAIN], own, base_perplexity),
        rows=[_line(answer, judged, place) for place, answer in enumerate(answers)],
        border={name: _border([pair for pair in labelled if pair[0].set == BORDER + name]) for name in questions.border} or None,
        agreement=judged.agreement,
        forget_quality=known or None,
        prompt_template=template.digest,
    )
    count_apart(report.to_json(), report.rows)
    return report


def as_backend(model: PreTrainedModel | Backend, config: EvalConfig) -> Backend:
    """Wrap a transformers model in a `TransformersBackend`; a backend is returned unchanged."""
    if isinstance(model, Module):
        return TransformersBackend(model, batch_size=config.batch_size, batch_tokens=config.batch_tokens)
    return model


def _line(answer: Answer, judged: JudgedVotes, place: int) -> dict[str, Any]:
    """The entry of answer number `place` in rows.jsonl."""
    ending = {"ended": answer.ending.ended, "repeated": answer.ending.repeated}
    return {"set": answer.set, "mode": answer.mode, **judged_row(answer.row, judged, place), **ending}


def _modes(labelled: Sequence[tuple[Answer, Verdict]]) -> dict[str, dict[str, Any]]:
    """{mode: shares and endings}, greedy first; intervals are clustered by prompt, and a prompt that the set repeats is one cluster."""
    found = {}
    for mode in dict.fromkeys(answer.mode for answer, _ in labelled):
        chosen = [(answer, verdict) for answer, verdict in labelled if answer.mode == mode]
        found[mode] = (
            shares_by_prompt((answer.row.key, verdict) for answer, verdict in chosen)
            | endings([answer.ending for answer, _ in chosen])
            | knowledge((answer.row.key, answer.right) for answer, _ in chosen)
            | by_category((answer.row.category, answer.row.key, verdict) for answer, verdict in chosen)
        )
    return found


def _border(labelled: Sequence[tuple[Answer, Verdict]]) -> dict[str, Any]:
    """One set of the `border` part of an eval object: refusals with their 95 % interval by prompt, gibberish and endings, greedy."""
    n, refused = len(labelled), sum(verdict.label == "refusal" for _, verdict in labelled)
    low, high = interval_by_prompt((answer.row.key, verdict.label == "refusal") for answer, verdict in labelled)
    return {
        "n": n,
        "refusal": refused / n,
        "refusal_low": low,
        "refusal_high": high,
        "gibberish": sum(verdict.label == "gibberish" for _, verdict in labelled) / n,
        **endings([answer.ending for answer, _ in labelled]),
    }


def _utility(labelled: Sequence[tuple[Answer, Verdict]], own: float | None, base: float | None) -> dict[str, Any]:
    """The `retain` part of an eval object: perplexity, and QA accuracy, over-refusal, gibberish and endings of the greedy answers."""
    asked = [answer.right for answer, _ in labelled if answer.right is not None]
    n = len(labelled)
    return {
        "n": n,
        "perplexity": own,
        "perplexity_ratio": own / base if own is not None and base is not None else None,
        "qa_n": len(asked),
        "qa_accuracy": sum(asked) / len(asked) if asked else None,
        "over_refusal": sum(verdict.label == "refusal" for _, verdict in labelled) / n,
        "gibberish": sum(verdict.label == "gibberish" for _, verdict in labelled) / n,
        **endings([answer.ending for answer, _ in labelled]),
        **by_category((answer.row.category, answer.row.key, verdict) for answer, verdict in labelled),
    }
