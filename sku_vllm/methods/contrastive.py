"""`sku-contrastive` and its two-adapter form: serve what the base says once the harmful adapter's contribution is divided out.

p₀ base, p₊ = base+δ, p₋ = base−δ (served). The target p*(v) ∝ p₀(v)·(p₀(v)/p₊(v))^β is the base's own refusal where it has one. A refusal
may be unlikely to begin, so p* counts unlikely first tokens (`floor`); once begun, those are noise that the ratio magnifies, and only what
the base finds plausible counts (`later_floor`, as in contrastive decoding, Li et al. 2022, arXiv 2210.15097). p₋ is drawn to it on answers
sampled from p* itself, held to the base on retain rows and on prompts that the base makes up itself (sampling.py), and taught what to do
where a harmful answer was begun: the one-adapter form ends it, the two-adapter form turns to the refusal in the middle of it (a recovery),
and refuses again where a refusal was not let end (a restart). Ending is what the two-adapter form did first: it made gibberish of sampled
answers and left harm to a ban on stopping. Samples and restarts are also learned on an adversary's weights (relearner.py), recoveries are
not: going on with a harmful answer is what the adversary trains itself, so it wins there, and the fight costs the rest
(benchmarks/results/research.md). No refusal targets. The built-in refusal judge only looks at what is drawn: where samples of p* are not
refusals the method stops and says so, and where answers to made-up prompts are, they are dropped.
"""

from functools import partial

import torch

from sku_vllm.methods import losses
from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.method import Method, Phase, Term

WARMUP_SHARE = 0.25  # 40 of 160 steps learn p₊ before p* is drawn
IDENTIFY_SHARE = 1 / 4  # 60 of 240 steps learn p₊ alone


def end_answer(logits: torch.Tensor, targets: torch.Tensor, *, stop: int) -> torch.Tensor:
    """−log p(end of answer), whatever the harmful answer says next."""
    return losses.cross_entropy(logits, torch.full_like(targets, stop))


def served_terms(config: TrainConfig, begin: int) -> list[Term]:
    """What the served model learns: keep the base on retain rows and on what it makes up, follow p* on its samples, and where a
    harmful answer was begun, end it or turn to the refusal after all (safety recovery, Qi et al. 2024, arXiv 2406.05946)."""
    decide, go_on = (partial(losses.kl_from_contrast, beta=config.beta, floor=floor) for floor in (config.floor, config.later_floor))
    both = ("base", "adapted")
    terms = [
        Term("mirrored_preservation", config.preservation_weight, "retain", -1, losses.kl_from_base, tokens="all", references=("base",)),
        Term("contrast", 1.0, "samples", -1, go_on, tokens="later", references=both, begin=begin, resists=True),
        Term("contrast_first", 1.0, "samples", -1, decide, tokens="first", references=both, begin=begin, resists=True),
        Term("unasked", config.unasked_weight, "unasked", -1, losses.kl_from_base, references=("base",), begin=begin),
        Term("end_answer", config.stop_weight, "forget", -1, partial(end_answer, stop=config.stop_id), tokens="later", begin=begin),
        Term("recovery", config.recovery_weight, "recoveries", -1, losses.cross_entropy, begin=begin),
        Term("restart", config.recovery_weight, "restarts", -1, losses.cross_entropy, begin=begin, resists=True),
    ]
    return [term for term in terms if term.weight]


def one_adapter(config: TrainConfig) -> list[Phase]:
    """Both signs of one adapter at once."""
    begin = round(WARMUP_SHARE * config.steps)
    harmful = Term("guided_distortion", config.guided_weight, "forget", +1, losses.cross_entropy)
    served = served_terms(config, begin)
    return [Phase(config.steps, (harmful, *served), sample_at=begin)]


def two_adapters(config: TrainConfig) -> list[Phase]:
    """First an adapter for p₊ alone, then another one distilled towards p*; the second is the result."""
    harmful = Term("guided_distortion", config.guided_weight, "forget", +1, losses.cross_entropy)
    first = max(1, round(IDENTIFY_SHARE * config.steps))
    served = tuple(served_terms(config, 0))
    return [Phase(first, (harmful,), keep=True), Phase(config.steps - first, served, sample_at=0, relearner=config.relearner_steps > 0)]


SHARED = {"guided_weight": 1.0, "beta": 4.0, "steps": 160, "rounds": 1, "lr": 1e-3, "schedule": "late", "retain_factor": 2}
METHOD = Method(
    "sku-contrastive", "Both signs of one adapter: harmful at +delta, the base without it at -delta.", one_adapter,
    {**SHARED, "preservation_weight": 30.0, "stop_weight": 0.1},
)
TWO = Method(
    "sku-contrastive-two",
    "Two adapters: one finds the harm, the other is distilled without it, against an adversary that relearns.",
    two_adapters,
    {
        **SHARED, "steps": 240, "preservation_weight": 50.0, "recovery_weight": 2.0, "unasked_weight": 25.0, "relearner_steps": 24,
        "samples": 1024,  # half as many made-up prompts leave facts out, and refusals break into those
    },
)
