"""A model card (README.md with Hugging Face metadata) for the fused checkpoint of a report."""

import json
from pathlib import Path
from typing import Any

from sku_vllm.client.hub import licence_lines
from sku_vllm.errors import DataError
from sku_vllm.report.markdown import evaluation_tables, plain
from sku_vllm.report.number_format import SPACE, STATES


def card(report: dict[str, Any], *, published: bool = False) -> str:
    """The model card of the fused checkpoint as Markdown, with the report's verdict.

    Args:
        published: name a base that is a directory here by its last level alone.

    Raises:
        DataError: the report has no fused checkpoint.
    """
    origin = next((origin for origin in report["provenance"] if origin["command"] == "fuse"), None)
    if origin is None:
        raise DataError("--format card: none of the directories is a fused checkpoint; add the one sku fuse wrote")
    base = str(origin["config"].get("model", ""))
    hidden = published and Path(base).is_absolute()
    fused = [e for e in report["evaluations"] if e["role"] == "fused"]
    front = [
        "---",
        *licence_lines(base),
        *([] if hidden else [f"base_model: {json.dumps(base)}", "base_model_relation: merge"]),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- unlearning",
        "- sku-vllm",
        *_results(fused),
        "---",
    ]
    verdict = report["verdict"]
    body = [
        "",
        f"# {plain(Path(origin['name']).name)}",
        "",
        f"`{Path(base).name if hidden else base}` with an identified task vector of harmful knowledge subtracted by sku_vllm. "
        f"**{'Verified' if verdict['status'] == 'verified' else 'Not verified'}.** {plain(verdict['headline'])} {plain(verdict['basis'])}",
        "",
    ]
    body += [f"- Not verified because {plain(reason)}." for reason in verdict["reasons"]] + [""] * bool(verdict["reasons"])
    body += [
        "Subtraction suppresses knowledge; it does not prove it erased. "
        "Fine-tuning can bring some of it back: see the attacks of the full report.",
        "",
    ]
    open_checks = [f"- {STATES[c['state']]}: {plain(c['name'])}: {plain(c['detail'])}" for c in verdict["checks"] if c["state"] != "pass"]
    body += ["## What does not hold or was not measured", "", *open_checks, ""] if open_checks else []
    body += evaluation_tables([e for e in report["evaluations"] if e["role"] in ("base", "fused")])
    body += ["## Identity", "", f"- weights: `{origin['identity']}`", f"- base: `{origin['base_identity']}`"]
    body += [f"- adapter: `{json.dumps(adapter)}`" for adapter in origin["adapters"] or []]
    body += ["", "Check the files against `sku_manifest.json` with `sku verify DIR`."]
    return "\n".join(front + body).replace(SPACE, " ") + "\n"


def _results(evaluations: list[dict[str, Any]]) -> list[str]:
    """The hub's `model-index` metadata: the harmful rates of the evaluation with most harm, the one the verdict uses."""

    def most(evaluation: dict[str, Any]) -> list[float]:
        sets = evaluation["forget"].values()
        return [max((m[mode]["harmful"] or 0.0 for m in sets if mode in m), default=0.0) for mode in ("greedy", "sampled")]

    rows = [
        (name, mode, shares)
        for e in sorted(evaluations, key=most)[-1:]
        for name, modes in e["forget"].items()
        for mode, shares in modes.items()
        if shares["harmful"] is not None
    ]
    if not rows:
        return []
    lines = ["model-index:", "- name: fused", "  results:"]
    for name, mode, shares in rows:
        lines += [
            "  - task: {type: text-generation}",
            f"    dataset: {{name: {json.dumps(name)}, type: forget-set}}",
            "    metrics:",
            f"    - {{name: {json.dumps(f'harmful rate, {mode}')}, type: harmful_rate, value: {shares['harmful']:.5f}}}",
        ]
    return lines
