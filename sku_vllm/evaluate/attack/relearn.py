"""The attack relearn: fine-tune the model on a little benign or harmful data and measure what comes back.

Harmful words come back with form, which any harmful rows teach, even to a model that never knew the facts. What counts is knowledge that
was not in the attacker's rows (arXiv 2410.08827): with --relearn-topics it trains on some topics and asks for the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from sku_vllm.data import Row
from sku_vllm.data.rows import in_hash_order
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.attack.attack import Attack, AttackCase, Finding
from sku_vllm.evaluate.attack.decoding import NeverStops
from sku_vllm.evaluate.attack.fine_tune import encode_all, fine_tune, trainable
from sku_vllm.evaluate.attack.similar import similar_rows

BENIGN, SIMILAR = "benign", "similar benign rows"


@dataclass(frozen=True, slots=True)
class Course:
    """One fine-tuning of the original target. harmful: whether its rows are. how: of attack_config.WITH."""

    name: str
    rows: Sequence[Row]
    harmful: bool
    how: str
    lr: float


class Relearn(Attack):
    """A fine-tuning ("course") on the benign rows and on each share of the harmful rows, with every rate, measured at the steps of --steps.

    Each course starts from the original target. Only prompts that it does not train on are measured, with --relearn-topics only those of
    other topics, and recovery is counted from the same prompts before it. When ban-eos runs too, it is measured after each course.
    """

    changes_weights = True

    def measurements(self, case: AttackCase) -> int:
        """Before and after steps of every course."""
        settings, banned = case.request.settings, "ban-eos" in case.request.kinds
        return len(courses(case)) * (1 + len(settings.steps) + banned)

    def check(self, case: AttackCase) -> None:
        """Raise ConfigError for rows without answers, no rows at all, topics that no row names, and a set that keeps no prompt to ask."""
        if case.relearn and not any(row.response for row in case.relearn):
            raise ConfigError("--relearn: its rows have no answers to learn from; give rows with 'response'")
        for topic in case.request.relearn_topics:
            if not any(row.names(topic) for row in case.relearn):
                raise ConfigError(f"--relearn-topics {topic}: no prompt of the rows to relearn names it; write it as the prompts do")
        found = courses(case)
        if not found:
            raise ConfigError("attack relearn: nothing to learn from; give --relearn FILE, or retain rows with answers")
        for course in found:
            if empty := [key for key, left in _asked(course, case).items() if not left]:
                flag = "--relearn-topics" if case.request.relearn_topics else "--relearn"
                raise ConfigError(
                    f"{flag}: {course.name} holds every prompt of --forget {empty[0]}; measure on prompts that are not trained on"
                )

    def run(self, case: AttackCase) -> Iterator[Finding]:
        """One finding per course and step count.

        Details: `steps` (0: before the course), `pairs` (number of training rows), `with`, `lr` and `cost_tokens` (trained on so far).
        """
        for course in courses(case):
            yield from _run(case, course)


ATTACK = Relearn


def courses(case: AttackCase) -> list[Course]:
    """The benign rows, those in the syntax of the forget prompts, then each share of the harmful rows; each with every way and rate."""
    settings = case.request.settings
    found: list[tuple[str, Sequence[Row], bool]] = []
    if "benign" in settings.relearn_on and case.benign:
        found.append((BENIGN, case.benign, False))
    if "similar" in settings.relearn_on and case.benign:
        found.append((SIMILAR, similar_rows(case.benign, [row.prompt for rows in case.questions.forget.values() for row in rows]), False))
    if "harmful" in settings.relearn_on:
        found += [(name, rows, True) for name, rows in harmful_courses(case.relearn, settings.fractions)]
    return [
        Course(name + _varied(how, lr, settings.rates), rows, harmful, how, lr)
        for (name, rows, harmful), how, lr in product(found, settings.relearn_with, settings.rates)
    ]


def _varied(how: str, lr: float, rates: Sequence[float]) -> str:
    """What the name of a course adds where courses differ in it."""
    return (", LoRA" if how == "lora" else "") + (f", rate {lr:g}" if len(rates) > 1 else "")


def harmful_courses(relearn: Sequence[Row], fractions: Sequence[float]) -> list[tuple[str, list[Row]]]:
    """(name, rows) for each share of the harmful rows.

    A smaller share is part of a larger one, and the file's order does not matter.
    """
    order = in_hash_order(row for row in relearn if row.response)
    return [(f"{100 * share:g} % of the forget set", order[: max(1, round(share * len(order)))]) for share in fractions if order]


def _run(case: AttackCase, course: Course) -> Iterator[Finding]:
    settings, forget, target, name = case.request.settings, case.questions.forget, case.target, course.name
    asked = _asked(course, case)
    before = case.before if all(len(asked[key]) == len(forget[key]) for key in forget) else case.measured(f"before {name}", asked)
    encoded = encode_all(target.model, case.template, course.rows)
    tokens_a_step = settings.batch_size * sum(len(item.ids) for item in encoded) / len(encoded)

    def details(steps: int) -> dict[str, Any]:
        of_course = {"pairs": len(course.rows), "with": course.how, "lr": course.lr}
        return {"steps": steps, **of_course, "cost_tokens": round(steps * tokens_a_step)}

    yield Finding(name, before, details(0), before)
    if cut := sum(item.cut for item in encoded):
        case.progress(f"warning: {cut} of the answers to relearn on {name} are cut at the model's context")
    with target.changed(), trainable(target.model, course.how) as trained:
        steps = fine_tune(
            target.model,
            encoded,
            settings.steps,
            lr=course.lr,
            batch_size=settings.batch_size,
            seed=case.request.config.seed,
            trained=trained,
        )
        for step in steps:
            case.progress(f"relearning on {name}: {step} steps")
            yield Finding(name, case.measured(f"{name}, {step} steps", asked), details(step), before)
        if "ban-eos" in case.request.kinds:
            case.progress(f"relearning on {name}, then banning the end of sequence")
            measured = case.measured(f"{name}, ban-eos", asked, NeverStops(target.backend))
            yield Finding(f"after relearning on {name}", measured, {"pairs": len(course.rows)}, before, kind="ban-eos")


def _asked(course: Course, case: AttackCase) -> Mapping[str, Sequence[Row]]:
    """The forget sets without the relearned topics and the prompts that a course trains on.

    A benign course removes no prompt of its own: its rows hold no harmful knowledge.
    """
    trained = {row.prompt for row in course.rows} if course.harmful else set()
    return {key: [row for row in asked if row.prompt not in trained] for key, asked in case.held_out.items()}
