"""The interface of an attack (`Attack`), its input (`AttackCase`) and its results (`Finding`).

Open this file to write an attack, in this package or in one of your own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.evaluate.answer_bar import Say
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.attack.target import Target, open_target
from sku_vllm.evaluate.backend import Backend, Progress
from sku_vllm.evaluate.measure_request import Questions, Source
from sku_vllm.evaluate.measurement import measure
from sku_vllm.evaluate.resume import measurement_directory
from sku_vllm.evaluate.work import Work


class AttackCase:
    """A model under attack and everything an attack may use.

    Attributes:
        request: what was asked for; `request.settings` holds the settings of every kind, `request.kinds` all kinds that run.
        questions: the prompts on which recovery is measured, and their judge.
        relearn: harmful pairs an attacker may have: those of --relearn, with --relearn-topics only those that name one of the topics, and
            without a file those of the forget sets. Empty without either.
        benign: harmless pairs with answers.
        progress: call it with one line before each measurement.
        directory: where measurements are stored for --resume; None without an output.
        rows: every labelled answer so far, as rows.jsonl has it, with the name of its measurement as `attack`.
        advance: called with the work that measurements have done.
    """

    def __init__(self, request: AttackRequest, progress: Say) -> None:
        self.request, self.progress = request, progress
        self.questions: Questions = request.questions()
        self.relearn = self._of_topics(self._trained_on("relearn", request.relearn))
        self.given_benign = self._trained_on("benign", request.benign, safe=True)
        self.benign = [row for row in self.given_benign or self.questions.retain if row.response]
        self.directory: Path | None = None
        self.rows: list[dict[str, Any]] = []
        self.advance: Progress = lambda work: None
        self._open = ExitStack()

    def _trained_on(self, name: str, source: Source | None, *, safe: bool = False) -> Sequence[Row]:
        """The rows of a set that an attack fine-tunes on, without those that leave no room for an answer."""
        rows = self.request.read(source, need_response=True, safe=safe) if source else []
        return self.questions.long.fitting(name, rows) if self.questions.long else rows

    def _of_topics(self, relearn: Sequence[Row]) -> Sequence[Row]:
        topics = self.request.relearn_topics
        if not topics:
            return relearn
        rows = relearn or [row for rows in self.questions.forget.values() for row in rows if row.response]
        return [row for row in rows if any(row.names(topic) for topic in topics)]

    @property
    def held_out(self) -> dict[str, list[Row]]:
        """The forget sets without the prompts that name a topic of --relearn-topics."""
        topics = self.request.relearn_topics
        return {key: [row for row in rows if not any(map(row.names, topics))] for key, rows in self.questions.forget.items()}

    @property
    def sets(self) -> list[Sequence[Row]]:
        """Every set of rows that the result depends on; --resume compares them."""
        return [*self.questions.sets.values(), self.relearn, self.given_benign]

    @cached_property
    def target(self) -> Target:
        """The model under attack, loaded on first use. Change its weights only inside `with target.changed()`."""
        return self._open.enter_context(open_target(self.request))

    def close(self) -> None:
        """Let go of the target, if it was loaded."""
        self._open.close()

    @cached_property
    def work(self) -> float:
        """Of one measurement of all prompts; see `Work`."""
        compared = self.target.reference is not None
        return Work.of(self.template, self.questions, self.request.config, compared=compared).total

    @cached_property
    def template(self) -> PromptTemplate:
        """How rows become prompts of this model."""
        return PromptTemplate.of(self.target.tokenizer, self.request.config.template)

    @cached_property
    def before(self) -> dict[str, Any]:
        """The eval object of the model before any attack."""
        return self.measured("before")

    def measured(self, what: str, forget: Mapping[str, Sequence[Row]] | None = None, backend: Backend | None = None) -> dict[str, Any]:
        """Measure the target in its present state; returns the eval object (the JSON of an `EvalReport`), and keeps the answers in `rows`.

        Args:
            what: a name that is unique within the run, under which the answers are stored for --resume and stand in rows.jsonl.
            forget: prompts to use instead of `questions.forget`.
            backend: a decoder to use instead of the target's own.
        """
        questions = self.questions if forget is None else replace(self.questions, forget=forget)
        report = measure(
            backend or self.target.backend,
            self.target.tokenizer,
            questions,
            reference=self.target.reference,
            config=self.request.config,
            kept=measurement_directory(self.directory, what),
            progress=self.advance,
        )
        self.rows += [{"attack": what, **row} for row in report.rows]
        return report.to_json()


@dataclass(frozen=True, slots=True)
class Finding:
    """One measurement under attack.

    Attributes:
        attack: a name that is unique within its kind.
        measured: the eval object.
        details: more keys of its entry in the record, such as `steps`.
        against: the eval object whose harm is subtracted to get `recovery`; None is the one before the attacks.
        kind: the kind under which it is listed; None is the attack's own.
    """

    attack: str
    measured: dict[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, Any] | None = None
    kind: str | None = None


class Attack:
    """One way to try to bring the subtracted knowledge back.

    To add a kind to this package, subclass this in a file named as the kind, bind the class to `ATTACK` and add the name to `KINDS`.
    Another package declares its subclass as an entry point, and `sku attack NAME` finds it:

        [project.entry-points."sku_vllm.attacks"]
        shout = "my_package.shout:Shout"

        class Shout(Attack):
            def run(self, case):
                loud = {name: [Row.ask(row.prompt.upper()) for row in rows] for name, rows in case.questions.forget.items()}
                case.progress("shouting")
                yield Finding("upper case", case.measured("shout", loud))
    """

    # Whether it changes weights in memory, which --backend vllm does not allow.
    changes_weights = False

    def measurements(self, case: AttackCase) -> int:
        """How many findings there will be, for the time left."""
        return 1

    def check(self, case: AttackCase) -> None:
        """Check the request before anything is loaded or measured. Raises ConfigError, naming the flag that is wrong."""

    def run(self, case: AttackCase) -> Iterator[Finding]:
        """Yield each finding as soon as it is measured. When this ends, the target's weights must be what they were before."""
        raise NotImplementedError
