"""The sections of the page on trained adapters, on comparisons, and on all records with their configuration."""

import json
from html import escape
from typing import Any

from sku_vllm.report.number_format import percent, points, seconds, short
from sku_vllm.report.page_parts import section, table


def training_section(report: dict[str, Any]) -> str:
    """A row for each trained adapter."""
    rows = [
        [
            f"<code>{escape(short(str(t.get('base') or t['config'].get('model', '')), 60))}</code>",
            escape(str(t.get("method") or t["config"].get("method", ""))),
            escape(str(t.get("steps", t["config"].get("steps", "")))),
            seconds(t.get("seconds")),
        ]
        for t in report["training"]
    ]
    return (
        section(
            "How the knowledge was identified",
            "One row per trained adapter. A raw adapter is the harmful knowledge itself: do not publish it.",
            table(["model", "method", "steps", "time"], rows),
        )
        if rows
        else ""
    )


def comparisons_section(report: dict[str, Any]) -> str:
    """The results of `sku compare`, one table per comparison."""
    parts = []
    for found in report["comparisons"]:
        rows = [
            [
                f"{escape(name)}, {escape(mode)}",
                escape(label),
                percent(d["rate_a"]),
                percent(d["rate_b"]),
                points(d["difference"]),
                f"{points(d['low'])} to {points(d['high'])}",
                f"{d['p_value']:.2g}",
                escape(d["test"]),
            ]
            for name, modes in found["sets"].items()
            for mode, labels in modes.items()
            for label, d in labels.items()
            if label != "benign"
        ]
        parts.append(
            f"<p><b>A</b> <code>{escape(found['a'])}</code><br><b>B</b> <code>{escape(found['b'])}</code></p>"
            + table(["set", "label", "A", "B", "B − A", "95 %", "p", "test"], rows)
        )
    return section("Answer by answer", "The same prompts to both models, paired.", *parts) if parts else ""


def provenance_section(report: dict[str, Any]) -> str:
    """Every record in a closed <details> element, with identity, seed, configuration, digests and versions."""
    parts = []
    for origin in report["provenance"]:
        pairs = [
            ("identity (sha256)", origin["identity"]),
            ("base identity", origin["base_identity"]),
            ("seed", origin["config"].get("seed")),
            ("adapters", json.dumps(origin["adapters"]) if origin["adapters"] else None),
            ("configuration", json.dumps(origin["config"], ensure_ascii=False)),
            ("versions", ", ".join(f"{k} {v}" for k, v in origin["versions"].items())),
        ]
        body = "".join(f"<dt>{escape(key)}</dt><dd><code>{escape(str(value))}</code></dd>" for key, value in pairs if value is not None)
        parts.append(
            f"<details><summary>sku {escape(origin['command'])}: {escape(origin['name'])}</summary>"
            f'<div><dl class="pairs">{body}</dl></div></details>'
        )
    return section(
        "Where the numbers come from",
        "Every record this page was made from, with its full configuration, seeds, digests and versions.",
        *parts,
    )
