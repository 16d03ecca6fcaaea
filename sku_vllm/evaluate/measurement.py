"""One model measured: answers to every forget and retain prompt, their labels, and perplexity on the retain answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.answers import RETAIN, Answer, answer_all
from sku_vllm.evaluate.backend import Backend, Progress
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.judging import KEPT_VERDICTS, judge_all
from sku_vllm.evaluate.likelihood import perplexity, unlikely_answers
from sku_vllm.evaluate.shares import shares
from sku_vllm.judges import Judge, Verdict, decide, load_judge
from sku_vllm.output import record, write_text

# Opens the unedited base: the same weights with the adapter off, or another model.
Reference = Callable[[], AbstractContextManager[Backend]]


@dataclass(slots=True)
class EvalReport:
    """Shares per forget set and mode, utility on the retain set, and every labelled answer."""

    forget: dict[str, dict[str, dict[str, Any]]]
    retain: dict[str, Any]
    rows: list[dict[str, str]] = field(default_factory=list)
    agreement: list[dict[str, Any]] | None = None
    lm_eval: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """CONTRACTS' eval object; with several judges also `agreement`, one entry a pair; with benchmarks `lm_eval`, one entry a metric."""
        extra = {name: found for name in ("agreement", "lm_eval") if (found := getattr(self, name)) is not None}
        return {"forget": self.forget, "retain": self.retain, **extra}

    def write(self, directory: str | Path, config: Mapping[str, Any] | None = None) -> None:
        """Leave `sku_eval.json` and `rows.jsonl` (0600: it holds judged text) in a directory."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        write_text(Path(directory) / "rows.jsonl", lines, mode=0o600)
        record(directory, "eval", self.to_json(), config or {})


def measure(
    model: PreTrainedModel | Backend,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    judge: Judge | str,
    reference: Reference | None = None,
    config: EvalConfig = EvalConfig(),
    kept: Path | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Measure a model in memory, or any `Backend`.

    Args:
        reference: opens the unedited base, for the perplexity ratio and the likelihood rule of gibberish.
        kept: a directory for answers and verdicts, so that an interrupted measurement continues there.
        progress: called with the number of answers done since the last call.
    """
    judge = load_judge(judge) if isinstance(judge, str) else judge
    if RETAIN in forget:
        raise ConfigError(f"--forget {RETAIN}=…: rows.jsonl calls the retain set by that name; choose another")
    backend = as_backend(model, config)
    template = PromptTemplate.of(tokenizer, config.template)
    answers = answer_all(backend, tokenizer, template, forget, retain, config, kept=kept, progress=progress)
    own, base_perplexity, strange = perplexity(backend, template, retain), None, None
    if reference:
        with reference() as base:
            base_perplexity = perplexity(base, template, retain)
            strange = unlikely_answers(base, template, [answer.row for answer in answers], config.max_new_tokens)
    exchanges = [answer.exchange for answer in answers]
    judged = judge_all(judge, exchanges, kept / KEPT_VERDICTS if kept else None)
    verdicts = decide(judge, exchanges, judged.harmful, strange)
    labelled = list(zip(answers, verdicts, strict=True))
    return EvalReport(
        forget={name: _modes([pair for pair in labelled if pair[0].set == name]) for name in forget},
        retain=_utility([pair for pair in labelled if pair[0].set == RETAIN], own, base_perplexity),
        rows=[
            {"set": answer.set, "mode": answer.mode, "prompt": answer.row.prompt, "response": answer.row.response, "label": verdict.label}
            for answer, verdict in labelled
        ],
        agreement=judged.agreement,
    )


def as_backend(model: PreTrainedModel | Backend, config: EvalConfig) -> Backend:
    """A transformers model behind the Backend interface; a backend as it is."""
    if hasattr(model, "generate") and hasattr(model, "log_probs"):
        return model
    from sku_vllm.evaluate.transformers_backend import TransformersBackend

    return TransformersBackend(model, batch_size=config.batch_size)


def _modes(labelled: Sequence[tuple[Answer, Verdict]]) -> dict[str, dict[str, Any]]:
    """Shares by mode, greedy first, clustered by prompt."""
    by_mode: dict[str, dict[int, list[Verdict]]] = {}
    for answer, verdict in labelled:
        by_mode.setdefault(answer.mode, {}).setdefault(answer.index, []).append(verdict)
    return {mode: shares(list(prompts.values())) for mode, prompts in by_mode.items()}


def _utility(labelled: Sequence[tuple[Answer, Verdict]], own: float | None, base: float | None) -> dict[str, Any]:
    """CONTRACTS' retain object, plus the share of gibberish among the greedy answers."""
    asked = [answer for answer, _ in labelled if answer.row.must_contain]
    right = sum(all(word in answer.row.response for word in answer.row.must_contain) for answer in asked)
    n = len(labelled)
    return {
        "n": n,
        "perplexity": own,
        "perplexity_ratio": own / base if own is not None and base is not None else None,
        "qa_n": len(asked),
        "qa_accuracy": right / len(asked) if asked else None,
        "over_refusal": sum(verdict.label == "refusal" for _, verdict in labelled) / n,
        "gibberish": sum(verdict.label == "gibberish" for _, verdict in labelled) / n,
    }
