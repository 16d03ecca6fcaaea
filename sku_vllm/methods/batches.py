"""Which rows a step sees. A pure function of seed and step, so a resumed run needs no sampler state and every process agrees."""

import zlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from sku_vllm.data import Encoded, ForgetSet, PromptTemplate, RetainSet, Row
from sku_vllm.data.rows import rows_digest
from sku_vllm.errors import DataError
from sku_vllm.methods.config import TrainConfig

# Sets up to this many rows are encoded before training, so that a row that cannot be used stops the run before it begins.
CHECKED_AHEAD = 10_000
# How many refusals that were not let end come before the harmful answer of a recovery; a restart has one or two and no harm.
RESTARTS = (0.5, 0.3, 0.2)


class Batches:
    """Encoded rows by kind and step. Rows are encoded when first used."""

    def __init__(
        self, config: TrainConfig, template: PromptTemplate, forget: ForgetSet, retain: RetainSet | None, refusals: Sequence[Row] = ()
    ) -> None:
        self.config = config
        self.template = template
        self.forget = forget.rows
        self.retain = retain.rows if retain else ()
        self.samples: list[Encoded] = []
        self.unasked: list[Encoded] = []
        self.used: dict[tuple[str, int], Encoded] = {}
        self.own_answers: dict[tuple[str, ...], set[str]] = {}
        for row in self.forget:
            self.own_answers.setdefault(_prompt(row), set()).add(row.response.strip())
        self.answers = list(dict.fromkeys(row.response.strip() for row in self.forget))
        self.answer_row = {row.response.strip(): number for number, row in reversed(list(enumerate(self.forget)))}
        # A prompt's own refusals come first; other refusals serve where a prompt has none.
        self.refusals = tuple(refusals)
        self.refusals_of: dict[tuple[str, ...], list[int]] = {}
        for number, row in enumerate(self.refusals):
            self.refusals_of.setdefault(_prompt(row), []).append(number)

    def check(self, kinds: set[str]) -> None:
        """Whether the sets can give the rows a method asks for.

        Raises:
            DataError: too few different answers to mix up, no retain rows, no refusals, a prompt beyond --max-length.
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
        if kind == "unasked":
            drawn = self._draw("unasked", len(self.unasked), size, step) if self.unasked else []  # a base may make up nothing of use
            return [self.unasked[number] for number in drawn]
        if kind in ("samples", "recoveries", "restarts"):
            drawn = [self.samples[number] for number in self._draw("samples", len(self.samples), size, step)]
            made = {"samples": lambda sample, _: sample, "recoveries": self._recovery, "restarts": self._restart}[kind]
            return [made(sample, self._random(kind, step, place)) for place, sample in enumerate(drawn)]
        chosen = self._draw("forget", len(self.forget), size, step)
        if kind == "forget":
            return [self._encode("forget", number) for number in chosen]
        return [row for place, number in enumerate(chosen) for row in self._other_answers(kind, number, step, place)]

    @property
    def digest(self) -> str:
        """Of every row that was given, in order: what a resumed run has to be given again."""
        return rows_digest(self.forget, self.retain, self.refusals)

    @property
    def cut(self) -> int:
        """Answers used so far whose end the length limit took."""
        return sum(row.cut for row in self.used.values())

    def _draw(self, kind: str, count: int, size: int, step: int) -> list[int]:
        """`size` numbers below `count`: shuffled epochs laid end to end, read at `step`."""
        numbers = []
        for place in range(step * size, (step + 1) * size):
            epoch, at = divmod(place, count)
            numbers.append((epoch, at))
        orders = {epoch: self._random(kind, epoch).permutation(count) for epoch in {epoch for epoch, _ in numbers}}
        return [int(orders[epoch][at]) for epoch, at in numbers]

    def _other_answers(self, kind: str, number: int, step: int, place: int) -> list[Encoded]:
        """A harmful prompt with answers that are not its own."""
        row, random = self.forget[number], self._random(kind, step, place)
        if kind == "mismatched":
            own = self.own_answers[_prompt(row)]
            # Drawing |own| more than wanted leaves enough after dropping the prompt's own.
            count, enough = len(self.answers), self.config.random_answers + len(own)
            drawn = random.permutation(count) if count < 64 else _distinct(random, count, enough)
            texts = [self.answers[at] for at in drawn if self.answers[at] not in own][:self.config.random_answers]
            return [self._join(number, self._encode("forget", self.answer_row[text])) for text in texts]
        if kind == "benign_answers":
            return [self._join(number, self._encode("retain", int(at))) for at in random.integers(len(self.retain), size=1)]
        numbers = self.refusals_of.get(_prompt(row)) or range(len(self.refusals))
        return [self._join(number, self._encode("refusals", int(numbers[random.integers(len(numbers))])))]

    def _recovery(self, sample: Encoded, random: np.random.Generator) -> Encoded:
        """Its prompt, perhaps refusals that were not let end, a harmful answer that should not have begun, and only then the sample."""
        numbers = self.forget_of[tuple(sample.ids[:sample.answer_start])]
        answer = self._encode("forget", numbers[random.integers(len(numbers))]).answer_ids
        begun = self._unended(sample) * int(random.choice(len(RESTARTS), p=RESTARTS))
        return self._after(begun + answer[:begun_tokens(len(answer), random)], sample)

    def _restart(self, sample: Encoded, random: np.random.Generator) -> Encoded:
        """Its prompt, refusals that were not let end, and the sample after all: what a ban on stopping asks for."""
        return self._after(self._unended(sample) * int(random.integers(1, 3)), sample)

    def _unended(self, sample: Encoded) -> list[int]:
        return sample.answer_ids[:-1] if sample.ids[-1] in self.template.stop_ids else []

    def _after(self, begun: list[int], sample: Encoded) -> Encoded:
        begun, prompt = begun[:max(0, self.config.max_length - len(sample.ids))], sample.ids[:sample.answer_start]
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
        ids = prompt.ids[:prompt.answer_start] + other.answer_ids
        return Encoded(ids[:max(self.config.max_length, prompt.answer_start + 1)], prompt.answer_start)

    def _encode(self, kind: str, number: int) -> Encoded:
        key = (kind, number)
        if key not in self.used:
            row = getattr(self, kind)[number]
            encoded = self.template.encode(row, self.config.max_length)
            if len(encoded.ids) == encoded.answer_start:
                raise DataError(
                    f"{kind} row {row.id or number + 1}: its prompt alone has {encoded.answer_start} tokens and --max-length is "
                    f"{self.config.max_length}; raise it or drop the row"
                )
            self.used[key] = encoded
        return self.used[key]

    def _random(self, kind: str, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, zlib.crc32(kind.encode()), *numbers])


def begun_tokens(length: int, random: np.random.Generator) -> int:
    """How many tokens of a harmful answer are begun: at least one and not all, each doubling as likely as the next.

    Drawn evenly, few recoveries begin early, and a prefilled opening was turned from a few words late (research.md, late recoveries).
    """
    end = max(2, length)  # the one token of an answer that has no more is begun
    return min(end - 1, int(end ** random.random()))


def _distinct(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    return random.choice(count, size=min(size, count), replace=False, shuffle=True)


def _prompt(row: Row) -> tuple[str, ...]:
    """What makes two prompts the same: every turn."""
    return tuple(f"{message['role']}\n{message['content'].strip()}" for message in row.messages)
