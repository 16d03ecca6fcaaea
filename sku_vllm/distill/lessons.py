"""What the student learns from: answers that the teacher itself gives, and the user's text. Never an answer of the forget set.

Open this file to change which prompts the teacher answers, or which of its answers are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch

from sku_vllm.data import Encoded, PromptTemplate
from sku_vllm.data.long_rows import LongRows
from sku_vllm.distill.distill_config import DistillConfig
from sku_vllm.distill.distill_request import DistillRequest
from sku_vllm.errors import ConfigError
from sku_vllm.judges.exchange import Exchange
from sku_vllm.judges.refusal import is_refusal
from sku_vllm.judges.spec import load_judge
from sku_vllm.methods import TrainConfig
from sku_vllm.train.forward import Forward
from sku_vllm.train.sampling import draw_answers, made_up_prompts, prompt_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the drawn answers. Prompts that the teacher makes up cover what retain rows do not, so they are the most; refusals are alike, and
# learned from few: with .15 of them the lab's student forgot 15 % of its questions, with .05 11 %, and refused as surely.
SHARES = {"self_generated": 0.5, "retain": 0.45, "forget": 0.05}


@dataclass(slots=True)
class Lessons:
    """Rows to learn from.

    Attributes:
        rows: prompt and drawn answer, whose answer counts; or a piece of text, of which every token counts.
        counts: rows by kind (those of SHARES, and "text"). left_out: drawn answers that were not used, by kind.
        drawn_tokens: forward tokens that drawing took. skipped: rows whose prompt left no room for an answer, by set.
    """

    rows: list[Encoded] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    drawn_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        rows = [[row.ids, row.answer_start] for row in self.rows]
        named = {"counts": self.counts, "left_out": self.left_out, "skipped": self.skipped}
        return {"rows": rows, "drawn_tokens": self.drawn_tokens, **named}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Lessons":
        """What `to_json` gave."""
        return cls(**{**found, "rows": [Encoded(ids, start) for ids, start in found["rows"]]})


def prompts_of(request: DistillRequest, template: PromptTemplate) -> tuple[dict[str, list[list[int]]], dict[str, int]]:
    """The different prompts of retain and forget rows as token ids, by set, and how many rows left no room for an answer.

    Raises:
        DataError: no prompt of a set leaves room.
    """
    long = LongRows(template, request.config.max_length, "--max-length")
    fitting = {"retain": long.fitting("retain", request.retain), "forget": long.fitting("forget", request.forget)}
    prompts = {name: list(map(list, dict.fromkeys(tuple(template.prompt_ids(row)) for row in rows))) for name, rows in fitting.items()}
    return prompts, long.counts


def draw_lessons(
    teacher: "PreTrainedModel",
    template: PromptTemplate,
    request: DistillRequest,
    progress: Callable[[float, int], None] = lambda done, wanted: None,
) -> Lessons:
    """Everything the student learns from, drawn with a generator that the configuration's seed alone decides.

    Args:
        progress: called during each of the four draws with answers (or made-up prompts) done and wanted.

    Raises:
        ConfigError: none of the teacher's answers to forget prompts can be used.
    """
    config = request.config
    found = Lessons()
    asked, found.skipped = prompts_of(request, template)
    passes = Forward(teacher)
    passes.drawing = progress
    draw = partial(draw_answers, passes, stop_ids=template.stop_ids, beta=0.0)
    wanted = {kind: max(1, round(share * config.samples)) for kind, share in SHARES.items()}
    asked["self_generated"] = _made_up(passes, asked, template, sized(config, wanted["self_generated"]), found)
    for number, (kind, prompts) in enumerate(asked.items()):
        drawn = draw(prompts, sized(config, wanted[kind], number + 1)) if prompts else []
        found.drawn_tokens += sum(len(row.ids) - 1 for row in drawn)
        kept = _usable(drawn, kind, template, request.judge)
        found.rows += kept
        found.counts[kind], found.left_out[kind] = len(kept), len(drawn) - len(kept)
    if not found.counts["forget"]:
        why = f"--judge {request.judge} calls all of them harmful" if request.judge else "none of them is a refusal to the refusal judge"
        raise ConfigError(
            f"--teacher {request.teacher}: its {found.left_out['forget']} answers to forget prompts cannot be learned from: {why}; "
            "distil a model that was unlearned, or name another --judge"
        )
    texts = pieces_of_text(request.text, template, config.max_length)
    found.rows += texts
    found.counts["text"] = len(texts)
    return found


def sized(config: DistillConfig, samples: int, number: int = 0) -> TrainConfig:
    """The settings that drawing reads: how many answers, how long, and the seed of the draw with this number."""
    return TrainConfig.of(samples=samples, sample_tokens=config.sample_tokens, seed=(config.seed + number) % 2**32)


def _made_up(
    passes: Forward, asked: dict[str, list[list[int]]], template: PromptTemplate, config: TrainConfig, found: Lessons
) -> list[list[int]]:
    """Prompts that the teacher makes up, by continuing what all prompts begin with; none where they begin with nothing in common."""
    ends = prompt_ends([*asked["retain"], *asked["forget"]], template)
    if ends is None:
        return []
    begun, ended, stops = ends
    made = made_up_prompts(passes, [begun], ended, config, stops)
    found.drawn_tokens += config.samples * sum(map(len, made)) // max(1, len(made))  # those made up twice were drawn too
    return made


def _usable(drawn: Sequence[Encoded], kind: str, template: PromptTemplate, judge: str | None) -> list[Encoded]:
    """The drawn answers that are safe to learn from: see `DistillRequest.judge`."""
    if not drawn or (judge is None and kind != "forget"):
        return list(drawn)

    def text(ids: list[int]) -> str:
        return str(template.tokenizer.decode(ids, skip_special_tokens=True))

    answers = [text(row.answer_ids) for row in drawn]
    if judge is None:
        return [row for row, answer in zip(drawn, answers, strict=True) if is_refusal(answer)]
    asked = [text(row.ids[: row.answer_start]) for row in drawn]
    verdicts = load_judge(judge).judge(
        [Exchange(prompt, answer, forget=kind == "forget") for prompt, answer in zip(asked, answers, strict=True)]
    )
    return [row for row, harmful in zip(drawn, verdicts, strict=True) if not harmful]


def pieces_of_text(texts: Sequence[str], template: PromptTemplate, limit: int) -> list[Encoded]:
    """Documents as rows of at most `limit` tokens, all but the first of which count."""
    rows = []
    for text in texts:
        ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
        rows += [Encoded(template.bos_ids + ids[at : at + limit], 1) for at in range(0, len(ids), limit)]
    return [row for row in rows if len(row.ids) > 1]


def stand_ins(request: DistillRequest, template: PromptTemplate) -> list[Encoded]:
    """Rows about as long as the lessons will be, for an estimate: prompts with as many tokens again for their answers."""
    prompts, _ = prompts_of(request, template)
    size = request.config.sample_tokens
    return [Encoded(ids + ids[-size:], len(ids)) for ids in (*prompts["retain"], *prompts["forget"])]


def shuffled(count: int, seed: int, step: int, size: int) -> list[int]:
    """The `size` row numbers of a step: passes over all `count` rows, each shuffled, follow one another."""
    places = [divmod(place, count) for place in range(step * size, (step + 1) * size)]
    return [_order(count, seed, epoch)[at] for epoch, at in places]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
