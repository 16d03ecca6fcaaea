"""Gathers the content of a report as one JSON-ready dict, from which HTML, Markdown and model cards are written."""

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sku_vllm.evaluate.agreement import recorded_agreement
from sku_vllm.output import versions
from sku_vllm.records import Document, collect
from sku_vllm.report.attacks import attacks
from sku_vllm.report.evaluations import Evaluation, Fused, evaluations, read_fused
from sku_vllm.report.fidelity import fidelity
from sku_vllm.report.samples import samples
from sku_vllm.report.served_arms import latencies, read_metrics
from sku_vllm.report.telling_apart import separations
from sku_vllm.report.verdict import LIMITS, primary, reach_verdict


def build_report(
    directories: Sequence[str | Path],
    *,
    title: str = "Unlearning report",
    serving_dtype: str | None = None,
    sample_rows: int = 3,
    agreement: dict[str, Any] | None = None,
    metrics: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Read the records below `directories` and gather everything a page shows, the verdict first.

    Args:
        serving_dtype: dtype in which the checkpoint is served; None means the stored one (known only for bfloat16 and float16).
        sample_rows: answers shown per set and label; 0 keeps all text out of the report.
        agreement: the result of `lora_against_fused`, measured by the caller.
        metrics: files with saved /metrics texts of servers.

    Raises:
        DataError: nothing to read, or a record is damaged.
    """
    documents = collect(directories)
    fused = [read_fused(document) for document in _of(documents, "fuse")]
    judged = evaluations(documents, fused)
    tuned = [
        {"name": document.name, **_only(document, "scale", "qualifies", "curve"), "limits": _limits(document)}
        for document in _of(documents, "tune")
    ]
    attacked = attacks(documents)
    chosen = primary(judged, fused, serving_dtype)
    verdict = reach_verdict(judged, fused, tuned[-1]["limits"] if tuned else {}, attacked, serving_dtype)
    return {
        "title": title,
        "generated": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions(),
        "verdict": asdict(verdict),
        "evaluations": [_shown(evaluation) for evaluation in judged],
        "primary": chosen.name if chosen else None,
        "tune": tuned,
        "separations": separations(documents, judged),
        "attacks": attacked,
        "fidelity": [found for checkpoint in fused if (found := fidelity(checkpoint.document.name, checkpoint.manifest))],
        "agreement": [*([agreement] if agreement else []), *(row for document in documents for row in recorded_agreement(document))],
        "latency": [
            *(row for document in documents for row in latencies(document)),
            *(row for file in metrics for row in read_metrics(file)),
        ],
        "comparisons": [{"name": document.name, **_only(document, "a", "b", "sets", "unpaired")} for document in _of(documents, "compare")],
        "training": [
            {"name": document.name, "config": document.config, **_only(document, "base", "method", "steps", "seconds")}
            for document in _of(documents, "train")
        ],
        "lm_eval": [{"name": document.name, "tasks": document.data["lm_eval"]} for document in documents if document.data.get("lm_eval")],
        "samples": samples(judged, chosen, sample_rows),
        "provenance": [_origin(document, fused) for document in documents],
    }


def _shown(evaluation: Evaluation) -> dict[str, Any]:
    return {**asdict(evaluation), "directory": evaluation.directory.name, "edited": evaluation.edited}


def _of(documents: Sequence[Document], command: str) -> list[Document]:
    return [document for document in documents if document.command == command]


def _only(document: Document, *keys: str) -> dict[str, Any]:
    return {key: document.data[key] for key in keys if key in document.data}


def _limits(document: Document) -> dict[str, float]:
    return {key: float(document.config[key]) for key in (*LIMITS, "max_border_refusal") if document.config.get(key) is not None}


def _origin(document: Document, fused: Sequence[Fused]) -> dict[str, Any]:
    """The entry of a record in the report's list of sources: command, configuration, digests and versions."""
    identity = next((checkpoint.identity for checkpoint in fused if checkpoint.document is document), document.config.get("model_identity"))
    manifest = next((checkpoint.manifest for checkpoint in fused if checkpoint.document is document), {})
    return {
        "command": document.command,
        "name": document.name,
        "schema": document.data.get("schema"),
        "identity": identity,
        "base_identity": manifest.get("base_identity") or document.data.get("base_identity"),
        "adapters": manifest.get("adapters"),
        "config": document.config,
        "versions": document.data.get("versions") or {},
    }
