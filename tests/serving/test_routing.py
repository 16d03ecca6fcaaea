"""Arms, splits and sticky keys: pure functions, so held exactly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sku_vllm.errors import AdapterError, ConfigError
from sku_vllm.serving.arms import Arm, parse_arms, parse_split
from sku_vllm.serving.rollback import parse_rule, without
from sku_vllm.serving.routing import choose_arm, sticky_point
from sku_vllm.serving.serve_config import ServeConfig, read_config


def test_sticky_points_are_those_of_sha256_everywhere():
    # sha256("user-1") begins ec6fcd…; fixed numbers, so that no later version moves anybody
    import hashlib

    for key in ("user-1", "", "ключ", "\ud800"):
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        assert sticky_point(key) == int.from_bytes(digest[:8], "big") // 2**11 / 2**53
    assert 0 <= sticky_point("x") < 1


def test_the_split_is_kept_and_raising_a_canary_keeps_who_was_in_it():
    keys = [f"user-{number}" for number in range(20_000)]
    before = {key: choose_arm({"original": 0.9, "negated": 0.1}, key) for key in keys}
    after = {key: choose_arm({"original": 0.7, "negated": 0.3}, key) for key in keys}
    for split, share in ((before, 0.1), (after, 0.3)):
        assert abs(sum(arm == "negated" for arm in split.values()) / len(keys) - share) < 0.01
    assert all(after[key] == "negated" for key, arm in before.items() if arm == "negated")


@settings(deadline=None)  # a busy machine is slow, which is no failure
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.text(max_size=8))
def test_an_arm_of_weight_zero_is_never_chosen(parts, key):
    split = {f"arm{number}": part / sum(parts) for number, part in enumerate(parts)}
    assert split[choose_arm(split, key)] > 0
    assert split[choose_arm(split)] > 0


def test_arms_are_read_as_written():
    arms = parse_arms(["original=base", "negated=lora:dir@1/adapter@0.704", "other=upstream:http://host:1/v1#org/model"])
    assert arms["negated"].source == "dir@1/adapter" and arms["negated"].scale == 0.7
    assert (arms["other"].source, arms["other"].model) == ("http://host:1/v1", "org/model")
    assert [arm.spec for arm in arms.values()] == ["base", "lora:dir@1/adapter@0.7", "upstream:http://host:1/v1#org/model"]


def test_an_adapter_in_a_directory_with_an_at_sign_is_found_and_named_so_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harm@2").mkdir()
    assert [parse_arms(["a=lora:harm@2@0.5"])["a"].source, parse_arms(["a=lora:none@2"])["a"].source] == ["harm@2", "none"]
    (tmp_path / "harm").mkdir()
    with pytest.raises(ConfigError, match="lora:harm@2@1 .* lora:harm/@2 "):
        parse_arms(["a=lora:harm@2"])
    for spec, source, scale in (("lora:harm@2@1", "harm@2", 1.0), ("lora:harm/@2", "harm/", 2.0), ("lora:harm@1", "harm", 1.0)):
        arm = parse_arms([f"a={spec}"])["a"]
        assert (arm.source, arm.scale) == (source, scale)
        assert parse_arms([f"a={arm.spec}"])["a"] == arm
    chosen = Arm("a", "lora", "harm", 2.0)  # as after @tuned, where nobody wrote the number
    assert (tmp_path / parse_arms([f"a={chosen.spec}"])["a"].source).samefile("harm")


@pytest.mark.parametrize(
    "specs, word",
    [
        ([], "no arms"),
        (["a"], "NAME="),
        (["a=base", "a=base"], "twice"),
        (["A=base"], "name"),
        (["../a=base"], "name"),
        (["sku=base"], "reserved"),
        (["a=bas"], "base"),
        (["a=lora:x"], "scale"),
        (["a=lora:x@-1"], "between"),
        (["a=lora:x@nan"], "between"),
        (["a=lora:x@ten"], "number"),
        (["a=upstream:host#m"], "upstream:http"),
        ([f"a{n}=base" for n in range(33)], "at most 32"),
        (["a" * 49 + "=base"], "name"),
    ],
)
def test_arms_that_make_no_sense_are_refused(specs, word):
    with pytest.raises(ConfigError, match=word):
        parse_arms(specs)


@pytest.mark.parametrize(
    "text, word",
    [
        ("a=0.5,b=0.6", "sum to 1.1"),
        ("a=1,c=0", "unknown arm 'c'"),
        ("a=2,b=-1", "between"),
        ("a=1,a=0", "once"),
        ("a", "NAME=WEIGHT"),
        ("a=nan,b=1", "between"),
    ],
)
def test_splits_that_make_no_sense_are_refused(text, word):
    with pytest.raises(ConfigError, match=word):
        parse_split(text, ["a", "b"])


def test_without_a_split_arms_share_equally_and_declared_order_holds():
    assert parse_split(None, ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert list(parse_split("b=0.25,a=0.75", ["a", "b"])) == ["a", "b"]
    assert parse_split("b=1", ["a", "b"]) == {"a": 0.0, "b": 1.0}


def test_a_configuration_file_says_the_same_as_flags(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\narms: {original: base, negated: 'lora:x@1'}\nsplit: {original: 0.9, negated: 0.1}\njudge-sample: 0.5\n")
    config = read_config(file)
    assert config.parsed_split() == {"original": 0.9, "negated": 0.1} and config.judge_sample == 0.5
    config.dump(file)
    assert read_config(file) == config and file.stat().st_mode & 0o777 == 0o600
    file.write_text("model: m\narms: {original: base}\njudge_sampel: 1\n")
    with pytest.raises(ConfigError, match="judge_sample"):
        read_config(file)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"judge_sample": 2.0}, "judge-sample"),
        ({"token": "short"}, "8 characters"),
        ({"shadow": "b=0.5"}, "shadow"),
        ({"shadow": "a=0"}, "shadow"),
        ({"rollback_if": "harm>1"}, "rollback-if"),
        ({"rollback_if": "harmful>0.05 after 200"}, "needs --judge"),
        ({"judge_queue": 0}, "judge-queue"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, word):
    with pytest.raises(ConfigError, match=word):
        ServeConfig("m", ["a=base"], **change)


def test_a_rule_reads_as_written_and_the_weight_goes_to_the_others():
    rule = parse_rule("harmful>0.05 after 200")
    assert (rule.what, rule.limit, rule.after) == ("harmful", 0.05, 200)
    assert without({"a": 0.6, "b": 0.2, "c": 0.2}, "c") == {"a": pytest.approx(0.75), "b": pytest.approx(0.25), "c": 0.0}
    assert without({"a": 0.0, "c": 1.0}, "c") == {"a": 1.0, "c": 0.0}
    assert without({"c": 1.0}, "c") == {"c": 1.0}


def test_a_state_that_was_moved_or_emptied_finds_its_adapters_again(tiny, tmp_path):
    import shutil
    from pathlib import Path

    from sku_vllm.serving.initial_state import prepare_state
    from sku_vllm.serving.state import StateFile

    adapter = shutil.copytree(tiny / "adapter", tmp_path / "adapter")

    def begin(place):
        arms = ["original=base", f"negated=lora:{adapter}@0.7"]
        return prepare_state(ServeConfig(str(tiny / "base"), arms, state=str(place)), StateFile(place)).arms["negated"]

    first = begin(tmp_path / "here")
    assert begin(tmp_path / "here") == first
    (tmp_path / "here").rename(tmp_path / "there")
    adapter.rename(tmp_path / "away")  # a moved state needs the raw adapter no more
    moved = begin(tmp_path / "there")
    assert Path(moved.path).is_dir() and Path(moved.path).is_relative_to(tmp_path / "there") and moved.lora_id == first.lora_id
    shutil.rmtree(tmp_path / "there/adapters")
    with pytest.raises(AdapterError, match="--arm negated|no such adapter"):
        begin(tmp_path / "there")
    (tmp_path / "away").rename(adapter)
    again = begin(tmp_path / "there")
    assert again == moved and (Path(again.path) / "adapter_model.safetensors").is_file()


def test_a_port_that_is_taken_is_said_before_the_engine_starts(tiny, run_sku):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_sku("serve", "--model", tiny / "base", "--arm", "a=base", "--port", port)
    assert done.returncode == 2 and f"--port {port}" in done.stderr and "Traceback" not in done.stderr


def test_a_state_begun_with_other_flags_wants_a_decision(tmp_path):
    from sku_vllm.serving.initial_state import prepare_state
    from sku_vllm.serving.state import StateFile

    def begin(*arms, split=None, reset=False):
        return prepare_state(ServeConfig("m", list(arms), split, state=str(tmp_path), reset_state=reset), StateFile(tmp_path))

    first = begin("a=base", "b=upstream:http://h:1/v1#m", split="a=0.9,b=0.1")
    StateFile(tmp_path).write(first.changed(split={"a": 0.5, "b": 0.5}))
    again = begin("a=base", "b=upstream:http://h:1/v1#m", split="a=0.9,b=0.1")
    assert again.split == {"a": 0.5, "b": 0.5}  # the same flags: the state wins
    assert begin("a=base", "b=upstream:http://h:1/v1#m", split="a=0.5,b=0.5").split == again.split  # flags that say what is
    with pytest.raises(ConfigError, match="--reset-state"):
        begin("a=base", "b=upstream:http://h:1/v1#m", split="a=0.2,b=0.8")
    assert begin("a=base", reset=True).split == {"a": 1.0}
    assert (tmp_path / "sku_state.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "sku_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="--reset-state"):
        begin("a=base")


@pytest.fixture
def tuned(tmp_path):
    """An adapter for which `sku tune` chose 0.75, and tune's output."""
    import json

    from sku_vllm.records import note_tuned

    adapter, output = tmp_path / "adapter", tmp_path / "tune"
    adapter.mkdir()
    output.mkdir()
    (output / "sku_tune.json").write_text(json.dumps({"schema": "sku.tune/1", "scale": 0.75, "config": {"adapter": str(adapter)}}))
    note_tuned(adapter, output)
    return adapter, output


def test_a_tuned_arm_holds_the_number_and_never_the_word(tuned, tmp_path):
    adapter, output = tuned
    for place in (adapter, output):
        config = ServeConfig("m", ["original=base", f"negated=lora:{place}@tuned"])
        assert config.arms == ["original=base", f"negated=lora:{adapter}@0.75"]
        assert config.parsed_arms()["negated"].spec == f"lora:{adapter}@0.75"
    (tmp_path / "serve.yaml").write_text(f"model: m\narms: {{negated: 'lora:{adapter}@tuned'}}\n")
    config = read_config(tmp_path / "serve.yaml")
    config.dump(tmp_path / "serve.yaml")
    assert (
        "tuned" not in (tmp_path / "serve.yaml").read_text().replace(str(tmp_path), "") and read_config(tmp_path / "serve.yaml") == config
    )
    for untuned in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=f"--arm x=lora:{untuned}@tuned: sku tune has chosen no scale"):
            ServeConfig("m", [f"x=lora:{untuned}@tuned"])


def test_ctl_looks_the_scale_up_in_this_shell(tuned, monkeypatch):
    from sku_vllm.cli.ctl import request_of

    adapter, output = tuned
    monkeypatch.chdir(adapter.parent)
    arm = ("PUT", "arms/negated", {"spec": f"lora:{adapter}@0.75"})
    assert request_of("replace", ("negated=lora:adapter@tuned",)) == request_of("replace", (f"negated=lora:{output}@tuned",)) == arm
    assert request_of("add", ("x=lora:adapter@0.5",))[2] == {"name": "x", "spec": f"lora:{adapter}@0.5"}
    assert request_of("swap", ("adapter@tuned",)) == ("POST", "swap", {"adapter": str(adapter), "scale": 0.75})
    with pytest.raises(ConfigError, match="sku ctl negated=lora:none@tuned: sku tune has chosen no scale for none"):
        request_of("replace", ("negated=lora:none@tuned",))


def test_serve_refuses_an_arm_nobody_tuned_in_one_line(tiny, run_sku):
    done = run_sku("serve", "--model", tiny / "base", "--arm", f"a=lora:{tiny}/adapter@tuned")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "sku tune has chosen no scale" in done.stderr, done.stderr
