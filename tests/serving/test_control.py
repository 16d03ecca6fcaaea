"""The control API of one server: who may do what, what is written down, what a trial changes, the file that is followed."""

import asyncio
import json
import sys
from argparse import Namespace
from pathlib import Path

import httpx
import pytest
import yaml

from sku_vllm.errors import ConfigError
from sku_vllm.judges import Exchange, Verdict
from sku_vllm.serving.arm_changes import ArmChanges
from sku_vllm.serving.follower import Follower
from sku_vllm.serving.initial_state import prepare_state
from sku_vllm.serving.judge_queue import Answer
from sku_vllm.serving.runtime import Runtime
from sku_vllm.serving.serve_config import ServeConfig

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import PluginServer, eventually  # noqa: E402

FAR = "upstream:http://192.0.2.1:1/v1#m"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALICE", "alices secret")
        patch.setenv("EVE", "eves secret")
        found = PluginServer(tmp_path_factory.mktemp("one"), keyed=True, operators=["alice=ALICE"], readers=["eve=EVE"])
    yield found.wait()
    found.stop()


def audit(server):
    return [json.loads(line) for line in (server.place / "state/audit.jsonl").read_text().splitlines()]


def test_probes_and_the_page_need_no_key_and_all_else_does(server):
    for path, status in (("ready", 200), ("ui", 200), ("status", 401), ("experiment", 401)):
        assert server.get(f"/v1/sku/{path}", headers={}) == status, path
    assert server.get("/v1/sku/status", headers={"Authorization": "Bearer key"}) == 401
    assert server.get("/v1/sku/status") == 200


def test_a_reader_looks_and_changes_nothing(server):
    before = server.control("GET", "arms")
    for path in ("status", "arms", "experiment"):
        assert server.control("GET", path, X_SKU_Token="eves secret")[0] == 200
    for method, path, body in (
        ("PUT", "weights", {"weights": {"other": 1.0}}),
        ("POST", "arms", {"name": "x", "spec": FAR}),
        ("PUT", "judging", {"sample": 0.5}),
        ("POST", "restore", None),
    ):
        status, answer = server.control(method, path, body, X_SKU_Token="eves secret")
        assert status == 403 and "may only look" in answer["error"]["message"]
    assert server.control("GET", "arms") == before
    assert server.ask("x", X_SKU_Token="eves secret", X_SKU_Arm="other").status_code == 403, "a reader may not choose an arm"


def test_every_action_leaves_a_line_with_who_and_what(server):
    server.control("PUT", "weights", {"weights": {"original": 0.2, "other": 0.8}}, X_SKU_Token="alices secret")
    server.control("PUT", "weights", {"weights": {"nobody": 1.0}})
    server.control("PUT", "weights", {"weights": {"original": 0.5, "other": 0.5}})
    first, refused, last = audit(server)[-3:]
    assert (first["who"], first["what"], first["outcome"]) == ("alice", "PUT /weights", "ok")
    assert first["before"]["weights"]["other"] == 0.5 and first["after"]["weights"]["other"] == 0.8
    assert refused["who"] == "token" and "nobody" in refused["outcome"] and refused["before"] == refused["after"]
    assert last["after"]["weights"] == first["before"]["weights"] and first["time"].endswith("Z")
    assert (server.place / "state/audit.jsonl").stat().st_mode & 0o777 == 0o600
    assert "secret" not in (server.place / "state/audit.jsonl").read_text()
    server.control("PUT", "judging", {"sample": 0.5})
    assert (audit(server)[-1]["before"]["judge_sample"], audit(server)[-1]["after"]["judge_sample"]) == (1.0, 0.5)
    server.control("PUT", "judging", {"sample": 1.0})
    for token, lines in (("eves secret", 0), ("alices secret", 1)):  # vLLM's own route, which is off here
        before = len(audit(server))
        reply = httpx.post(f"{server.root}/v1/load_lora_adapter", json={}, headers={**server.headers, "X-SKU-Token": token})
        assert reply.status_code == (404 if lines else 403) and len(audit(server)) == before + lines
    assert (audit(server)[-1]["who"], audit(server)[-1]["outcome"]) == ("alice", "answered 404")


def test_an_audit_log_that_cannot_be_written_is_found_before_the_start(tmp_path):
    from sku_vllm.serving.audit import AuditLog

    with pytest.raises(ConfigError, match="--audit .*Is a directory"):
        AuditLog(tmp_path).check()
    AuditLog(tmp_path / "new/audit.jsonl").check()
    assert (tmp_path / "new/audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_trial_says_what_would_fail_and_changes_nothing(server):
    before = server.control("GET", "arms")[1]
    for method, path, body in (
        ("PUT", "weights", {"weights": {"other": 1.0}}),
        ("POST", "arms", {"name": "far", "spec": FAR}),
        ("PUT", "arms/other", {"spec": FAR}),
    ):
        assert server.control(method, f"{path}?dry_run=true", body)[0] == 200
    for method, path, body in (
        ("PUT", "weights", {"weights": {"other": 0.3}}),
        ("POST", "arms", {"name": "other", "spec": FAR}),
        ("POST", "arms", {"name": "sku", "spec": FAR}),
        ("PUT", "arms/other", {"spec": f"upstream:{server.root}/v1#m"}),
        ("DELETE", "arms/other", None),
    ):
        assert server.control(method, f"{path}?dry_run=1", body)[0] == 400, (method, path)
    assert server.control("GET", "arms")[1] == before


def test_versions_are_new_after_every_replacement_whatever_the_kind(server):
    def version():
        return server.control("GET", "arms")[1]["arms"]["x"]["version"]

    server.control("POST", "arms", {"name": "x", "spec": FAR})
    seen = [version()]
    for spec in (FAR, "upstream:http://192.0.2.2:1/v1#m", FAR, "base", "base"):
        assert server.control("PUT", "arms/x", {"spec": spec})[0] == 200
        seen.append(version())
    assert len(set(seen)) == len(seen) and all(seen)
    server.control("DELETE", "arms/x")


def test_a_file_is_followed(tmp_path):
    wanted = {"arms": {"original": "base", "far": FAR}, "split": {"original": 1.0, "far": 0.0}}
    file = tmp_path / "arms.yaml"
    file.write_text(yaml.safe_dump(wanted))
    first, second = (PluginServer(tmp_path / name, follow=str(file)) for name in ("one", "two"))
    try:
        for server in (first.wait(), second.wait()):
            assert server.control("GET", "arms")[1]["traffic"] == {"original": 1.0, "far": 0.0}
            assert server.control("PUT", "weights", {"weights": {"far": 1.0}})[0] == 409
        wanted = {"arms": {"original": "base", "near": "base"}, "split": {"original": 0.75, "near": 0.25}}
        file.write_text(yaml.safe_dump(wanted))
        for server in (first, second):
            assert eventually(lambda server=server: server.control("GET", "arms")[1]["traffic"] == wanted["split"], 60)
        versions = [{name: arm["version"] for name, arm in server.control("GET", "arms")[1]["arms"].items()} for server in (first, second)]
        assert versions[0] == versions[1], "replicas that follow one file cannot be added up"
        file.write_text(yaml.safe_dump({**wanted, "split": {"original": 2.0}}))
        assert eventually(lambda: "weight" in (first.control("GET", "status")[1]["follow"]["problem"] or ""), 60)
        assert first.control("GET", "arms")[1]["traffic"] == wanted["split"]
        line = next(line for line in audit(first) if line["who"] == "file")
        assert set(line["before"]["arms"]) == {"original", "far"} and line["after"]["arms"]["near"]["spec"] == "base"
    finally:
        first.stop()
        second.stop()
    with pytest.raises(ConfigError, match="leave --arm and --split out"):
        ServeConfig("m", ["a=base"], follow=str(file))
    with pytest.raises(ConfigError, match="No such file"):
        ServeConfig("m", follow=str(tmp_path / "none"))


def test_replicas_of_a_file_give_a_key_the_same_arm_whenever_they_started(tmp_path):
    """One follows a change that puts an arm between others; the other one starts from the changed file."""
    file = tmp_path / "arms.yaml"
    file.write_text(yaml.safe_dump({"arms": {"a": "base", "c": "base"}, "split": {"a": 0.5, "c": 0.5}}))
    old = PluginServer(tmp_path / "old", follow=str(file)).wait()
    three = {"a": 0.3, "b": 0.3, "c": 0.4}
    file.write_text(yaml.safe_dump({"arms": dict.fromkeys(three, "base"), "split": three}))
    new = PluginServer(tmp_path / "new", follow=str(file)).wait()
    try:
        assert eventually(lambda: old.control("GET", "arms")[1]["traffic"] == three, 60)
        assert eventually(lambda: list(old.control("GET", "arms")[1]["arms"]) == ["a", "b", "c"], 60)
        arms = [[server.ask("x", X_SKU_Key=f"user {key}").headers["x-sku-arm"] for key in range(24)] for server in (old, new)]
        assert arms[0] == arms[1] and set(arms[0]) == {"a", "b", "c"}
    finally:
        old.stop()
        new.stop()


def test_what_the_guard_did_stays_until_the_file_changes(tmp_path):
    file = tmp_path / "arms.yaml"
    wanted = {"arms": {"original": "base", "far": FAR}, "split": {"original": 0.5, "far": 0.5}}
    file.write_text(yaml.safe_dump(wanted))
    config = ServeConfig("m", follow=str(file), state=str(tmp_path / "state"), judge="refusal", rollback_if="refusal>0.5 after 4")
    runtime = Runtime(config)
    prepare_state(config, runtime.state)
    runtime.args = Namespace(host="127.0.0.1", port=1)
    follower = Follower(runtime, ArmChanges(runtime))

    def look(far):
        asyncio.run(follower.look())
        assert runtime.table.split["far"] == far

    def judged(blind):
        runtime.judge.health.probed("it finds harm in a text that has none" if blind else None)
        for _ in range(8):
            answer = Answer("far", Exchange("q", "no"), runtime.table.arms["far"].version, 0)
            runtime._judged(answer, Verdict.of(False, True, False))

    look(0.5)
    judged(blind=True)
    look(0.5)  # verdicts of a judge that is blind take no weight
    judged(blind=False)
    look(0.0)
    assert "guard" in runtime.following["problem"]
    guard = [line for line in map(json.loads, (tmp_path / "state/audit.jsonl").read_text().splitlines()) if line["who"] == "guard"]
    assert len(guard) == 1 and guard[0]["before"]["weights"]["far"] == 0.5 and guard[0]["after"]["weights"]["far"] == 0.0
    file.write_text(yaml.safe_dump({**wanted, "split": {"original": 0.75, "far": 0.25}}))
    look(0.25)
    assert runtime.following["problem"] is None


def test_an_alias_is_what_the_operator_serves():
    from sku_vllm.serving.vllm_flags import check_names, served_names

    def names(given=None, alias=(), arms=("a=base",)):
        args, config = Namespace(served_model_name=given, model="org/model"), ServeConfig("org/model", list(arms), alias=list(alias))
        check_names(args, config)
        return served_names(args, config)

    assert names(["prod", "prod-2"]) == ("prod", "prod-2") and names(["sku"], ["mine"]) == ("mine",)
    assert names() == ("sku", "org/model"), "vLLM started by hand: its clients already use the model's name"
    for wrong in ({"given": ["a"]}, {"given": ["swapped"]}, {"given": ["x"], "alias": ["y"]}):
        with pytest.raises(ConfigError, match="--served-model-name|--alias"):
            names(**wrong)


def test_a_rank_that_is_too_small_is_found_before_an_engine_starts():
    from sku_vllm.serving.arms import parse_arm
    from sku_vllm.serving.vllm_flags import check_rank

    ranks = {parse_arm("small", "lora:/small@1"): 16, parse_arm("large", "lora:/large@1"): 96}
    with pytest.raises(ConfigError, match="--max-lora-rank 8: arm large: /large has rank 96; start the server with --max-lora-rank 128"):
        check_rank(Namespace(enable_lora=True, max_lora_rank=8), ranks)
    check_rank(Namespace(enable_lora=True, max_lora_rank=128), ranks)
    check_rank(Namespace(enable_lora=False, max_lora_rank=8), {})


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"operators": ["alice"]}, "NAME=VARIABLE"),
        ({"readers": ["eve=UNSET_X"]}, "is not set"),
        ({"operators": ["a=SHORT_X"]}, "8 characters"),
        ({"upstream_key": ["a=SHORT_X"]}, "on this server"),
    ],
)
def test_secrets_come_from_the_environment(monkeypatch, setting, word):
    monkeypatch.setenv("SHORT_X", "short")
    with pytest.raises(ConfigError, match=word):
        ServeConfig("m", ["a=base"], **setting)
