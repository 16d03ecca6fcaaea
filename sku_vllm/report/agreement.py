"""Does the LoRA arm say what the fused weights say? Their KL over whole vocabularies, on the answer tokens of given rows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.model import attach_adapter, load_model, load_tokenizer, set_scale
from sku_vllm.report.collect import Document

if TYPE_CHECKING:
    import torch


def lora_against_fused(
    base: str | Path,
    adapter: str | Path,
    scale: float,
    fused: str | Path,
    rows: Sequence[Row],
    *,
    dtype: str = "auto",
    revision: str | None = None,
) -> dict[str, Any]:
    """KL(base − scale·delta as LoRA ‖ fused) in nats a token, its largest value, and KL(base ‖ fused) to compare it with.

    The two differ by one rounding to the stored dtype; both run in `dtype`, softmax in float64.

    Args:
        rows: with responses; only their answer tokens count. revision: of a base that is a hub id.
    """
    tokenizer = load_tokenizer(str(fused))
    template = PromptTemplate.of(tokenizer)
    encoded = [template.encode(row) for row in rows]
    merged = load_model(str(fused), dtype=dtype)
    arm = attach_adapter(load_model(str(base), dtype=dtype, revision=revision), str(adapter), scale)
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
    """The same out of a `sku bench agreement` record, where vLLM computed both sides."""
    pair = "LoRA in vLLM / fused in vLLM"
    return [
        {
            "measured": "vLLM, on the tokens of a text", "kl": one[pair]["kl"], "largest": one[pair]["max"],
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
