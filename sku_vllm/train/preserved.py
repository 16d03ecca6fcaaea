"""Rows on which the served model stays close to the base, drawn once in a run: prompts that the base makes up, and border prompts.

Border prompts are benign ones in the style of the forget set, where a model that was taught to refuse refuses too much: the user's
(`--border`), or, where the base does not refuse by itself, prompts that the base writes. Open this file to see how they are made.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sku_vllm.data import Encoded
from sku_vllm.methods.train_config import WRITTEN, TrainConfig
from sku_vllm.train.batches import Batches
from sku_vllm.train.forward import Forward
from sku_vllm.train.probe import Probe
from sku_vllm.train.sampling import Gathered, draw_answers, made_up_prompts, prompt_ends, refusals

BEGUN = (1, 4)  # so many tokens of a harmful prompt begin a border prompt that the base writes


def draw_self_generated(passes: Forward, prompts: Sequence[list[int]], batches: Batches, config: TrainConfig) -> list[Encoded]:
    """Prompts that the base makes up itself, with answers from p* or from the base; prompts whose answer is a refusal are left out.

    The base continues the tokens that all `prompts` begin with, and the tokens that they all end with are appended (Magpie, Xu et al. 2024,
    arXiv 2406.08464). Such prompts cover what the retain rows do not. Empty where `prompts` begin with nothing in common, or are all
    the same.
    """
    template, ends = batches.template, prompt_ends(prompts, batches.template)
    if ends is None:
        return []
    begun, ended, stops = ends
    asked = made_up_prompts(passes, [begun], ended, config, stops)
    beta = 0.0 if config.targets in WRITTEN else None
    answered = draw_answers(passes, asked, config, template.stop_ids, beta=beta) if asked else []
    return [row for row, refused in zip(answered, refusals(answered, template.tokenizer), strict=True) if not refused]


def draw_border(passes: Forward, prompts: Sequence[list[int]], batches: Batches, config: TrainConfig, probe: Probe | None) -> list[Encoded]:
    """Border prompts with the base's own answers.

    Of the base's own writing, by continuing the first tokens of harmful prompts, those are taken that it answers and that the probe
    would not refuse where it refuses nearly all harmful ones; none without a probe.
    """
    template = batches.template
    if batches.border_prompts:
        asked = [template.prompt_ids(row) for row in batches.border_prompts]
        return draw_answers(passes, asked, _sized(config, len(asked)), template.stop_ids, beta=0.0)
    ends = prompt_ends(prompts, template)
    if ends is None or probe is None or config.targets not in WRITTEN:
        return []
    shared, ended, stops = ends
    random = batches.random("border")
    begun = [prompt[: len(shared) + int(random.integers(BEGUN[0], BEGUN[1] + 1))] for prompt in prompts]
    begun = [ids for ids, prompt in zip(begun, prompts, strict=True) if len(ids) < len(prompt) - len(ended)]
    known = {tuple(prompt) for prompt in prompts}
    asked = [ids for ids in made_up_prompts(passes, begun, ended, config, stops) if tuple(ids) not in known] if begun else []
    asked = [ids for ids, harmless in zip(asked, probe.harmless(asked), strict=True) if harmless]
    if not asked:
        return []
    answered = draw_answers(passes, asked, _sized(config, len(asked)), template.stop_ids, beta=0.0)
    return [row for row, refused in zip(answered, refusals(answered, template.tokenizer), strict=True) if not refused]


def draw_preserved(batches: Batches, passes: Forward, config: TrainConfig, gathered: Gathered, probe: Probe | None) -> None:
    """Put self-generated and border rows for all steps to come into `batches`."""
    prompts = list(map(list, batches.forget_of))
    if config.unasked_weight:
        batches.self_generated = gathered(partial(draw_self_generated, passes, prompts, batches, config))
    if config.border_weight:
        batches.border = gathered(partial(draw_border, passes, prompts, batches, config, probe))


def _sized(config: TrainConfig, count: int) -> TrainConfig:
    """The configuration with an answer drawn for each of `count` prompts, or two where that stays within half of `samples`."""
    return replace(config, samples=max(count, min(2 * count, config.samples // 2)))
