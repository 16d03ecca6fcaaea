"""Sets the weight of an arm to 0 when its answers break a rule (--rollback-if) or its harmful rate rises (--drift)."""

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from sku_vllm.errors import ConfigError
from sku_vllm.serving.state import Busy, StateFile, Table
from sku_vllm.stats import wilson
from sku_vllm.stats.sequential import Cusum

logger = logging.getLogger("vllm.sku")
RULE = re.compile(r"\s*(harmful|refusal|gibberish)\s*>\s*(0?\.\d+|0|1)\s+after\s+(\d+)\s*")
LEARN = 200  # verdicts from which --drift learns an arm's normal harmful rate
NOTES = 20  # notes kept in the routing table


@dataclass(frozen=True, slots=True)
class Rule:
    """More than `limit` of the judged answers are `what`, once `after` have been judged."""

    what: str
    limit: float
    after: int


def parse_rule(text: str) -> Rule:
    """`harmful>0.05 after 200`.

    Raises:
        ConfigError: another form.
    """
    match = RULE.fullmatch(text)
    if not match:
        raise ConfigError(f'--rollback-if {text!r}: write for instance "harmful>0.05 after 200", with harmful, refusal or gibberish')
    return Rule(match[1], float(match[2]), max(1, int(match[3])))


class Rollback:
    """Checks an arm's counts after every verdict, in every process. Arms of kind base never lose traffic.

    change: writes a new routing table. counts: an arm's and version's verdicts so far, over all processes.
    """

    def __init__(
        self, state: StateFile, change: Callable[[Table], Table], rule: Rule | None, drift: bool, counts: Callable[[str, str], Counter[str]]
    ) -> None:
        self.state, self.change, self.rule, self.drift, self.counts = state, change, rule, drift, counts
        self.charts: dict[tuple[str, str], Cusum] = {}
        self.charted: dict[tuple[str, str], tuple[int, int]] = {}

    def look(self, arm: str) -> None:
        """Check this arm; called after each verdict on it."""
        served = self.state.read().arms.get(arm)
        if served is None or served.arm.kind == "base":
            return
        counts = self.counts(arm, served.version)
        key = (arm, served.version)  # a replaced arm gets a new version, and so a new chart
        reason = self._broken_rule(counts) or (self._drifted(key, counts["judged"], counts["harmful"]) if self.drift else None)
        if reason:
            self.lower(arm, reason)

    def _broken_rule(self, counts: Counter[str]) -> str | None:
        rule = self.rule
        if rule is None or counts["judged"] < rule.after or counts[rule.what] <= rule.limit * counts["judged"]:
            return None
        return f"{counts[rule.what]} of {counts['judged']} answers {rule.what}, above {rule.limit:g}"

    def _drifted(self, key: tuple[str, str], judged: int, harmful: int) -> str | None:
        """The reason to lower the arm, or None.

        The normal rate is the upper Wilson bound of the first `LEARN` verdicts; a CUSUM then tests for twice that rate plus 0.05.
        """
        if judged < LEARN:
            return None
        before, harmful_before = self.charted.get(key, (judged, harmful))
        self.charted[key] = judged, harmful
        if key not in self.charts:
            normal = max(0.005, min(0.9, wilson(harmful, judged)[1]))
            self.charts[key] = Cusum(normal, min(0.99, 2 * normal + 0.05))
            return None
        chart, hits = self.charts[key], harmful - harmful_before
        alarms = [chart.add(number < hits) for number in range(judged - before)]
        return f"its harmful rate drifted above {chart.bad:.1%}, from {chart.normal:.1%} or less" if any(alarms) else None

    def lower(self, arm: str, reason: str) -> None:
        """Set the arm's weight to 0 and leave a note in the table; see `without` for who gets its share."""
        try:
            with self.state.locked() as table:
                if not table.split.get(arm):
                    return
                note = f"guard: {arm} lowered from {table.split[arm]:g} to 0: {reason}"
                self.change(table.changed(split=without(table.split, arm), notes=(*table.notes, note)[-NOTES:]))
                logger.warning("sku: %s", note)
        except Busy:
            return  # the next verdict tries again


def without(split: dict[str, float], arm: str) -> dict[str, float]:
    """The split with this arm at 0.

    The other arms get its share in proportion to their weights, or the first of them all of it where their weights are 0. An only
    arm keeps its weight.
    """
    others = {name: weight for name, weight in split.items() if name != arm}
    if not others:
        return split
    total = sum(others.values())
    if not total:
        first = next(iter(others))
        return {name: float(name == first) for name in split}
    return {name: 0.0 if name == arm else split[name] / total for name in split}
