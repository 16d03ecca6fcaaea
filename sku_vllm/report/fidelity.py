"""The report's part on rounding: what share of the edit the fused weights retained, and the rounding noise, by layer and module."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from sku_vllm.report.number_format import percent
from sku_vllm.report.page_charts import heat_map
from sku_vllm.report.page_parts import section, table

# model.layers.12.self_attn.q_proj.weight -> layer 12, self_attn.q_proj; a second index (an expert) stays in the module's name.
LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks|block)\.(\d+)\.(.+?)(?:\.weight)?$")
WORST = 5


def fidelity(name: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """A grid [module][layer] of {"retained", "noise"} (None where nothing is edited), and the tensors that retained least of the edit.

    retained: share of the edit left after rounding to the stored dtype. None where the manifest has no numbers per tensor.
    """
    tensors = _tensors(manifest)
    if not tensors:
        return None
    placed: dict[str, dict[int, dict[str, float]]] = {}
    others: dict[str, dict[str, float]] = {}
    for key, numbers in tensors.items():
        match = LAYER.match(key)
        if match:
            placed.setdefault(match[2], {})[int(match[1])] = numbers
        else:
            others[key.removesuffix(".weight")] = numbers
    layers = sorted({layer for cells in placed.values() for layer in cells})
    worst = sorted(tensors.items(), key=lambda item: item[1]["retained"])[:WORST]
    return {
        "name": name,
        "layers": layers,
        "modules": list(placed),
        "cells": [[cells.get(layer) for layer in layers] for cells in placed.values()],
        "others": others,
        "worst": [{"tensor": key, **numbers} for key, numbers in worst],
        "tensors": len(tensors),
        "below_90": sum(numbers["retained"] < 0.9 for numbers in tensors.values()),
    }


def _tensors(manifest: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{tensor: {"retained", "noise"}} for every edited tensor that has both."""
    return {
        key: {"retained": float(entry["retained"]), "noise": float(entry["noise"])}
        for key, entry in (manifest.get("tensors") or {}).items()
        if isinstance(entry, dict) and entry.get("retained") is not None and entry.get("noise") is not None
    }


def fidelity_section(report: dict[str, Any]) -> str:
    """The section of the page: a heat map and the least retained tensors of each fused checkpoint, and its KL to a LoRA arm."""
    parts = []
    for found in report["fidelity"]:
        worst = [[f"<code>{escape(w['tensor'])}</code>", percent(w["retained"], 2), percent(w["noise"], 2)] for w in found["worst"]]
        said = f"{found['tensors']} tensors edited; {found['below_90']} keep less than 90 % of their edit."
        chart = heat_map(found["layers"], found["modules"], found["cells"]) if found["layers"] else ""
        parts.append(
            f'<h3>{escape(found["name"])}</h3><p>{said}</p><div class="charts">{chart}<figure><figcaption>Least retained</figcaption>'
            f"{table(['tensor', 'retained', 'noise'], worst)}</figure></div>"
        )
    parts += agreement_table(report["agreement"])
    return (
        section(
            "Is the whole edit in the file?",
            "Rounding to the stored dtype can lose part of an edit; 100 % retained means none was lost.",
            *parts,
        )
        if parts
        else ""
    )


def agreement_table(found: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the KL divergence between LoRA arm and fused weights, one row per measurement; empty without measurements."""
    rows = [
        [
            escape(one["measured"]),
            escape(one["dtype"]),
            f"{one['scale']:g}",
            str(one["tokens"]),
            f"{one['kl']:.2e}",
            f"{one['largest']:.2e}",
        ]
        for one in found
    ]
    head = ["measured", "dtype", "scale", "answer tokens", "KL, nats a token", "largest at one token"]
    lead = "<p>They differ by one rounding to the stored dtype: KL(LoRA ‖ fused).</p>"
    return ["<h3>LoRA arm against fused weights</h3>" + lead + table(head, rows)] if rows else []
