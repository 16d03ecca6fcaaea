"""The interface of a judge: its input (`Exchange`), `Judge` itself, its findings, and the labelled result (`Verdict`).

Open this file to write a judge of your own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Label = Literal["harmful", "refusal", "gibberish", "benign"]
LABELS: tuple[Label, ...] = ("harmful", "refusal", "gibberish", "benign")
Turns = tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One prompt (the text of the last user turn) and the answer to it.

    turns: the whole conversation up to the answer, as `{"role", "content"}`; empty where the prompt is all of it.
    forget: whether the prompt belongs to a forget set, so that it should not be answered. Most judges read only the text.
    """

    prompt: str
    response: str
    turns: Turns = ()
    forget: bool = True

    @classmethod
    def of(cls, turns: Turns, response: str, *, forget: bool = True) -> "Exchange":
        """The exchange at the end of a conversation."""
        prompt = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
        return cls(prompt, response, turns if len(turns) > 1 else (), forget)

    @property
    def identity(self) -> list[Any]:
        """What tells it apart from others, as JSON: an exchange of the same identity gets the same verdict."""
        turns = [list(self.turns)] if self.turns else []
        return [self.prompt, self.response, *turns, *([] if self.forget else ["no forget prompt"])]

    @property
    def conversation(self) -> Turns:
        """Every turn up to the answer."""
        return self.turns or ({"role": "user", "content": self.prompt},)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a judge found in one answer.

    harmful: None where it does not decide. reason: a category or the word that decided it, "" for none. refusal: whether it calls the
    answer a refusal, None where it does not say. readable: False where the judge answered, but not with a verdict. score: how harmful it
    is, 0 to 1, of a judge that grades (StrongREJECT's rubric). partial: whether it refuses in part, of a judge that tells such refusals
    from full ones (XSTest's three classes).
    """

    harmful: bool | None
    reason: str = ""
    refusal: bool | None = None
    readable: bool = True
    score: float | None = None
    partial: bool | None = None


class Judge(Protocol):
    """Decides whether answers are harmful. Refusals and gibberish are found by built-in detectors, whatever the judge.

    Another package brings a judge by an entry point: NAME in the group `sku_vllm.judges`, pointing to a callable. `--judge NAME:REST`
    calls it with REST (text; "" for a bare NAME) and uses what it returns, in every command and in the judge process of `sku serve`.
    `--judge python:MODULE:CLASS` takes a class of a module as it lies in the working directory or on PYTHONPATH.
    For bad input the callable raises `sku_vllm.errors.ConfigError` or `DataError`, and `judge` raises `JudgeError` where an answer
    cannot be judged now but might be later: a measurement then keeps what it has and continues with --resume.
    A judge may also have `findings(exchanges)`, which gives a `Finding` each; its reasons then stand in rows.jsonl.

    A judge may have an attribute `forget_only`, true where it finds harm in answers to forget prompts alone; it judges no live traffic.

    A judge may have an attribute `examples`: an exchange that it must find harmful and one that it must not. `sku serve` tries a judge on
    them when it starts, or on texts of its own.

    Attributes:
        name: identifies the judge and its settings; stored verdicts are used again only for a judge of the same name.
    """

    name: str

    def judge(self, exchanges: Sequence[Exchange]) -> list[bool | None]:
        """One verdict per exchange, in order: True for harmful, False for not harmful, None where this judge does not decide harm."""
        ...


def findings_of(judge: Judge, exchanges: Sequence[Exchange]) -> list[Finding]:
    """What a judge finds, with reasons where it gives any."""
    own: Callable[[Sequence[Exchange]], list[Finding]] | None = getattr(judge, "findings", None)
    return own(exchanges) if own else [Finding(harmful) for harmful in judge.judge(exchanges)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The label of one answer, and the three findings that decide it: harmful (None: not decided), refusal and gibberish."""

    label: Label
    harmful: bool | None
    refusal: bool
    gibberish: bool

    @classmethod
    def of(cls, harmful: bool | None, refusal: bool, gibberish: bool) -> "Verdict":
        """The label in the order harmful, refusal, gibberish, benign: a harmful answer stays harmful even if it is broken or refuses."""
        label: Label = "harmful" if harmful else "refusal" if refusal else "gibberish" if gibberish else "benign"
        return cls(label, harmful, refusal, gibberish)


Labeller = Callable[[Sequence[Exchange]], list[Verdict]]
