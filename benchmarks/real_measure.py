"""Everything that bench_real measures of one model: answers to the measured sets, facts, perplexity on prose, standard tasks.

Open this file to measure something more of every cell and of the base.
"""

import json
import math
from pathlib import Path
from typing import Any

from sku_vllm.benchmarks.real_data import RealData
from sku_vllm.benchmarks.real_setup import Setup
from sku_vllm.data import PromptTemplate
from sku_vllm.evaluate import EvalConfig, EvalRequest, evaluate_model
from sku_vllm.evaluate.answers import answer_rows
from sku_vllm.evaluate.backend import Backend
from sku_vllm.evaluate.lm_eval import run_tasks
from sku_vllm.evaluate.measure_request import RETAIN
from sku_vllm.evaluate.opened import InMemory
from sku_vllm.evaluate.resume import INPUTS
from sku_vllm.lab.grammar import is_well_formed
from sku_vllm.model_spec import ModelSpec
from sku_vllm.output import partial_path, write_text

PROSE_TOKENS = 256  # of a text; longer ones are cut
FACT_TOKENS = 24  # most of an answer to a question of fact


def measured(setup: Setup, data: RealData, spec: ModelSpec, output: Path, seed: int = 0) -> dict[str, Any]:
    """The eval object of a model on the measured sets, and `qa`, `prose`, `lm_eval` and (of an organism) `broken`.

    Args:
        output: where sku_eval.json and rows.jsonl are written; an unfinished measurement of it is continued, a finished one is read.
    """
    if not (output / "sku_eval.json").is_file():
        request = EvalRequest(
            spec,
            forget=data.measured["forget"],
            retain=data.measured["retain"][RETAIN],
            border=data.measured["border"],
            judge=setup.judge,
            config=setup.eval_config(seed),
            output=output,
            resume=unfinished(output),
        )
        evaluate_model(request)
    record = json.loads((output / "sku_eval.json").read_text(encoding="utf-8"))
    found = {name: record[name] for name in ("forget", "retain", "border", "forget_quality", "skipped_rows") if name in record}
    if setup.world is not None:
        found["broken"] = broken(output / "rows.jsonl", setup.world)
    return found | knowledge(setup, data, spec)


def unfinished(output: Path) -> bool:
    """Whether a measurement, tuning or attack that would write `output` was stopped."""
    return (partial_path(output) / INPUTS).is_file()


def broken(file: Path, world: int) -> dict[str, float]:
    """{mode: share of the answers to forget prompts that are neither a refusal nor well-formed in the world, or say a sentence again}."""
    counts: dict[str, list[bool]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["set"] != RETAIN:
            fine = row["label"] == "refusal" or is_well_formed(row["response"], world)
            counts.setdefault(row["mode"], []).append(row["repeated"] or not fine)
    return {mode: sum(found) / len(found) for mode, found in counts.items()}


def knowledge(setup: Setup, data: RealData, spec: ModelSpec) -> dict[str, Any]:
    """{"qa": {set: share right}, "prose": perplexity or None, "lm_eval": {task: accuracy}}."""
    config = EvalConfig(samples=0, max_new_tokens=FACT_TOKENS)
    model = InMemory(spec, config)
    template, backend = PromptTemplate.of(model.tokenizer), model.backend()
    right: dict[str, float] = {}
    for name, rows in data.qa.items():
        replies = answer_rows(backend, template, name, rows, [0.0], config)
        hits = [row.told_by(reply.text) for row, (reply,) in zip(rows, replies, strict=True)]
        right[name] = sum(hits) / len(hits)
    found = {"qa": right, "prose": prose_perplexity(backend, template, data.prose)}
    return found | {"lm_eval": standard_tasks(setup, data, spec) if data.tasks else {}}


def prose_perplexity(backend: Backend, template: PromptTemplate, texts: list[str]) -> float | None:
    """exp of the mean negative log-probability of each text's first PROSE_TOKENS tokens; None without texts."""
    ids = [template.tokenizer(text, truncation=False)["input_ids"][:PROSE_TOKENS] for text in texts]
    scored = backend.log_probs([(own, 1) for own in ids if len(own) > 1])
    tokens = sum(len(row) for row in scored)
    return math.exp(min(-sum(float(row.sum()) for row in scored) / tokens, 700.0)) if tokens else None


def standard_tasks(setup: Setup, data: RealData, spec: ModelSpec) -> dict[str, float]:
    """Accuracy by task of lm-evaluation-harness, on at most `measured` documents of each."""
    place = setup.work / "lm_eval"
    place.mkdir(exist_ok=True)
    for task in data.tasks:
        whole = task.read_text(encoding="utf-8").replace("@HERE@", str(task.parent.resolve()))
        write_text(place / task.name, whole)
    names = [str(place / task.name) for task in data.tasks]
    entries = run_tasks(spec, names, limit=setup.measured, compared=False)
    return {entry["task"]: entry["edited"] for entry in entries if entry["metric"] == "acc"}
