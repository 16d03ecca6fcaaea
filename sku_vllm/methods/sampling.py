"""What is drawn once before training with a contrast (contrastive.py): answers from p*, prompts that the base makes up, and which answers
are refusals, by the built-in refusal judge."""

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from sku_vllm.data import Encoded, PromptTemplate
from sku_vllm.errors import ConfigError
from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.forward import Forward
from sku_vllm.methods.losses import contrast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of answers drawn from p*; a base with a refusal mode gave .97 to .99, one without has nothing to be drawn to.
REFUSALS_NEEDED = 0.7


@torch.no_grad()
def draw_contrastive(
    passes: Forward, prompts: Sequence[list[int]], config: TrainConfig, stop_ids: Collection[int], *, beta: float | None = None,
    batch: int = 64,
) -> list[Encoded]:
    """`config.samples` answers from p*, prompts taken in turn, at temperature 1 with a generator of their own; `beta` 0: from the base.

    Two cached forward passes a token, adapter off and adapted; one from the base.
    """
    generator = torch.Generator().manual_seed(config.seed + 1)
    wanted = sorted((prompts[number % len(prompts)] for number in range(config.samples)), key=len)
    beta = config.beta if beta is None else beta
    drawn: list[Encoded] = []
    with passes.generating():
        for at in range(0, len(wanted), batch):
            drawn += _draw_batch(passes, wanted[at:at + batch], config, beta, stop_ids, generator)
    return drawn


def draw_unasked(passes: Forward, prompts: Sequence[list[int]], config: TrainConfig, template: PromptTemplate) -> list[Encoded]:
    """What users ask and p* does not refuse, with its answers: the base itself goes on from what `prompts` all begin with until what
    they all end with (Magpie, Xu et al. 2024, arXiv 2406.08464), which covers what the retain rows do not. Empty where they begin
    with nothing in common, or are all the same.
    """
    begun, ended = (os.path.commonprefix([prompt[::step] for prompt in prompts]) for step in (1, -1))
    stops = {*template.stop_ids, *ended[-1:]}
    if not begun or len(begun) + len(ended) > min(map(len, prompts)):
        return []
    asked = [one.answer_ids for one in draw_contrastive(passes, [begun], config, stops, beta=0.0)]
    asked = [ids[:-1] if ids[-1] in stops else ids for ids in asked]
    made_up = {tuple(begun + ids + ended[::-1]): None for ids in asked if ids}
    answered = draw_contrastive(passes, [list(ids) for ids in made_up], config, template.stop_ids) if made_up else []
    return [row for row, refused in zip(answered, refusals(answered, template.tokenizer), strict=True) if not refused]


def _draw_batch(
    passes: Forward, prompts: Sequence[list[int]], config: TrainConfig, beta: float, stop_ids: Collection[int], generator: torch.Generator
) -> list[Encoded]:
    from accelerate.utils import broadcast

    device, longest = passes.core.device, max(map(len, prompts))
    ids = torch.tensor([[prompt[0]] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = torch.ones(len(prompts), dtype=torch.bool)
    caches = [None, None]
    for at in range(config.sample_tokens):
        floor = config.later_floor if beta and at else config.floor
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        logits = []
        for which, side in enumerate((0, 1) if beta else (0,)):
            with passes.reference_adapter(side == 1):
                passes.set_side(side)
                result = passes.body(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=caches[which], use_cache=True
                )
            caches[which] = result.past_key_values
            logits.append(passes.head(result.last_hidden_state[:, -1]).float().cpu())
        chosen = torch.multinomial(contrast(logits[0], logits[-1], beta, floor).exp(), 1, generator=generator)
        chosen = broadcast(chosen.to(device))  # processes that gather weights together have to end together
        for row, token in enumerate(chosen[:, 0].tolist()):
            if open_rows[row]:
                answers[row].append(token)
                open_rows[row] = token not in stop_ids
        if not open_rows.any():
            break
        ids = chosen
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return [Encoded(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def refusals(samples: Sequence[Encoded], tokenizer: "PreTrainedTokenizerBase") -> list[bool]:
    """Which sampled answers the built-in refusal judge calls refusals."""
    from sku_vllm.judges.refusal import is_refusal

    return [is_refusal(tokenizer.decode(sample.answer_ids, skip_special_tokens=True)) for sample in samples]


class NoRefusals(ConfigError):
    """This base has no latent refusal mode for a contrastive method to be drawn to."""


def require_refusals(share: float, method: str) -> None:
    """Stop where the base has no refusals to be drawn to.

    Raises:
        NoRefusals: with the share found.
    """
    if share < REFUSALS_NEEDED:
        raise NoRefusals(
            f"--method {method}: needs a base that can refuse, and only {share:.0%} of what this base says without the harmful "
            f"adapter are refusals ({REFUSALS_NEEDED:.0%} needed); use --method sku-mirrored, or refusal-tune with --refusals"
        )
