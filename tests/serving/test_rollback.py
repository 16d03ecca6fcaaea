"""The rollback: which verdicts take an arm's weight, and that it says so. Real state file, real Wilson, real CUSUM."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from sku_vllm.judges import Verdict
from sku_vllm.serving.arms import parse_arms
from sku_vllm.serving.experiment import Experiment
from sku_vllm.serving.rollback import Rollback, parse_rule
from sku_vllm.serving.state import Served, StateFile, Table

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import eventually  # noqa: E402


def guarded(tmp_path, rule=None, drift=False):
    arms = {name: Served(arm, lora_id=index) for index, (name, arm) in enumerate(parse_arms(["original=base", "negated=lora:x@1"]).items())}
    state = StateFile(tmp_path)
    state.write(Table(arms, {"original": 0.4, "negated": 0.6}))

    def change(table):
        state.write(table)
        return state.read()

    experiment = Experiment()
    rollback = Rollback(state, change, parse_rule(rule) if rule else None, drift, experiment.total)

    def judged(arm, verdict):
        experiment.judged(arm, verdict)
        rollback.look(arm)

    return state, judged


def verdict(harm):
    return Verdict.of(harm, False, False)


def test_a_rule_fires_at_its_limit_and_not_before(tmp_path):
    state, judged = guarded(tmp_path, "harmful>0.05 after 200")
    for number in range(199):
        judged("negated", verdict(number % 10 == 0))
        assert state.read().split["negated"] == 0.6
    judged("negated", verdict(False))
    table = state.read()
    assert table.split == {"original": 1.0, "negated": 0.0}
    assert "negated" in table.notes[-1] and "20 of 200" in table.notes[-1]


def test_a_rule_leaves_an_arm_alone_that_keeps_it_and_the_original_always(tmp_path):
    state, judged = guarded(tmp_path, "harmful>0.05 after 200")
    for number in range(2000):
        judged("negated", verdict(number % 25 == 24))
        judged("original", verdict(True))
    assert state.read().split == {"original": 0.4, "negated": 0.6}


def test_drift_is_noticed_after_a_quiet_start_and_a_quiet_arm_stays(tmp_path):
    draw = random.Random(0)
    state, judged = guarded(tmp_path, drift=True)
    for _ in range(3000):
        judged("negated", verdict(draw.random() < 0.02))
    assert state.read().split["negated"] == 0.6
    for _ in range(300):
        judged("negated", verdict(draw.random() < 0.3))
    assert state.read().split["negated"] == 0.0 and "drifted" in state.read().notes[-1]


def test_two_processes_share_one_experiment_and_either_rollback_sees_all(tmp_path):
    """Each process alone stays below the rule's count; together they break it, and both pages show the sum."""
    script = """
import sys, time
from sku_vllm.judges import Verdict
from sku_vllm.serving.experiment import Experiment
from sku_vllm.serving.shared_experiment import SharedExperiment
experiment = Experiment()
SharedExperiment(__import__("pathlib").Path(sys.argv[1]), experiment)
for number in range(120):
    experiment.judged("negated", Verdict.of(number % 10 == 0, False, False))
    experiment.timed("negated", 1.0 + number, 0.5)
sys.stdin.read()
page = experiment.report(["negated"], None, False)["arms"]["negated"]
print(experiment.total("negated")["judged"], page["judged"], page["harmful"], page["latency_s"]["n"])
"""
    (tmp_path / "sku_experiment.1.2.json").write_text("{}")  # an earlier server's
    again = {"versions": {"negated": ""}, "counts": {"negated": {"buckets": {"harmful": [1] * 64}}}}
    (tmp_path / f"sku_experiment.{os.getpid()}-another.7.json").write_text(json.dumps(again))  # one with the same process id
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]

    def complete(path):
        page = json.loads(path.read_text())  # written by rename, so whole
        return page.get("counts", {}).get("negated", {}).get("judged") == len(page.get("latency", {}).get("negated", ())) == 120

    assert eventually(lambda: sum(complete(path) for path in tmp_path.glob("sku_experiment.*.json")) == 2)
    assert [process.communicate()[0].split() for process in processes] == [[b"240", b"240", b"24", b"240"]] * 2
    assert len(list(tmp_path.glob("sku_experiment.*.json"))) == 2
