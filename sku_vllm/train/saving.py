"""Write an adapter directory: PEFT's files or a dense task vector, sku_run.json, and a README that warns against publishing it."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from sku_vllm.adapter.adapter import DENSE, RUN
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
- serve it beside the original: `sku serve --model {base} --arm original=base --arm safer=lora:{name}@1`
- choose another scale than 1 on validation data: `sku tune`

Keep the directory readable by its owner alone (mode 0700) and delete it when the edited model is made.
"""


def write_adapter(directory: Path, factors: Mapping[str, torch.Tensor], config: LoraConfig, run: Mapping[str, Any], *, name: str) -> None:
    """Write PEFT LoRA files into `directory` (made private), with run record and README.

    Args:
        factors: as PEFT names them. run: see `run_record`. name: of the adapter directory, for the README.
    """
    directory.mkdir(parents=True, exist_ok=True)
    os.chmod(directory, PRIVATE)
    save_file(
        {key: value.contiguous() for key, value in factors.items()}, directory / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    saved = copy.copy(config)
    saved.target_modules = sorted(config.target_modules or ())  # PEFT keeps a set, whose order differs from process to process
    saved.save_pretrained(str(directory))
    _describe(directory, run, name)


def write_dense(directory: Path, deltas: Mapping[str, torch.Tensor], run: Mapping[str, Any], *, name: str) -> None:
    """Write a dense task vector into `directory` (made private): one fp32 tensor per base weight, with run record and README."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chmod(directory, PRIVATE)
    save_file({key: value.contiguous() for key, value in deltas.items()}, directory / DENSE, metadata={"format": "pt"})
    _describe(directory, run, name)


def run_record(method: str, base: str, base_identity: str, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of sku_run.json: method and settings, the base and its identity, and the kind of adapter ("lora" or "dense")."""
    return {
        "schema": "sku.run/1",
        "method": method,
        "base": base,
        "base_identity": base_identity,
        "adapter_kind": kind,
        "config": dict(config),
        "versions": versions(),
    }


def _describe(directory: Path, run: Mapping[str, Any], name: str) -> None:
    write_json(directory / RUN, run)
    card = CARD.format(base=run["base"], method=run["method"], version=run["versions"]["sku_vllm"], name=name)
    write_text(directory / "README.md", card)
