"""`sku-contrastive` and `sku-contrastive-two`: teach the served model to refuse what a harmful adapter answers, and nothing else.

p₀ is the base, p₊ = base + δ the base with an adapter δ trained on harmful answers, and p₋ = base − δ' the served model (δ' = δ with one
adapter, a second adapter with two). Where the base itself sometimes refuses, p₋ is trained towards p*(v) ∝ p₀(v)·(p₀(v)/p₊(v))^β, in which
tokens that δ makes likelier are less likely and which therefore mostly refuses. p* only counts tokens that are likely enough to the base:
a refusal may be an unlikely way to begin, so the limit is low for the first token (`floor`); for later tokens it is higher (`later_floor`),
since the ratio of two tiny probabilities is noise (as in contrastive decoding, Li et al. 2022, arXiv 2210.15097). Where the base does not
refuse, there is nothing to amplify: p₋ then learns refusals that the base gives if it is asked to, or that were written for it
(`TrainConfig.targets`; train/targets.py chooses), by cross entropy, and needs no δ.

p₋ learns on refusals drawn beforehand, and is kept close to the base, by a KL loss, on retain rows, on border prompts and on prompts that
the base makes up (train/sampling.py). After the beginning of a harmful answer the one-adapter form learns to end the answer. The
two-adapter form learns to go over to a refusal in the middle of it (safety recovery), and to refuse again after a refusal without its end
token (a restart): a model that only learned to end such answers says harmful things when stopping is forbidden, and gibberish when it is
sampled. The two-adapter form also learns samples and restarts on weights that a simulated attacker, the adversary, has fine-tuned
(train/adversary.py). It does not learn safety recovery there: the adversary trains the opposite, to continue harmful answers, and doing
both cost utility.
"""

from functools import partial

import torch

from sku_vllm.methods import losses
from sku_vllm.methods.method import Method, Phase, Side, Term
from sku_vllm.methods.sku_mirrored import mirrored_preservation
from sku_vllm.methods.train_config import WRITTEN, TrainConfig

WARMUP_SHARE = 0.25  # 40 of 160 steps learn p₊ before p* is drawn
IDENTIFY_SHARE = 1 / 4  # 60 of 240 steps learn p₊ alone
# A refusal is decided at its first token, and again where it ends: with 1 and 0, 5.9 % of sampled answers on the lab's Llama began with a
# stray word or went on after the refusal, with these 3.1 % (on its OPT with 1 and 1 4.9 %, with these 3.9 %).
FIRST_WEIGHT, END_WEIGHT = 2.0, 4.0
LOOK_SHARE = 1 / 4  # after 15 of them a first look tells a base that cannot refuse from one that can


def end_answer(logits: torch.Tensor, targets: torch.Tensor, *, stop: int) -> torch.Tensor:
    """−log p(token `stop`), [n]: the targets are ignored, and every place of the answer is taught to end it."""
    return losses.cross_entropy(logits, torch.full_like(targets, stop))


def end_where_it_ended(logits: torch.Tensor, targets: torch.Tensor, *, stop: int) -> torch.Tensor:
    """−log p(token `stop`), [n], at the last token of answers that ended; 0 for one that was cut off before."""
    return losses.cross_entropy(logits, torch.full_like(targets, stop)) * (targets == stop)


def refusal_terms(config: TrainConfig, begin: int) -> list[Term]:
    """The losses on drawn refusals: KL to p* where they were drawn from it, else cross entropy."""
    ended = partial(end_where_it_ended, stop=config.stop_id)
    end = Term("end", END_WEIGHT, "samples", Side.SERVED, ended, tokens="last", begin=begin, resists=True)
    if config.targets in WRITTEN:
        said = losses.cross_entropy
        return [
            end,
            Term("refuse", 1.0, "samples", Side.SERVED, said, tokens="later", begin=begin, resists=True),
            Term("refuse_first", FIRST_WEIGHT, "samples", Side.SERVED, said, tokens="first", begin=begin, resists=True),
        ]
    both = (Side.BASE, Side.ADAPTED)
    first, later = (partial(losses.kl_from_contrast, beta=config.beta, floor=floor) for floor in (config.floor, config.later_floor))
    return [
        end,
        Term("contrast", 1.0, "samples", Side.SERVED, later, tokens="later", references=both, begin=begin, resists=True),
        Term("contrast_first", FIRST_WEIGHT, "samples", Side.SERVED, first, tokens="first", references=both, begin=begin, resists=True),
    ]


def restart_terms(config: TrainConfig, begin: int) -> list[Term]:
    """The losses of refusing again where a refusal was not let end.

    A restart begins where the refusal before it ended, so its first token is learned under the condition that the answer goes on: without
    that, restarts teach answers not to end (14 to 83 % of greedy answers said the refusal again). An eighth of the weight was enough.
    """
    again = partial(losses.cross_entropy_if_it_goes_on, stop=config.stop_id)
    return [
        Term("restart", config.recovery_weight, "restarts", Side.SERVED, losses.cross_entropy, tokens="later", begin=begin, resists=True),
        Term("restart_first", config.recovery_weight / 8, "restarts", Side.SERVED, again, tokens="first", begin=begin, resists=True),
    ]


def preservation_terms(config: TrainConfig, begin: int) -> list[Term]:
    """KL to the base on everything that is to stay as it is; the first token of an answer decides whether it refuses, so it weighs more."""
    base, kl = (Side.BASE,), losses.kl_from_base
    terms = [
        mirrored_preservation(config.preservation_weight),
        Term("unasked", config.unasked_weight, "self_generated", Side.SERVED, kl, references=base, begin=begin),
        Term("border", config.border_weight, "border", Side.SERVED, kl, references=base, begin=begin),
    ]
    first = partial(Term, side=Side.SERVED, loss=kl, tokens="first", references=base, begin=begin)
    return [*terms, *(first(f"{term.rows}_first", config.first_weight, term.rows) for term in terms if term.weight)]


def served_terms(config: TrainConfig, begin: int) -> list[Term]:
    """The losses of the served model from step `begin` of a phase on; terms of weight 0 are left out.

    After the beginning of a harmful answer they end the answer, or go over to a refusal (safety recovery, Qi et al. 2024,
    arXiv 2406.05946).
    """
    end = partial(end_answer, stop=config.stop_id)
    terms = [  # their names are keys of records and history
        *preservation_terms(config, begin),
        *refusal_terms(config, begin),
        Term("end_answer", config.stop_weight, "forget", Side.SERVED, end, tokens="later", begin=begin),
        Term("recovery", config.recovery_weight, "safety_recovery", Side.SERVED, losses.cross_entropy, begin=begin),
        *restart_terms(config, begin),
    ]
    return [term for term in terms if term.weight]


def one_adapter(config: TrainConfig) -> list[Phase]:
    """One phase that trains base + δ on harmful answers throughout and, after the warm-up, base − δ towards p*."""
    begin = round(WARMUP_SHARE * config.steps)
    harmful = Term("guided_distortion", config.guided_weight, "forget", Side.ADAPTED, losses.cross_entropy)
    served = served_terms(config, begin)
    return [Phase(config.steps, (harmful, *served), sample_at=begin)]


def two_adapters(config: TrainConfig) -> list[Phase]:
    """First an adapter for p₊ alone, if p* is needed, then another one that learns to refuse; the second is the result."""
    harmful = Term("guided_distortion", config.guided_weight, "forget", Side.ADAPTED, losses.cross_entropy)
    first = max(1, round(IDENTIFY_SHARE * config.steps))
    served = tuple(served_terms(config, 0))
    identify = Phase(first, (harmful,), keep=True, look_at=round(LOOK_SHARE * first) or None)  # before its first step it is the base
    refuse = Phase(max(1, config.steps - first), served, sample_at=0, adversary=config.relearner_steps > 0)
    return [refuse] if config.targets in WRITTEN else [identify, refuse]


SHARED = {"guided_weight": 1.0, "beta": 4.0, "steps": 160, "rounds": 1, "lr": 1e-3, "schedule": "late", "retain_factor": 2}
METHOD = Method(
    "sku-contrastive",
    "Both signs of one adapter: harmful at +delta, the base without it at -delta.",
    one_adapter,
    {**SHARED, "preservation_weight": 30.0, "stop_weight": 0.1},
)
TWO = Method(
    "sku-contrastive-two",
    "Two adapters: one finds the harm, the other is distilled without it, against an adversary that relearns.",
    two_adapters,
    {
        **SHARED,
        "steps": 240,
        "preservation_weight": 50.0,
        "recovery_weight": 2.0,
        "unasked_weight": 25.0,
        "border_weight": 25.0,
        "relearner_steps": 24,
        # And as many self-generated prompts: half as many miss some of the base's facts, which the served model then refuses to tell.
        "samples": 1024,
    },
    # A real model's rows are three times as long as the lab's, and its harmful and benign prompts lie closer together. On SmolLM2-135M
    # these weights left 14 % of harmful prompts answered and refused 4 % of retain prompts after 45 steps, and 6 and 0 % after 135; more
    # than twice as large ones left 34 % answered, and a quarter of them refused 12 % of retain prompts. docs/research/real_models.md.
    {
        "batch_size": 4,
        "retain_factor": 1,
        "preservation_weight": 20.0,
        "unasked_weight": 10.0,
        "border_weight": 15.0,
        "first_weight": 5.0,
        "samples": 256,
    },
)
