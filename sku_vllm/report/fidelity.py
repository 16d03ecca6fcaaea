"""How much of the edit is really in the fused weights: `retained` and `noise` of the manifest, laid out by layer and module."""

import re
from typing import Any

# model.layers.12.self_attn.q_proj.weight -> layer 12, self_attn.q_proj; a second index (an expert) stays in the module's name.
LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks|block)\.(\d+)\.(.+?)(?:\.weight)?$")
WORST = 5


def fidelity(name: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """A grid [module][layer] of {"retained", "noise"} (None where the edit does not touch), and the least retained tensors.

    None where the manifest has no per-tensor numbers.
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
