"""Compares a LoRA arm with the fused weights: KL divergence of their next-token distributions on the answer tokens of given rows.

Open this file for what `sku report --kl` measures, or for how the report reads a `sku bench agreement` record.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.model import load_model, load_tokenizer, set_scale
from sku_vllm.model_spec import ModelSpec
from sku_vllm.records import Document

if TYPE_CHECKING:
    import torch


def lora_against_fused(model: ModelSpec, fused: str | Path, rows: Sequence[Row]) -> dict[str, Any]:
    """KL(base − scale·delta as LoRA ‖ fused) in nats a token, its largest value, and KL(base ‖ fused) to compare it with.

    Both run in the model's `dtype`, with the softmax in float64. They should differ only by the fused weights' rounding to their dtype.

    Args:
        model: a base with its adapter and scale.
        fused: the checkpoint that was fused from them.
        rows: with responses; only their answer tokens count.
    """
    tokenizer = load_tokenizer(fused)
    template = PromptTemplate.of(tokenizer)
    encoded = [template.encode(row) for row in rows]
    merged = load_model(ModelSpec(fused, dtype=model.dtype))
    arm, scale = load_model(model), model.strength
    gap, edit = [], []
    for text in encoded:
        target = next(_log_probs(merged, [text]))
        gap.append(_kl(next(_log_probs(arm, [text])), target))
        set_scale(arm, 0.0)
        edit.append(_kl(next(_log_probs(arm, [text])), target))
        set_scale(arm, scale)
    import torch

    gaps, edits = torch.cat(gap), torch.cat(edit)
    return {
        "measured": "PEFT against transformers, whole vocabularies",
        "kl": float(gaps.mean()),
        "largest": float(gaps.max()),
        "edit_kl": float(edits.mean()),
        "tokens": len(gaps),
        "dtype": str(next(merged.parameters()).dtype).removeprefix("torch."),
        "scale": scale,
    }


def recorded_agreement(document: Document) -> list[dict[str, Any]]:
    """The KL of LoRA arm and fused weights in a `sku bench agreement` record, both run by vLLM; empty for other records."""
    pair = "LoRA in vLLM / fused in vLLM"
    return [
        {
            "measured": "vLLM, on the tokens of a text",
            "kl": one[pair]["kl"],
            "largest": one[pair]["max"],
            **{key: one[key] for key in ("tokens", "dtype", "scale")},
        }
        for one in (document.data.get("agreement") or [] if document.command == "bench_agreement" else [])
        if pair in one
    ]


def _log_probs(model: Any, encoded: Sequence[Any]) -> Iterator["torch.Tensor"]:
    """float64 log-probabilities [answer tokens, vocabulary] of each text."""
    import torch

    for text in encoded:
        with torch.inference_mode():
            logits = model(torch.tensor([text.ids], device=next(model.parameters()).device)).logits[0, text.answer_start - 1 : -1]
        yield logits.double().log_softmax(-1)


def _kl(p: "torch.Tensor", q: "torch.Tensor") -> "torch.Tensor":
    return (p.exp() * (p - q)).sum(-1)
