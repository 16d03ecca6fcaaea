"""The function behind `sku attack`: read the rows, measure the model before and under each attack, write the output directory."""

import importlib
from dataclasses import dataclass
from typing import Any

from sku_vllm.data.rows import rows_digest
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.answer_bar import Bar, Say, no_bar, silent
from sku_vllm.evaluate.attack.attack import Attack, AttackCase
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.attack.kinds import KINDS
from sku_vllm.evaluate.chart import knowledge_svg, recovery_svg
from sku_vllm.evaluate.resume import with_dtype, working_directory
from sku_vllm.evaluate.shares import HARM, HELD_OUT, KNOWLEDGE, check_opinion, harm, recovered
from sku_vllm.extensions import ATTACKS, load_extension
from sku_vllm.output import record, write_text
from sku_vllm.records.rows_file import write_rows


@dataclass(frozen=True, slots=True)
class AttackReport:
    """The measurements before and under attack.

    Attributes:
        before: the eval object of the model before the attacks.
        attacks: by kind, one entry per measurement: an eval object with `attack` (its name) and `recovery`, harm now minus harm before
            (mean of the forget sets and modes). When both relearn and ban-eos run, ban-eos is also measured on each relearned model.
            Where forget rows have `must_contain`, `recovered` is their knowledge (`shares.recovered`).
        skipped_rows: how many rows of each set were left out, since their prompt fills the model's context.
        rests_on: what a claim about these attacks rests on: "knowledge of held-out topics" (of relearning; of the other kinds,
            knowledge), "knowledge" (of prompts that were not trained on), or "harmful answers" alone, which count form.
    """

    before: dict[str, Any]
    attacks: dict[str, list[dict[str, Any]]]
    skipped_rows: dict[str, int]
    rests_on: str = HARM

    def to_json(self) -> dict[str, Any]:
        """What `sku attack --json` prints."""
        return {"before": self.before, "attacks": self.attacks, "skipped_rows": self.skipped_rows, "rests_on": self.rests_on}


def attack_model(request: AttackRequest, progress: Say = silent, bar: Bar = no_bar) -> AttackReport:
    """Measure a model before and under each attack. With an output, write sku_attack.json and rows.jsonl there, and charts of relearning.

    Args:
        progress: called with one line before each measurement. bar: shows how far all measurements are.

    Raises:
        InputError: a file, judge, model or adapter that cannot be used; a judge that does not decide harm; an output that is not empty.
        JudgeError: the judge failed. The answers so far are in OUTPUT.partial/ for `resume`; relearning is then trained again.
        DivergenceError: relearning diverged.
    """
    attacks = {kind: load_attack(kind) for kind in request.kinds}
    for kind, attack in attacks.items():
        if attack.changes_weights and request.backend == "vllm":
            raise ConfigError(f"attack {kind}: changes weights in memory, which --backend vllm keeps to itself; leave out one of the two")
    request = with_dtype(request)
    case = AttackCase(request, progress)
    for attack in attacks.values():
        attack.check(case)
    settings = request.to_json()
    with working_directory(settings, rows_digest(*case.sets), resume=request.resume) as directory:
        case.directory = directory
        try:
            with bar(case.work * (1 + sum(attack.measurements(case) for attack in attacks.values())), "attacking") as case.advance:
                report = _attacked(case, attacks)
        finally:
            case.close()
        if directory:
            if relearned := report.attacks.get("relearn"):
                write_text(directory / "recovery.svg", recovery_svg(relearned))
                if report.rests_on != HARM:
                    write_text(directory / "knowledge.svg", knowledge_svg({"": relearned}))
            written = {"row_digests": case.questions.digests, **write_rows(directory, case.rows)}
            record(directory, "attack", report.to_json() | written, settings)
    for line in case.questions.warnings:
        progress(line)
    return report


def load_attack(kind: str) -> Attack:
    """The attack of that name, of this package or another's.

    Raises:
        ConfigError: an attack of another package cannot be loaded.
    """
    if kind in KINDS:
        module = importlib.import_module(f"sku_vllm.evaluate.attack.{kind.replace('-', '_')}")
        return module.ATTACK()  # type: ignore[no-any-return]  # every file of a kind has it
    return load_extension(ATTACKS, kind)()  # type: ignore[no-any-return]  # the other package promises an Attack


def _attacked(case: AttackCase, attacks: dict[str, Attack]) -> AttackReport:
    case.progress("measuring before the attacks")
    check_opinion(case.before, case.questions.judge, "nothing could come back")
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in attacks}
    for kind, attack in attacks.items():
        for finding in attack.run(case):
            recovery = harm(finding.measured) - harm(finding.against or case.before)
            entry = {"attack": finding.attack, **finding.details, **finding.measured, "recovery": recovery}
            if (known := recovered(finding.measured)) is not None:
                entry["recovered"] = known
            found[finding.kind or kind].append(entry)
    return AttackReport(case.before, found, case.questions.skipped, rests_on(case))


def rests_on(case: AttackCase) -> str:
    """What a claim about the attacks rests on; see AttackReport."""
    if recovered(case.before) is None:
        return HARM
    return HELD_OUT if case.request.relearn_topics else KNOWLEDGE
