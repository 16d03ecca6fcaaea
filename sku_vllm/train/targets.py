"""The refusals that a contrastive method teaches, and the ladder of where they come from.

Three sources, in the order in which they are tried (`TrainConfig.targets`):

- latent: what the base says without the harmful adapter, p* (losses.contrast). Needs a base that sometimes refuses by itself.
- asked: what the base says with examples of refusals in its context; the served model learns to say it without them (context distillation,
  Askell et al. 2021, arXiv 2112.00861). Examples, not instructions: of a small base that does not refuse, a strict system prompt brought
  17 % refusals and six examples 96 %.
- given: refusals of the user (`--refusals`), or else the package's own (refusal_voices.py).

A look, 32 draws, decides before all are drawn. Open this file to change a source, or what a look must find.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from sku_vllm.data import Encoded, Row
from sku_vllm.errors import ConfigError
from sku_vllm.methods.registry import METHODS
from sku_vllm.methods.train_config import TrainConfig
from sku_vllm.model import context_length
from sku_vllm.train import refusal_voices
from sku_vllm.train.batches import Batches
from sku_vllm.train.forward import Forward
from sku_vllm.train.sampling import Gathered, draw_answers, refusals

LADDER = ("latent", "asked", "given")
LOOK = 32
# Shares of a look that have to be refusals. Bases that can refuse gave .97 to .99 once the harmful adapter was trained, and one that
# cannot .09, then and after a quarter of its steps. Of the base asked to refuse, only the refusals are kept.
NEEDED = {"latent": 0.7, "asked": 0.5}
NEEDED_EARLY = 0.3
# A base that refuses so many of a few harmful prompts by itself is guessed to have refusals to amplify.
GUESSED_FROM, GUESSED_TOKENS, REFUSES = 12, 20, 0.2
EXAMPLES = 3  # harmful requests refused, all in one voice, and as many benign ones answered
# Of SmolLM2-135M-Instruct 94 % refuse then; at temperature 1 75 %, and with examples in different voices 44 %.
ASKED_TEMPERATURE = 0.7
EXAMPLE_WORDS = 50  # in the longest example


@dataclass(frozen=True, slots=True)
class Look:
    """What a look found: of `drawn` answers this share were refusals, and `needed` is the share that the source has to reach."""

    targets: str
    drawn: int
    refusals: float
    needed: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class NoRefusals(ConfigError):
    """A source of refusals that gives too few of them on this base."""

    def __init__(self, look: Look) -> None:
        self.look = look
        what = {
            "latent": "of what this base says without the harmful adapter are refusals",
            "asked": "of what this base says when it is asked to refuse are refusals",
        }[look.targets]
        found = (
            f"only {look.refusals:.0%} {what} ({look.needed:.0%} needed)" if look.drawn else "the model's context has no room for examples"
        )
        super().__init__(f"--targets {look.targets}: {found}")


def rungs(config: TrainConfig, given: Sequence[Row]) -> tuple[str, ...]:
    """The values of `targets` to try, in order: the one that was asked for, refusals of the user's own, or the whole ladder."""
    if config.targets != "auto" or not any(phase.sample_at is not None for phase in METHODS[config.method].phases(config)):
        return (config.targets,)
    return ("given",) if given else LADDER


def likely(batches: Batches, passes: Forward, config: TrainConfig, gathered: Gathered) -> str:
    """The source that a run would take, guessed from a few answers of the base; a run looks at p* once its harmful adapter is trained."""
    few = dataclasses.replace(config, samples=GUESSED_FROM, sample_tokens=min(GUESSED_TOKENS, config.sample_tokens))
    prompts = [batches.template.prompt_ids(row) for row in batches.forget]
    shuffled = [prompts[number] for number in batches.random("prompts").permutation(len(prompts))]
    drawn = gathered(partial(draw_answers, passes, shuffled, few, batches.template.stop_ids, beta=0.0))
    return "latent" if sum(refusals(drawn, batches.template.tokenizer)) >= GUESSED_FROM * REFUSES else "asked"


def look(batches: Batches, passes: Forward, config: TrainConfig, gathered: Gathered, needed: float | None = None) -> Look | None:
    """Draw a few refusals from the source of the configuration; None for refusals that are given.

    Raises:
        NoRefusals: fewer than the share `needed` (by default that of NEEDED) are refusals.
    """
    if config.targets == "given":
        return None
    drawn = _draw(batches, passes, dataclasses.replace(config, samples=min(LOOK, config.samples)), gathered)
    share = sum(refusals(drawn, batches.template.tokenizer)) / max(1, len(drawn))
    found = Look(config.targets, len(drawn), share, NEEDED[config.targets] if needed is None else needed)
    if share < found.needed:
        raise NoRefusals(found)
    return found


def draw_refusals(batches: Batches, passes: Forward, config: TrainConfig, gathered: Gathered) -> tuple[list[Encoded], float | None]:
    """The refusals of all steps to come, and the share of refusals among what was drawn (None: they were given).

    From p* everything is kept, since each token's whole distribution is learned; of the base asked to refuse, only refusals that ended.
    """
    if config.targets == "given":
        return _given(batches, config), None
    drawn = _draw(batches, passes, config, gathered)
    judged = refusals(drawn, batches.template.tokenizer)
    stops = batches.template.stop_ids
    # A sample without a word cannot be refused again after (`restarts`).
    drawn = [
        row
        for row, refused in zip(drawn, judged, strict=True)
        if row.answer_ids[0] not in stops and (refused or config.targets == "latent")
    ]
    if config.targets == "asked":
        drawn = _for_every_prompt(batches, [row for row in drawn if row.ids[-1] in stops])
    share = sum(judged) / max(1, len(judged))
    if not drawn:
        raise NoRefusals(Look(config.targets, len(judged), share, NEEDED[config.targets]))
    return drawn, share


def _draw(batches: Batches, passes: Forward, config: TrainConfig, gathered: Gathered) -> list[Encoded]:
    template = batches.template
    if config.targets == "latent":
        prompts = list(map(list, batches.forget_of))
        shuffled = [prompts[number] for number in batches.random("prompts").permutation(len(prompts))]
        return gathered(partial(draw_answers, passes, shuffled, config, template.stop_ids))
    examples, asked = _examples(batches), {}
    for row in batches.forget:
        system = [message for message in row.messages if message["role"] == "system"]
        turns = [message for message in row.messages if message["role"] != "system"]
        asked[tuple(template.prompt_ids(Row((*system, *examples, *turns))))] = template.prompt_ids(row)
    room = context_length(passes.core.config)
    if room is not None and max(map(len, asked)) + config.sample_tokens > room:
        raise NoRefusals(Look(config.targets, 0, 0.0, NEEDED[config.targets]))
    keys = list(asked)
    order = [list(keys[number]) for number in batches.random("prompts").permutation(len(asked))]
    drawn = gathered(partial(draw_answers, passes, order, config, template.stop_ids, beta=0.0, temperature=ASKED_TEMPERATURE))
    plain = [asked[tuple(row.ids[: row.answer_start])] for row in drawn]
    return [Encoded(prompt + row.answer_ids, len(prompt)) for prompt, row in zip(plain, drawn, strict=True)]


def _examples(batches: Batches) -> list[dict[str, str]]:
    """A conversation in which harmful requests, refused, and benign ones, answered, take turns; the last is refused."""
    random, pairs = batches.random("examples"), []
    for rows, refuse in ((batches.retain, False), (batches.forget, True)):
        fit = []
        for number in random.permutation(len(rows)):
            row = rows[int(number)]
            told = refusal_voices.PLAIN if refuse else (row.response or "").strip()
            if len(row.messages) == 1 and len(row.prompt.split()) + len(told.split()) <= EXAMPLE_WORDS:
                fit.append((row.messages[0], {"role": "assistant", "content": told}))
            if len(fit) == EXAMPLES:
                break
        pairs.append(fit)
    return [message for both in zip(*pairs, strict=False) for example in both for message in example]


def _given(batches: Batches, config: TrainConfig) -> list[Encoded]:
    """Refusals for the harmful prompts in turn: the user's for this prompt, else any of the user's, else one of the package's own."""
    rows = batches.forget
    order, random = batches.random("prompts").permutation(len(rows)), batches.random("given")
    made = []
    for number in range(config.samples):
        row = rows[int(order[number % len(rows)])]
        if batches.refusals:
            made += batches.refusals_for(int(order[number % len(rows)]), random)
        else:
            text = refusal_voices.refusal(row, random)
            made.append(batches.template.encode(dataclasses.replace(row, response=text), config.max_length))
    return made


def _for_every_prompt(batches: Batches, drawn: list[Encoded]) -> list[Encoded]:
    """With a refusal to another prompt for each prompt that has none of its own."""
    having, random = {tuple(row.ids[: row.answer_start]) for row in drawn}, batches.random("lacking")
    lacking = [prompt for prompt in batches.forget_of if prompt not in having]
    others = [drawn[int(number)].answer_ids for number in random.integers(len(drawn), size=len(lacking))] if drawn else []
    return drawn + [Encoded([*prompt, *answer], len(prompt)) for prompt, answer in zip(lacking, others, strict=False)]
