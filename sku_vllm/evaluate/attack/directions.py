"""Directions of refusal: differences between the mean hidden states of refused harmful and of benign prompts (arXiv 2406.11717)."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku_vllm.decoding.flat_head import flat_head
from sku_vllm.evaluate.transformers_backend import padded

POSITIONS = 5  # the last tokens of a prompt: what the template writes after the question, and the question's own last ones
BATCH = 16


@dataclass(frozen=True, slots=True)
class Direction:
    """A difference of means. layer: after how many layers. position: from the prompt's end, −1 the last token.

    unit: [width], of length 1. apart: how far the means are apart, in standard deviations along it.
    """

    layer: int
    position: int
    unit: Tensor
    apart: float


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, prompts: Sequence[Sequence[int]], positions: int = POSITIONS) -> Tensor:
    """The states after every layer at the last tokens of each prompt: [prompts, layers, positions, width] in fp32 on the CPU.

    positions: at most; fewer where the shortest prompt has fewer tokens.
    """
    accepts = inspect.signature(model.forward).parameters
    last = min(positions, *map(len, prompts))
    found = []
    for start in range(0, len(prompts), BATCH):
        ids, mask = padded(prompts[start : start + BATCH], model.device, left=True)
        arguments = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
        if "position_ids" in accepts:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in accepts:
            arguments["logits_to_keep"] = 1
        with flat_head(model):
            states = model(**arguments).hidden_states[1:]
        found.append(torch.stack([state[:, -last:].float().cpu() for state in states], dim=1))
    return torch.cat(found)


def directions(harmful: Tensor, benign: Tensor) -> list[Direction]:
    """One direction for every layer and position, those first along which the two kinds of prompt are farthest apart.

    harmful, benign: from `hidden_states`.
    """
    found = []
    for layer in range(harmful.shape[1]):
        for position in range(-min(harmful.shape[2], benign.shape[2]), 0):
            ours, theirs = harmful[:, layer, position], benign[:, layer, position]
            difference = ours.mean(0) - theirs.mean(0)
            length = float(difference.norm())
            if length > 1e-6:  # the first tokens of a template are alike in all prompts
                unit = difference / length
                spread = ((ours @ unit).var(correction=0) + (theirs @ unit).var(correction=0)).div(2).sqrt()
                found.append(Direction(layer + 1, position, unit, length / max(float(spread), 1e-6)))
    return sorted(found, key=lambda one: -one.apart)


def span(found: Sequence[Direction], count: int) -> Tensor:
    """An orthonormal basis [at most count, width] of what some directions have most in common."""
    _, sizes, basis = torch.linalg.svd(torch.stack([one.unit for one in found]), full_matrices=False)
    common: Tensor = basis[:count][sizes[:count] > 1e-4 * sizes[0]]
    return common
