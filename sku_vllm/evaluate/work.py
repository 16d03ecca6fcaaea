"""How much work a measurement is, for its progress and time left. The unit is the time that one token of a prompt takes.

Open this file if the time left jumps between the phases of a measurement.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from sku_vllm.data import PromptTemplate
from sku_vllm.evaluate.backend import Progress
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.measure_request import Questions, is_forget

NEW_TOKEN = 1.0  # of a generated token: what a batch of 64 rows gives on a CPU (SmolLM2-135M); memory-bound decoding takes longer
JUDGED = 1.0  # of a verdict; a lexicon takes less, a model that judges more


@dataclass(frozen=True, slots=True)
class Work:
    """The phases of one measurement, in the order in which `measure` goes through them.

    Attributes:
        answers: prompts and generated tokens, if every answer has full length.
        own: the retain answers, scored for perplexity. base: the same by the base.
        strange: all answers scored by the base, for the likelihood rule of gibberish.
        judged: verdicts.
    """

    answers: float = 0
    own: float = 0
    base: float = 0
    strange: float = 0
    judged: float = 0

    @property
    def total(self) -> float:
        """Of all phases."""
        return float(sum(getattr(self, phase.name) for phase in fields(self)))

    @classmethod
    def of(cls, template: PromptTemplate, questions: Questions, config: EvalConfig, *, compared: bool) -> "Work":
        """compared: whether there is a base to compare with."""
        answers = strange = judged = 0.0
        for name, rows in questions.sets.items():
            copies = 1 + (config.samples if is_forget(name) else 0)
            prompts = sum(len(template.prompt_ids(row)) for row in rows)
            new = len(rows) * copies * config.max_new_tokens
            answers += prompts + new * NEW_TOKEN
            strange += prompts + new
            judged += len(rows) * copies * JUDGED
        scored = float(sum(len(template.encode(row).ids) for row in questions.retain if row.response is not None))
        return cls(answers, scored, scored * compared, strange * compared, judged)


@contextmanager
def phase(progress: Progress | None, work: float) -> Iterator[Progress]:
    """Yields a function that passes work done on to `progress`, at most `work`; what is missing at the end is passed on then.

    So every phase counts exactly what was promised for it, whether answers end early or a batch is computed again.
    """
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done
        amount = min(amount, work - done)
        done += amount
        if progress and amount > 0:
            progress(amount)

    yield advance
    advance(work - done)


def scaled(progress: Progress, factor: float) -> Callable[[float], None]:
    """`progress` for counts of which each is `factor` units."""
    return lambda count: progress(count * factor)
