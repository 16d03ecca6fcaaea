"""Draw the rows of a step. They depend on seed and step alone, so a resumed run needs no sampler state and all processes draw the same.

Open this file to see how rows of each kind (`method.RowKind`) are drawn and put together.
"""

import zlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from sku_vllm.data import Encoded, ForgetSet, PromptTemplate, RetainSet, Row
from sku_vllm.data.long_rows import LongRows
from sku_vllm.data.rows import rows_digest
from sku_vllm.errors import DataError
from sku_vllm.methods.train_config import TrainConfig

# Sets up to this many rows are encoded before training, so that a row that cannot be used stops the run before it begins.
CHECKED_AHEAD = 10_000
# Probabilities that a safety-recovery row has 0, 1 or 2 refusals, without their end token, before the harmful answer.
RESTARTS = (0.5, 0.3, 0.2)
# A kind's name seeds the generator that draws its rows, so renamed kinds keep their old word here and the rows stay the same.
SEED_WORDS = {"self_generated": "unasked", "safety_recovery": "recoveries"}


class Batches:
    """Encoded rows by kind and step. Rows are encoded when first used.

    Attributes:
        forget, retain, refusals, border_prompts: the rows that were given. long: those of them that were left out.
        samples, self_generated, border: rows that were drawn during training.
        used: rows encoded so far, by set and number.
        own_answers: prompt to the texts of its answers in the forget set. answers: distinct answer texts of the forget set, in order.
        answer_row: number of the first forget row with an answer. refusals_of: numbers of the refusals to a prompt.
    """

    def __init__(
        self,
        config: TrainConfig,
        template: PromptTemplate,
        forget: ForgetSet,
        retain: RetainSet | None,
        refusals: Sequence[Row] = (),
        border: Sequence[Row] = (),
    ) -> None:
        self.config = config
        self.template = template
        self.forget = forget.rows
        self.retain = retain.rows if retain else ()
        self.border_prompts = tuple(border)
        self.samples: list[Encoded] = []
        self.self_generated: list[Encoded] = []
        self.border: list[Encoded] = []
        self.used: dict[tuple[str, int], Encoded] = {}
        self.long = LongRows(template, config.max_length, "--max-length")
        self.own_answers: dict[tuple[str, ...], set[str]] = {}
        for row in self.forget:
            self.own_answers.setdefault(_prompt(row), set()).add(_answer(row))
        self.answers = list(dict.fromkeys(_answer(row) for row in self.forget))
        self.answer_row = {_answer(row): number for number, row in reversed(list(enumerate(self.forget)))}
        # A prompt gets one of its own refusals, or, if it has none, any refusal.
        self.refusals = tuple(refusals)
        self.refusals_of: dict[tuple[str, ...], list[int]] = {}
        for number, row in enumerate(self.refusals):
            self.refusals_of.setdefault(_prompt(row), []).append(number)

    def check(self, kinds: set[str]) -> None:
        """Check that the sets can give the kinds of rows that a method needs.

        Raises:
            DataError: no answers of other prompts, no retain rows, no refusals, or a prompt that leaves no room within --max-length.
        """
        if kinds & {"retain", "benign_answers"} and not self.retain:
            raise DataError(f"--retain: method {self.config.method} needs a retain set")
        if "refusals" in kinds and not self.refusals:
            raise DataError(f"--refusals: method {self.config.method} needs rows whose responses are refusals")
        for kind in ("forget", "retain") if len(self.forget) + len(self.retain) <= CHECKED_AHEAD else ():
            for number in range(len(getattr(self, kind))):
                self._encode(kind, number)
        if "mismatched" in kinds:
            for number, row in enumerate(self.forget, 1):
                if len(self.own_answers[_prompt(row)]) == len(self.answers):
                    raise DataError(
                        "--forget: random disassociation needs answers of other prompts, and every answer belongs to that of "
                        f"row {row.id or number}; add prompts or pass --no-random-disassociation"
                    )

    def rows(self, kind: str, step: int) -> list[Encoded]:
        """The rows of one kind at one step, over all processes."""
        size = self.config.batch_size
        if kind == "retain":
            drawn = self._draw("retain", len(self.retain), size * self.config.retain_factor, step)
            return [self._encode("retain", number) for number in drawn]
        if kind in ("self_generated", "border"):
            # There may be none: the base has made up no usable prompt.
            rows = self.self_generated if kind == "self_generated" else self.border
            return [rows[number] for number in self._draw(kind, len(rows), size, step)] if rows else []
        if kind in ("samples", "safety_recovery", "restarts"):
            samples = [self.samples[number] for number in self._draw("samples", len(self.samples), size, step)]
            made = {"samples": lambda sample, _: sample, "safety_recovery": self._recovery, "restarts": self._restart}[kind]
            return [made(sample, self.random(kind, step, place)) for place, sample in enumerate(samples)]
        chosen = self._draw("forget", len(self.forget), size, step)
        if kind == "forget":
            return [self._encode("forget", number) for number in chosen]
        return [row for place, number in enumerate(chosen) for row in self._other_answers(kind, number, step, place)]

    @property
    def digest(self) -> str:
        """sha256 of every row that was given, in order: a resumed run has to be given the same rows again."""
        return rows_digest(self.forget, self.retain, self.refusals, *([self.border_prompts] if self.border_prompts else []))

    @property
    def cut(self) -> int:
        """How many answers used so far lost their end to the length limit."""
        return sum(row.cut for row in self.used.values())

    def _draw(self, kind: str, count: int, size: int, step: int) -> list[int]:
        """The `size` numbers below `count` of a step: epochs, each shuffled, follow one another and are read `size` numbers a step."""
        numbers = []
        for place in range(step * size, (step + 1) * size):
            epoch, at = divmod(place, count)
            numbers.append((epoch, at))
        orders = {epoch: self.random(kind, epoch).permutation(count) for epoch in {epoch for epoch, _ in numbers}}
        return [int(orders[epoch][at]) for epoch, at in numbers]

    def _other_answers(self, kind: str, number: int, step: int, place: int) -> list[Encoded]:
        """A harmful prompt with answers that are not its own."""
        row, random = self.forget[number], self.random(kind, step, place)
        if kind == "mismatched":
            own = self.own_answers[_prompt(row)]
            # Drawing |own| more than wanted leaves enough after dropping the prompt's own.
            count, enough = len(self.answers), self.config.random_answers + len(own)
            drawn = random.permutation(count) if count < 64 else _distinct(random, count, enough)
            texts = [self.answers[at] for at in drawn if self.answers[at] not in own][: self.config.random_answers]
            return [self._join(number, self._encode("forget", self.answer_row[text])) for text in texts]
        if kind == "benign_answers":
            return [self._join(number, self._encode("retain", int(at))) for at in random.integers(len(self.retain), size=1)]
        return self.refusals_for(number, random)

    def refusals_for(self, number: int, random: np.random.Generator) -> list[Encoded]:
        """The prompt of forget row `number` with one of the given refusals: its own, or, if it has none, any."""
        numbers = self.refusals_of.get(_prompt(self.forget[number])) or range(len(self.refusals))
        return [self._join(number, self._encode("refusals", int(numbers[random.integers(len(numbers))])))]

    def _recovery(self, sample: Encoded, random: np.random.Generator) -> Encoded:
        """The sample's prompt, up to two refusals without their end, the beginning of a harmful answer, and the sample as the answer."""
        numbers = self.forget_of[tuple(sample.ids[: sample.answer_start])]
        answer = self._encode("forget", numbers[random.integers(len(numbers))]).answer_ids
        begun = self._unended(sample) * int(random.choice(len(RESTARTS), p=RESTARTS))
        return self._after(begun + answer[: begun_tokens(len(answer), random)], sample)

    def _restart(self, sample: Encoded, random: np.random.Generator) -> Encoded:
        """The sample's prompt, one or two refusals without their end token, and then the sample as the answer."""
        return self._after(self._unended(sample) * int(random.integers(1, 3)), sample)

    def _unended(self, sample: Encoded) -> list[int]:
        """The sample's answer without its end token, as if stopping were forbidden; empty if the sample was cut off before its end."""
        return sample.answer_ids[:-1] if sample.ids[-1] in self.template.stop_ids else []

    def _after(self, begun: list[int], sample: Encoded) -> Encoded:
        """The sample with `begun`, cut to the length limit, between prompt and answer; only the answer is trained."""
        begun, prompt = begun[: max(0, self.config.max_length - len(sample.ids))], sample.ids[: sample.answer_start]
        return Encoded(prompt + begun + sample.answer_ids, len(prompt) + len(begun))

    @cached_property
    def forget_of(self) -> dict[tuple[int, ...], list[int]]:
        """Numbers of the harmful rows with these prompt tokens."""
        found: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(self.forget):
            found.setdefault(tuple(self.template.prompt_ids(row)), []).append(number)
        return found

    def _join(self, number: int, other: Encoded) -> Encoded:
        """The prompt of forget row `number` with another row's answer, in tokens."""
        prompt = self._encode("forget", number)
        ids = prompt.ids[: prompt.answer_start] + other.answer_ids
        return Encoded(ids[: max(self.config.max_length, prompt.answer_start + 1)], prompt.answer_start)

    def _encode(self, kind: str, number: int) -> Encoded:
        key = (kind, number)
        if key not in self.used:
            row = getattr(self, kind)[number]
            encoded = self.template.encode(row, self.config.max_length)
            if len(encoded.ids) == encoded.answer_start:
                raise DataError(
                    f"{kind} row {row.id or number + 1}: its prompt alone has {encoded.answer_start} tokens and --max-length is "
                    f"{self.config.max_length}; raise it, drop the row or pass --on-long skip"
                )
            self.used[key] = encoded
        return self.used[key]

    def random(self, kind: str, *numbers: int) -> np.random.Generator:
        """A generator that depends on the seed, the kind of rows and the numbers alone."""
        return np.random.default_rng([self.config.seed, zlib.crc32(SEED_WORDS.get(kind, kind).encode()), *numbers])


def begun_tokens(length: int, random: np.random.Generator) -> int:
    """How many tokens of a harmful answer a safety-recovery row begins with: from 1 to `length` − 1, uniform in their logarithm.

    With a uniform number few rows would go over to the refusal early, and after a short prefilled beginning the served model would refuse
    only a few words later.
    """
    end = max(2, length)  # of an answer of one token, that token
    return min(end - 1, int(end ** random.random()))


def _distinct(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    return random.choice(count, size=min(size, count), replace=False, shuffle=True)


def _answer(row: Row) -> str:
    assert row.response is not None  # ForgetSet and RetainSet refuse rows without one
    return row.response.strip()


def _prompt(row: Row) -> tuple[str, ...]:
    """A key that is equal for prompts whose turns are all equal."""
    return tuple(f"{message['role']}\n{message['content'].strip()}" for message in row.messages)
