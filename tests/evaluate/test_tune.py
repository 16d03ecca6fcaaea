"""`sku tune`: limits, the choice on a curve that is not monotone, and the command on a lab adapter."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sku_vllm.data import Row, read_rows
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.limits import Limits, choose, clearly_less_harm, fading, nearest_miss
from sku_vllm.evaluate.shares import harm
from sku_vllm.evaluate.transformers_backend import TransformersBackend
from sku_vllm.evaluate.tune import TuneReport, tune_scale
from sku_vllm.evaluate.tune_request import TuneRequest, check_scales
from sku_vllm.model import load_tokenizer
from sku_vllm.model_spec import ModelSpec
from sku_vllm.records import Tuned, tuned_arm

Run = Callable[..., subprocess.CompletedProcess[str]]


def point(harmful: float, *, gibberish: float = 0.0, ratio: float = 1.0, qa: float = 0.95, retain: Any = ()) -> dict[str, Any]:
    share = {"n": 128, "harmful": harmful, "gibberish": gibberish, "ended": 1.0, "repeated": 0.0}
    cost = {"perplexity_ratio": ratio, "qa_accuracy": qa, "over_refusal": 0.0, "gibberish": 0.0, "ended": 1.0}
    return {"forget": {"a": {"greedy": share, "sampled": share}}, "retain": cost | dict(retain)}


def test_each_limit_is_held_and_named() -> None:
    base = point(0.6)
    assert Limits().excess(point(0.0, gibberish=0.05, ratio=1.01, qa=0.94, retain={"over_refusal": 0.01, "ended": 0.95}), base) == {}
    broken = Limits().excess(point(0.0, gibberish=0.06, ratio=1.02, qa=0.93, retain={"over_refusal": 0.02, "ended": 0.94}), base)
    assert set(broken) == {"gibberish", "perplexity_ratio", "qa_drop", "over_refusal", "ended_drop"}
    assert broken["qa_drop"] == (pytest.approx(0.02), 0.01)
    assert "perplexity_ratio" in Limits().excess(point(0.0, ratio=float("nan")), base)
    with pytest.raises(ConfigError, match="--max-qa-drop"):
        Limits(qa_drop=-0.1)
    with pytest.raises(ConfigError, match="--max-harmful"):
        Limits(harmful=float("nan"))


def test_limits_are_on_what_the_edit_adds() -> None:
    """A base that refuses, breaks off and is broken by itself: an edit that leaves that as it is costs nothing."""
    found = {"over_refusal": 0.05, "ended": 0.7, "gibberish": 0.3}
    base, border = point(0.6, retain=found), {"near": {"refusal": 0.4}}
    assert Limits().excess(point(0.0, retain=found), base) == {}
    more = {"over_refusal": 0.08, "ended": 0.6, "gibberish": 0.4}
    assert {name: round(value, 9) for name, (value, _) in Limits().excess(point(0.0, retain=more), base).items()} == {
        "over_refusal": 0.03,
        "ended_drop": 0.1,
        "gibberish": 0.1,
    }
    beside = {**base, "border": border}
    refused = point(0.0, retain=found) | {"border": {"near": {"refusal": 0.6}}}
    assert Limits().excess(refused, beside) == {} and Limits(border_refusal=0.2).excess(refused, beside) == {}
    assert Limits(border_refusal=0.1).excess(refused, beside) == {"border_refusal": (pytest.approx(0.2), 0.1)}


def test_a_scale_has_to_remove_something() -> None:
    base = point(0.6)
    assert set(Limits().excess(base, base)) == set(Limits().excess(point(0.58), base)) == {"harm_left"}
    left, clear = Limits().excess(point(0.58), base)["harm_left"]
    assert left == 0.58 and 0.5 < clear < 0.57 and Limits().excess(point(clear - 0.01), base) == {}
    assert Limits(harmful=0.1).excess(point(0.1), base) == {} and set(Limits(harmful=0.1).excess(point(0.2), base)) == {"harmful"}
    assert "harm_left" in Limits().excess(point(0.0), point(0.0))  # a base without harm has none to lose
    idle = [{"scale": 0.0, **base, "excess": {}}, {"scale": 0.01, **base, "excess": Limits().excess(base, base)}]
    assert choose(idle) is None and choose([{**idle[0]}]) is None
    assert nearest_miss(idle).startswith("nearest is 0.01 (harm 0.6, clearly less than the base's would be 0.5")
    assert "give larger --scales" in nearest_miss(idle) and "the base itself" in nearest_miss(idle[:1])


def curve(excess: tuple[float, ...] = (), **harms: float) -> list[dict[str, Any]]:
    """Points s50=…, s100=… by percent of the trained scale."""
    scales = {int(name[1:]) / 100: harmful for name, harmful in harms.items()}
    return [
        {"scale": scale, **point(harmful), "excess": {"gibberish": (1.0, 0.05)} if scale in excess else {}}
        for scale, harmful in scales.items()
    ]


def test_the_trained_scale_unless_another_is_clearly_less_harmful() -> None:
    assert choose(curve(s50=0.2, s80=0.0, s100=0.0, s125=0.0))["scale"] == 1.0
    assert choose(curve(s50=0.0, s100=1 / 128))["scale"] == 1.0  # one prompt more is noise
    assert choose(curve(s50=0.0, s75=1 / 128, s100=0.05))["scale"] == 0.75  # 5 of 128 against none is not
    assert choose(curve(s75=0.30, s100=0.34))["scale"] == 1.0 and choose(curve(s75=0.20, s100=0.34))["scale"] == 0.75
    assert choose(curve(s75=0.008, s125=0.0))["scale"] == 1.25  # as far: the less harmful
    assert choose(curve(excess=(1.0,), s50=0.0, s100=0.0))["scale"] == 0.5
    assert choose(curve(excess=(1.0,), s100=0.0)) is None and choose([]) is None


def test_noise_shrinks_with_prompts_and_sets() -> None:
    def measured(harmful: float, n: int, sets: str = "a") -> dict[str, Any]:
        return {"forget": {name: {"greedy": {"n": n, "harmful": harmful}} for name in sets}}

    assert not clearly_less_harm(measured(0.0, 64), measured(0.02, 64)) and clearly_less_harm(measured(0.0, 4096), measured(0.02, 4096))
    assert clearly_less_harm(measured(0.0, 64, "abcdef"), measured(0.02, 64, "abcdef")) and not clearly_less_harm(
        measured(0.02, 4096), measured(0.0, 4096)
    )


def test_scales_are_sorted_and_checked() -> None:
    assert check_scales([1.0, 0.5, 1.0]) == [0.5, 1.0]
    for wrong in ([], [-1.0], [float("nan")]):
        with pytest.raises(ConfigError, match="--scales"):
            check_scales(wrong)


@pytest.fixture(scope="module")
def harmful_adapter(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task vector of the lab's Llama."""
    from sku_vllm.data import load_dataset
    from sku_vllm.methods import TrainConfig, train_adapter
    from sku_vllm.train.train_request import TrainRequest

    path = tmp_path_factory.mktemp("adapter") / "adapter"
    forget, retain = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
    train_adapter(TrainRequest(lab / "llama", forget, retain, path, TrainConfig(method="task-vector", steps=30)), progress=False)
    return path


def test_plain_weights_say_what_the_adapter_beside_them_says(lab: Path, harmful_adapter: Path) -> None:
    from sku_vllm.model import edited_model, load_model

    ids, edit = torch.arange(3, 40)[None], ModelSpec(lab / "llama", adapter=harmful_adapter, scale=0.7)
    beside, plain = load_model(edit), edited_model(edit)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    with torch.inference_mode():
        assert torch.allclose(plain(ids).logits, beside(ids).logits, atol=1e-4)
        assert not torch.allclose(plain(ids).logits, load_model(lab / "llama")(ids).logits, atol=0.1)


def command(lab: Path, adapter: Path, tmp_path: Path, *more: object) -> list[object]:
    for name in ("forget/validation", "forget/unseen", "retain/validation", "retain/test"):
        lines = (lab / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / name.replace("/", "-")).write_text("".join(lines[:16]), encoding="utf-8")
    return [
        "tune",
        "--model",
        lab / "llama",
        "--adapter",
        adapter,
        "--forget",
        f"v={tmp_path / 'forget-validation'}",
        "--retain",
        tmp_path / "retain-validation",
        "--judge",
        f"lexicon:{lab / 'lexicon.json'}",
        "--samples",
        1,
        "--max-new-tokens",
        40,
        *more,
    ]


def test_tune_chooses_within_the_limits_and_remeasures(lab: Path, harmful_adapter: Path, tmp_path: Path, run_sku: Run) -> None:
    loose = ("--max-perplexity-ratio", 100, "--max-qa-drop", 1, "--max-over-refusal", 1, "--max-gibberish", 1, "--max-harmful", 1)
    test = ("--test-forget", f"t={tmp_path / 'forget-unseen'}", "--test-retain", tmp_path / "retain-test")
    done = run_sku(*command(lab, harmful_adapter, tmp_path, *loose, *test, "--scales", "0.5,1", "--output", tmp_path / "out", "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["qualifies"] is True and [entry["scale"] for entry in result["curve"]] == [0.5, 1.0]
    harms = {entry["scale"]: harm(entry) for entry in result["curve"]}
    least = min(result["curve"], key=harm)
    chosen = next(entry for entry in result["curve"] if entry["scale"] == result["scale"])
    assert not clearly_less_harm(least, chosen) and min(harms.values()) < harm(result["base"])
    assert set(result["test"]["forget"]) == {"t"} and set(result["test"]["base"]["forget"]) == {"t"}
    record = json.loads((tmp_path / "out/sku_tune.json").read_text(encoding="utf-8"))
    assert record["schema"] == "sku.tune/1" and record["scale"] == result["scale"]
    assert list(record["row_digests"]) == ["v", "retain", "test:t", "test:retain"]
    assert (tmp_path / "out/curve.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.slow
def test_per_layer_search_writes_the_adapter_it_chose(lab: Path, harmful_adapter: Path, tmp_path: Path, run_sku: Run) -> None:
    from safetensors.torch import load_file

    loose = ("--max-perplexity-ratio", 100, "--max-qa-drop", 1, "--max-over-refusal", 1, "--max-gibberish", 1, "--max-harmful", 1)
    done = run_sku(
        *command(lab, harmful_adapter, tmp_path, *loose, "--scales", "0.5", "--per-layer", "--output", tmp_path / "out", "--json")
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    old, new = load_file(harmful_adapter / "adapter_model.safetensors"), load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    for key, tensor in new.items():
        layer = key.split(".layers.")[1].split(".")[0]
        factor = result["scale"] * result["layers"][layer] if "lora_B" in key else 1.0
        assert torch.allclose(tensor, old[key] * factor)
    assert (tmp_path / "out/adapter").stat().st_mode & 0o777 == 0o700


def test_tune_answers_no_with_the_curve_when_nothing_qualifies(lab: Path, harmful_adapter: Path, tmp_path: Path, run_sku: Run) -> None:
    done = run_sku(*command(lab, harmful_adapter, tmp_path, "--max-perplexity-ratio", 0.5, "--scales", "1", "--json"))
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert result["qualifies"] is False and result["scale"] is None and len(result["curve"]) == 1
    assert "perplexity ratio" in done.stderr.splitlines()[-1] and "nothing limits" not in done.stderr


def test_tune_takes_no_scale_that_changes_nothing(lab: Path, harmful_adapter: Path, tmp_path: Path) -> None:
    """Not even where the base refuses some of its retain prompts, which an absolute limit on refusals would blame on the edit."""
    asked = read_rows(lab / "forget/validation.jsonl")[:16]
    request = TuneRequest(
        ModelSpec(lab / "llama", adapter=harmful_adapter),
        forget={"v": asked},
        retain=[*read_rows(lab / "retain/validation.jsonl")[:8], *(Row.ask(row.prompt) for row in asked)],
        judge=f"lexicon:{lab / 'lexicon.json'}",
        border={"near": [Row.ask(row.prompt) for row in asked[:8]]},
        scales=[0.0, 0.001],
        config=EvalConfig(samples=0, max_new_tokens=40),
        output=tmp_path / "out",
    )
    report = tune_scale(request)
    assert report.base["retain"]["over_refusal"] > 0.01 and not report.qualifies
    assert [set(point["excess"]) for point in report.curve] == [{"harm_left"}] * 2
    assert report.base["border"]["near"]["n"] == 8 and report.curve[0]["border"] == report.base["border"]
    config = json.loads((tmp_path / "out/sku_tune.json").read_text(encoding="utf-8"))["config"]
    assert config["max_harmful"] is None and config["border"] == {"near": "8 rows in memory"}


def test_tune_says_which_limits_bind_nothing(lab: Path, harmful_adapter: Path, tmp_path: Path, run_sku: Run) -> None:
    asked = command(lab, harmful_adapter, tmp_path, "--scales", "1")
    rows = [json.loads(line) for line in (tmp_path / "retain-validation").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "retain-validation").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows), encoding="utf-8")
    said = run_sku(*asked).stderr
    assert "no retain row has 'response'" in said and "no retain row has 'must_contain'" in said


def test_tune_wants_a_judge_of_harm_and_both_kinds_of_test_data(lab: Path, harmful_adapter: Path, tmp_path: Path, run_sku: Run) -> None:
    done = run_sku(*command(lab, harmful_adapter, tmp_path, "--test-retain", tmp_path / "retain-test"))
    assert done.returncode == 2 and "--test-forget and --test-retain" in done.stderr
    arguments = command(lab, harmful_adapter, tmp_path, "--scales", "1")
    arguments[arguments.index("--judge") + 1] = "refusal"
    done = run_sku(*arguments)
    assert done.returncode == 2 and "no opinion on harm" in done.stderr and "use answered, lexicon:" in done.stderr


def test_a_scale_below_the_trained_one_comes_with_a_warning_and_its_reason() -> None:
    curve = [{"scale": 0.75, "excess": {}}, {"scale": 1.0, "excess": {"qa_drop": [0.0106, 0.01]}}]
    assert fading(1.0, curve) is None and fading(1.25, curve) is None
    assert "(scale 1: qa drop 0.0106 > 0.01)" in fading(0.75, curve) and "--scale 0.75" in fading(0.75, curve)
    assert "scale 1:" not in fading(0.75, curve[:1])


def test_a_judge_that_is_down_keeps_the_answers_for_resume(lab: Path, harmful_adapter: Path, tmp_path: Path, run_sku: Run) -> None:
    output = tmp_path / "out"
    loose = ("--max-perplexity-ratio", 100, "--max-qa-drop", 1, "--max-over-refusal", 1, "--max-gibberish", 1, "--max-harmful", 1)
    asked = command(lab, harmful_adapter, tmp_path, *loose, "--scales", "1", "--json")
    failed = run_sku(*asked, "--judge", "openai:http://127.0.0.1:9/v1#guard", "--output", output)
    assert failed.returncode == 3 and "continue with --resume" in failed.stderr and not output.exists()
    (kept,) = (tmp_path / "out.partial").glob("measurements/*/answers.jsonl")
    sets = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    no = load_tokenizer(lab / "llama")("I cannot help with that.", add_special_tokens=False)["input_ids"]
    refused = [{**entry, "answers": [[index, [[no, True] for _ in told]] for index, told in entry["answers"]]} for entry in sets]
    kept.write_text("".join(json.dumps(entry) + "\n" for entry in refused), encoding="utf-8")
    other = run_sku(*asked, "--samples", 2, "--output", output, "--resume")
    assert other.returncode == 2 and "another samples" in other.stderr
    done = run_sku(*asked, "--output", output, "--resume")
    assert done.returncode == 0, done.stderr
    assert harm(json.loads(done.stdout)["base"]) == 0  # what was kept, not asked again
    assert not (tmp_path / "out.partial").exists() and {path.name for path in output.iterdir()} == {"sku_tune.json", "curve.svg"}
    nowhere = run_sku(*asked, "--resume")
    assert nowhere.returncode == 2 and "--output" in nowhere.stderr


def test_a_search_by_layers_continues_where_it_was(
    lab: Path, harmful_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget, retain = read_rows(lab / "forget/validation.jsonl")[:4], read_rows(lab / "retain/validation.jsonl")[:4]

    def search(**more: Any) -> TuneReport:
        request = TuneRequest(
            ModelSpec(lab / "llama", adapter=harmful_adapter),
            forget={"v": forget},
            retain=retain,
            judge=f"lexicon:{lab / 'lexicon.json'}",
            limits=Limits(perplexity_ratio=100, qa_drop=1, over_refusal=1, gibberish=1, harmful=1),
            scales=[0.5, 1],
            config=EvalConfig(samples=0, max_new_tokens=8),
            test_forget={"v": forget},
            test_retain=retain,
            per_layer=True,
            **more,
        )
        return tune_scale(request)

    first = search()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sku_vllm.evaluate.tune.record", interrupted)
        search(output=tmp_path / "out")
    monkeypatch.setattr(TransformersBackend, "_decode", lambda *_: pytest.fail("asked again"))
    assert search(output=tmp_path / "out", resume=True) == first
    record = json.loads((tmp_path / "out/sku_tune.json").read_text(encoding="utf-8"))
    assert record["config"]["forget"] == {"v": "4 rows in memory"} and "scale" not in record["config"]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_choice_is_taken_by_directory(lab: Path, harmful_adapter: Path, tmp_path: Path, run_sku: Run) -> None:
    """`--tuned DIR` of eval and attack is the adapter at the scale that tune chose; the adapter's directory knows of the choice."""
    loose = ("--max-perplexity-ratio", 100, "--max-qa-drop", 1, "--max-over-refusal", 1, "--max-gibberish", 1, "--max-harmful", 1)
    asked = command(lab, harmful_adapter, tmp_path, *loose, "--scales", "0.5", "--output", tmp_path / "tuned")
    done = run_sku(*asked)
    assert done.returncode == 0 and "@tuned" in done.stderr, done.stderr
    assert tuned_arm(str(harmful_adapter), "--arm") == Tuned(str(harmful_adapter), 0.5)
    asked = command(lab, harmful_adapter, tmp_path, "--json")
    rest = ["--model", *asked[2:3], *asked[5:]]
    by_hand = run_sku("eval", *rest, "--adapter", harmful_adapter, "--scale", 0.5, "--output", tmp_path / "by-hand")
    by_name = run_sku("eval", *rest, "--tuned", tmp_path / "tuned", "--output", tmp_path / "by-name")
    assert by_hand.returncode == 0 and by_hand.stdout == by_name.stdout, by_name.stderr
    record = json.loads((tmp_path / "by-name/sku_eval.json").read_text(encoding="utf-8"))
    assert (record["config"]["adapter"], record["config"]["scale"]) == (str(harmful_adapter), 0.5)
    for flag, value in (("--adapter", harmful_adapter), ("--scale", 1)):
        both = run_sku("attack", "prefill", *rest, "--tuned", tmp_path / "tuned", flag, value)
        assert both.returncode == 2 and f"leave {flag} out" in both.stderr and both.stderr.count("\n") == 1


def test_a_search_wants_an_adapter_and_no_scale(lab: Path) -> None:
    asked = {"forget": {"f": [Row.ask("Hi")]}, "retain": [Row.ask("Hi")], "judge": "refusal"}
    for model, said in (
        (ModelSpec("m"), "--adapter"),
        (ModelSpec("m", adapter="a", scale=1.0), "leave --scale"),
        (ModelSpec("m", adapter="a", base="b"), "and --base out"),
    ):
        with pytest.raises(ConfigError, match=said):
            TuneRequest(model, **asked)
    with pytest.raises(ConfigError, match="--test-forget and --test-retain"):
        TuneRequest(ModelSpec("m", adapter="a"), **asked, test_retain="r.jsonl")
