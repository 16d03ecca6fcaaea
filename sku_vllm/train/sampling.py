"""Draw answers token by token during training: from the target distribution p* (losses.contrast), or from the base itself.

Open this file to see how answers are drawn, or how the base makes up prompts. What is drawn for is in targets.py and preserved.py.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from sku_vllm.data import Encoded, PromptTemplate
from sku_vllm.decoding.grouped_attention import grouped
from sku_vllm.decoding.prefix import common_prefix, shared_length
from sku_vllm.decoding.roomy_cache import is_plain, spread
from sku_vllm.methods.losses import contrast
from sku_vllm.methods.method import Side
from sku_vllm.methods.train_config import TrainConfig
from sku_vllm.train.forward import Forward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class Gathered(Protocol):
    """Runs a call with sharded weights gathered (`Objective.gathered`)."""

    def __call__(self, call: Callable[[], T]) -> T:
        """What the call returns."""
        ...


BATCH = 64  # answers drawn at a time
SHARED_PREFIX = 64  # a beginning of at least so many tokens that all prompts share is computed once for a batch
COMPACT_BELOW = 0.75  # finished rows leave when fewer than this share of a batch goes on: copying the cache costs about as much as a step


@torch.no_grad()
def draw_answers(
    passes: Forward,
    prompts: Sequence[list[int]],
    config: TrainConfig,
    stop_ids: Collection[int],
    *,
    beta: float | None = None,
    temperature: float = 1.0,
) -> list[Encoded]:
    """`config.samples` answers, taking prompts in turn, with a generator seeded by the configuration alone.

    Each token takes two cached forward passes, one with the adapter off and one adapted; with `beta` 0 only the first.

    Args:
        prompts: token ids of each. stop_ids: tokens that end an answer.
        beta: of p*; by default the configuration's, and 0 draws from the base itself.
    """
    generator = torch.Generator().manual_seed(config.seed + 1)
    wanted = sorted((prompts[number % len(prompts)] for number in range(config.samples)), key=len)
    beta = config.beta if beta is None else beta
    drawn: list[Encoded] = []
    with passes.generating(), grouped(passes.core):
        for at in range(0, len(wanted), BATCH):
            passes.drawing(at, len(wanted))
            drawing = _Drawing(passes, wanted[at : at + BATCH], config, beta, temperature, generator)
            drawn += drawing.answers(stop_ids, partial(_tell, passes, at, len(wanted)))
        passes.drawing(len(wanted), len(wanted))
    return drawn


def made_up_prompts(
    passes: Forward, begun: Sequence[list[int]], ended: list[int], config: TrainConfig, stops: Collection[int]
) -> list[list[int]]:
    """Different prompts that the base makes up by continuing each of `begun`, `ended` being what stands at the end of a prompt."""
    drawn = [(row.ids[: row.answer_start], row.answer_ids) for row in draw_answers(passes, begun, config, stops, beta=0.0)]
    asked = [(before, ids[:-1] if ids[-1] in stops else ids) for before, ids in drawn]
    return [list(ids) for ids in dict.fromkeys(tuple(before + ids + ended) for before, ids in asked if ids)]


def prompt_ends(prompts: Sequence[list[int]], template: PromptTemplate) -> tuple[list[int], list[int], set[int]] | None:
    """The tokens that all prompts begin with, those that they end with, and the tokens that end a prompt that the base makes up.

    None where they begin with nothing in common, or are all the same.
    """
    begun, ended = (common_prefix([prompt[::step] for prompt in prompts]) for step in (1, -1))
    if not begun or len(begun) + len(ended) > min(map(len, prompts)):
        return None
    return begun, ended[::-1], {*template.stop_ids, *ended[-1:]}


def refusals(samples: Sequence[Encoded], tokenizer: "PreTrainedTokenizerBase") -> list[bool]:
    """Which sampled answers the built-in refusal judge calls refusals."""
    from sku_vllm.judges.refusal import is_refusal

    return [is_refusal(str(tokenizer.decode(sample.answer_ids, skip_special_tokens=True))) for sample in samples]


def _tell(passes: Forward, before: int, wanted: int, done: float) -> None:
    passes.drawing(before + done, wanted)


class _Drawing:
    """One batch of answers being drawn, with a key-value cache for each side."""

    def __init__(
        self,
        passes: Forward,
        prompts: Sequence[list[int]],
        config: TrainConfig,
        beta: float,
        temperature: float,
        generator: torch.Generator,
    ) -> None:
        self.passes, self.prompts, self.config, self.beta, self.temperature = passes, prompts, config, beta, temperature
        self.sides = (Side.BASE, Side.ADAPTED) if beta else (Side.BASE,)
        # One number a token, drawn before, so that an answer does not depend on which other rows are finished.
        self.room = max(map(len, prompts)) + config.sample_tokens
        self.noise = torch.rand(len(prompts), config.sample_tokens, generator=generator)

    def answers(self, stop_ids: Collection[int], told: Callable[[float], None]) -> list[Encoded]:
        """Prompt and drawn answer of every row; `told` is called after each token with the number of answers that this amounts to."""
        from accelerate.utils import broadcast

        device = self.passes.core.device
        answers: list[list[int]] = [[] for _ in self.prompts]
        rows = torch.arange(len(self.prompts))
        ids, mask, caches = self._begin(device)
        for at in range(self.config.sample_tokens):
            floor = self.config.later_floor if self.beta and at else self.config.floor
            logits = [self._next(number, ids, mask, caches) for number in range(len(self.sides))]
            cumulative = (contrast(logits[0], logits[-1], self.beta, floor) / self.temperature).softmax(-1).cumsum(-1)
            chosen = torch.searchsorted(cumulative, self.noise[rows, at, None] * cumulative[:, -1:], right=True)
            chosen = broadcast(chosen.to(device))  # all processes have to stop at the same token, since they gather weights together
            for row, token in zip(rows.tolist(), chosen[:, 0].tolist(), strict=True):
                if not answers[row] or answers[row][-1] not in stop_ids:
                    answers[row].append(token)
            told(len(self.prompts) * (at + 1) / self.config.sample_tokens)
            still = torch.tensor([answers[row][-1] not in stop_ids for row in rows.tolist()])
            if not still.any():
                break
            ids, mask = chosen, torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if still.float().mean() < COMPACT_BELOW:
                keep = still.nonzero()[:, 0]
                rows, ids, mask = rows[keep], ids[keep.to(device)], mask[keep.to(device)]
                for cache in caches:
                    cache.reorder_cache(keep.to(device))
        return [Encoded(prompt + answer, len(prompt)) for prompt, answer in zip(self.prompts, answers, strict=True)]

    def _begin(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """The first inputs [rows, longest], left-padded, their mask, and the caches.

        If all prompts begin with many tokens in common, the caches hold these already.
        """
        shared = shared_length(self.prompts) if len(self.prompts) > 1 else 0
        caches: list[Any] = [None] * len(self.sides)
        if shared >= SHARED_PREFIX:
            ids = torch.tensor([self.prompts[0][:shared]], device=device)
            for number in range(len(self.sides)):
                self._next(number, ids, torch.ones_like(ids), caches)
        if all(map(is_plain, caches)):
            for cache in caches:
                spread(cache, torch.zeros(len(self.prompts), dtype=torch.long), self.room)
        else:  # none was computed, or it has a window, to which the padding between beginning and rest would matter
            shared, caches = 0, [None] * len(self.sides)
        rest = [prompt[shared:] for prompt in self.prompts]
        longest = max(map(len, rest))
        ids = torch.tensor([[prompt[0]] * (longest - len(prompt)) + prompt for prompt in rest], device=device)
        mask = torch.tensor([[1] * shared + [0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in rest], device=device)
        return ids, mask, caches

    def _next(self, number: int, ids: torch.Tensor, mask: torch.Tensor, caches: list[Any]) -> torch.Tensor:
        """Logits [rows, vocabulary] of the next token on one side, fp32 on the CPU; its cache grows by `ids`."""
        side = self.sides[number]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self.passes.reference_adapter(side is Side.ADAPTED):
            self.passes.set_side(side)
            result = self.passes.body(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=caches[number], use_cache=True
            )
        if caches[number] is None:  # no prefix was computed before
            caches[number] = result.past_key_values
            spread(caches[number], torch.arange(len(ids)), self.room)
        return self.passes.head(result.last_hidden_state[:, -1]).float().cpu()
