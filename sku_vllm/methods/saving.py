"""An adapter directory: PEFT's files (or a dense task vector), sku_run.json, and a card that says what it holds."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from sku_vllm.adapter import DENSE, RUN
from sku_vllm.output import versions, write_json, write_text

PRIVATE = 0o700  # a raw adapter is the harmful knowledge
WARNING = "this adapter IS the model's harmful knowledge: keep it private, never publish it or add it to a model"
CARD = """---
library_name: peft
base_model: {base}
tags: [unlearning, do-not-publish]
---
# Identification adapter: do not publish

This directory holds what `{base}` knows about the forget set, amplified. **Added to its base it makes the base more harmful.**
It is meant to be subtracted: edited = base - scale * delta.

- method `{method}`, trained by sku_vllm {version}; settings in `sku_run.json`, what happened in `sku_train.json` and `history.jsonl`
- subtract it: `sku fuse --model {base} --adapter {name} --scale 1 --output safer`
- serve it beside the original: `sku negate --adapter {name} --scale 1 --output negated`, then `sku serve`

Keep the directory readable by its owner alone (mode 0700) and delete it when the edited model is made.
"""


def write_adapter(
    directory: Path, factors: Mapping[str, torch.Tensor], config: LoraConfig, run: Mapping[str, Any], *, name: str
) -> None:
    """PEFT LoRA files into `directory` (made private), with run record and card."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chmod(directory, PRIVATE)
    save_file(
        {key: value.contiguous() for key, value in factors.items()}, directory / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    saved = copy.copy(config)
    saved.target_modules = sorted(config.target_modules)  # PEFT keeps a set, whose order differs from process to process
    saved.save_pretrained(str(directory))
    _describe(directory, run, name)


def write_dense(directory: Path, deltas: Mapping[str, torch.Tensor], run: Mapping[str, Any], *, name: str) -> None:
    """A dense task vector: one tensor a base weight, fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chmod(directory, PRIVATE)
    save_file({key: value.contiguous() for key, value in deltas.items()}, directory / DENSE, metadata={"format": "pt"})
    _describe(directory, run, name)


def run_record(method: str, base: str, base_identity: str, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """sku_run.json: what made an adapter and on which base."""
    return {
        "schema": "sku.run/1", "method": method, "base": base, "base_identity": base_identity, "adapter_kind": kind,
        "config": dict(config), "versions": versions(),
    }


def _describe(directory: Path, run: Mapping[str, Any], name: str) -> None:
    write_json(directory / RUN, run)
    card = CARD.format(base=run["base"], method=run["method"], version=run["versions"]["sku_vllm"], name=name)
    write_text(directory / "README.md", card)
