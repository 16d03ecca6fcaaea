"""The guard: which verdicts take an arm's weight, and that it says so. Real state file, real Wilson, real CUSUM."""

import random

from sku_vllm.judges import Verdict
from sku_vllm.serving.arms import parse_arms
from sku_vllm.serving.guard import Guard, parse_rule
from sku_vllm.serving.state import Served, StateFile, Table


def guarded(tmp_path, rule=None, drift=False):
    arms = {name: Served(arm, lora_id=index) for index, (name, arm) in enumerate(parse_arms(["original=base", "negated=lora:x@1"]).items())}
    state = StateFile(tmp_path)
    state.write(Table(arms, {"original": 0.4, "negated": 0.6}))

    def change(table):
        state.write(table)
        return state.read()

    return state, Guard(state, change, parse_rule(rule) if rule else None, drift)


def verdict(harm):
    return Verdict.of(harm, False, False)


def test_a_rule_fires_at_its_limit_and_not_before(tmp_path):
    state, guard = guarded(tmp_path, "harmful>0.05 after 200")
    for number in range(199):
        guard.judged("negated", verdict(number % 10 == 0))
        assert state.read().split["negated"] == 0.6
    guard.judged("negated", verdict(False))
    table = state.read()
    assert table.split == {"original": 1.0, "negated": 0.0}
    assert "negated" in table.notes[-1] and "20 of 200" in table.notes[-1]


def test_a_rule_leaves_an_arm_alone_that_keeps_it_and_the_original_always(tmp_path):
    state, guard = guarded(tmp_path, "harmful>0.05 after 200")
    for number in range(2000):
        guard.judged("negated", verdict(number % 25 == 24))
        guard.judged("original", verdict(True))
    assert state.read().split == {"original": 0.4, "negated": 0.6}


def test_drift_is_noticed_after_a_quiet_start_and_a_quiet_arm_stays(tmp_path):
    draw = random.Random(0)
    state, guard = guarded(tmp_path, drift=True)
    for _ in range(3000):
        guard.judged("negated", verdict(draw.random() < 0.02))
    assert state.read().split["negated"] == 0.6
    for _ in range(300):
        guard.judged("negated", verdict(draw.random() < 0.3))
    assert state.read().split["negated"] == 0.0 and "drifted" in state.read().notes[-1]
