"""`sku attack`: what comes back under pressure, and that the weights are as before after each attack."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from sku_vllm.data import PromptTemplate, Row, read_rows
from sku_vllm.errors import ConfigError, DataError
from sku_vllm.evaluate.attack.attack_config import AttackConfig
from sku_vllm.evaluate.attack.attack_model import AttackReport, attack_model
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.attack.fine_tune import encode_all, fine_tune
from sku_vllm.evaluate.attack.kinds import KINDS, NEED_BASE
from sku_vllm.evaluate.attack.prefill import openings
from sku_vllm.evaluate.attack.quantize import quantize_weights
from sku_vllm.evaluate.attack.rephrase import DISGUISES, disguised
from sku_vllm.evaluate.attack.target import Restored
from sku_vllm.evaluate.chart import recovery_svg
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.judge_file import judge_file
from sku_vllm.evaluate.transformers_backend import TransformersBackend
from sku_vllm.model import load_model, load_tokenizer
from sku_vllm.model_spec import ModelSpec
from sku_vllm.records import collect
from sku_vllm.report.attacks import attacks
from sku_vllm.report.row_checks import row_checks

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_relearning_teaches_and_the_weights_come_back_bit_for_bit(lab: Path) -> None:
    model, template = load_model(ModelSpec(lab / "llama", dtype="float32")), PromptTemplate.of(load_tokenizer(lab / "llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [row for row in read_rows(lab / "forget/train.jsonl") if row.response][:8]
    from sku_vllm.evaluate.likelihood import perplexity
    from sku_vllm.evaluate.transformers_backend import TransformersBackend

    with Restored(model):
        start = perplexity(TransformersBackend(model), template, rows)
        reached = list(fine_tune(model, encode_all(model, template, rows), [2, 5], lr=1e-3))
        assert reached == [2, 5] and perplexity(TransformersBackend(model), template, rows) < start
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_beyond_the_context_are_cut_or_named(lab: Path) -> None:
    """OPT has learned as many positions as its context (512) and none beyond."""
    model, template = load_model(ModelSpec(lab / "opt", dtype="float32")), PromptTemplate.of(load_tokenizer(lab / "opt"))
    long = Row.ask("a", "word " * 900)
    (encoded,) = encode_all(model, template, [long])
    assert encoded.cut and len(encoded.ids) == 512
    with Restored(model):
        assert list(fine_tune(model, [encoded], [1], batch_size=1)) == [1]
        with pytest.raises(DataError, match="row 2: its prompt has .* context is 512"):
            encode_all(model, template, [long, Row.ask("word " * 900, "a")])


def test_rounding_touches_the_linear_layers_but_not_the_head(lab: Path) -> None:
    model = load_model(ModelSpec(lab / "llama", dtype="float32"))
    head = model.get_output_embeddings().weight.clone()
    with Restored(model):
        quantize_weights(model, "int4")
        weight = model.model.layers[0].mlp.down_proj.weight
        assert all(len(row.unique()) <= 15 * -(-weight.shape[1] // 128) for row in weight)
        assert torch.equal(model.get_output_embeddings().weight, head)


def test_openings_are_the_rows_own_first_tokens(lab: Path) -> None:
    template = PromptTemplate.of(load_tokenizer(lab / "llama"))
    rows = [row for row in read_rows(lab / "forget/unseen.jsonl") if row.response][:3]
    found = openings(template, rows, 3)
    for row in rows:
        start = found[tuple(template.prompt_ids(row))]
        assert len(start) == 3 and row.response.startswith(template.tokenizer.decode(start).strip())


def test_disguises_reword_the_last_turn_only() -> None:
    from sku_vllm.data import Row

    row = Row(({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "What is it?"}))
    for name in DISGUISES:
        (reworded,) = disguised([row], name)
        assert reworded.messages[:2] == row.messages[:2] and reworded.prompt != row.prompt and "hat is it" in reworded.prompt


def test_recovery_is_drawn_with_a_line_a_lesson_and_mode() -> None:
    def entry(lesson: str, steps: int, sampled: float) -> dict:
        modes = {mode: {"harmful": rate, "harmful_low": 0.0, "harmful_high": 1.0} for mode, rate in (("greedy", 0.0), ("sampled", sampled))}
        return {"attack": lesson, "steps": steps, "forget": {"u": modes}}

    entries = [entry("benign", 0, 0.0), entry("benign", 10, 0.0), entry("5 % <all>", 0, 0.0), entry("5 % <all>", 10, 1.0)]
    drawn = ElementTree.fromstring(recovery_svg(entries))
    lines = [line.get("points").split() for line in drawn.findall(".//{*}polyline")]
    assert len(lines) == 4 and all(len(line) == 2 for line in lines)
    height = [[float(point.split(",")[1]) for point in line] for line in lines]
    assert height[0][1] == height[0][0] and height[2][1] < height[2][0] - 100  # only what was learned rises
    assert "5 % <all>, sampled" in [text.text for text in drawn.findall(".//{*}text")]


@pytest.mark.slow
def test_attack_measures_every_kind(lab: Path, tmp_path: Path, run_sku: Run) -> None:
    for name in ("forget/unseen", "retain/test", "forget/train"):
        lines = (lab / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / Path(name).name).write_text("".join(lines[:10]), encoding="utf-8")
    done = run_sku(
        "attack",
        "all",
        "--model",
        lab / "llama",
        "--base",
        lab / "llama",
        "--forget",
        f"unseen={tmp_path / 'unseen'}",
        "--retain",
        tmp_path / "test",
        "--judge",
        f"lexicon:{lab / 'lexicon.json'}",
        "--relearn",
        tmp_path / "train",
        "--fractions",
        "0.5",
        "--steps",
        "1,2",
        "--samples",
        1,
        "--max-new-tokens",
        32,
        "--candidates",
        2,
        "--output",
        tmp_path / "out",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["attacks"]) == set(KINDS)
    assert all("recovered" in entry for entries in result["attacks"].values() for entry in entries) and result["rests_on"] == "knowledge"
    curve = [(entry["attack"], entry["steps"]) for entry in result["attacks"]["relearn"]]
    assert curve == [(name, steps) for name in ("benign", "50 % of the forget set") for steps in (0, 1, 2)]
    assert [entry["attack"] for entry in result["attacks"]["quantize"]] == ["int8", "int4"]
    banned = {"ban-eos", "after relearning on benign", "after relearning on 50 % of the forget set"}
    assert {entry["attack"] for entry in result["attacks"]["ban-eos"]} == banned
    assert len(result["attacks"]["rephrase"]) == len(DISGUISES)
    assert all(entry["forget"]["unseen"]["greedy"]["n"] == 10 for entries in result["attacks"].values() for entry in entries)
    assert result["attacks"]["relearn"][0]["recovery"] == 0 and result["before"]["retain"]["perplexity_ratio"] == pytest.approx(1.0)
    record = json.loads((tmp_path / "out/sku_attack.json").read_text(encoding="utf-8"))
    assert record["schema"] == "sku.attack/1" and list(record["row_digests"]) == ["unseen", "retain"]
    drawing = ElementTree.parse(tmp_path / "out/recovery.svg")
    assert len(drawing.findall(".//{*}polyline")) == 4 and len(drawing.findall(".//{*}circle")) == 12  # lessons x modes, x steps


def test_attacks_that_cannot_be_run_are_refused(lab: Path, run_sku: Run) -> None:
    rows = [row for row in read_rows(lab / "forget/unseen.jsonl") if row.response][:4]
    common = {
        "forget": {"f": rows},
        "retain": rows,
        "judge": f"lexicon:{lab / 'lexicon.json'}",
        "config": EvalConfig(samples=0, max_new_tokens=8),
    }
    with pytest.raises(ConfigError, match="unknown kind; choose from abliterate, attenuate, "):
        AttackRequest(ModelSpec(lab / "llama"), kinds=["bribe"], **common)
    with pytest.raises(ConfigError, match="at least one kind"):
        AttackRequest(ModelSpec(lab / "llama"), kinds=[], **common)
    with pytest.raises(ConfigError, match="every prompt of --forget f"):
        settings = AttackConfig(fractions=(1.0,))
        attack_model(AttackRequest(ModelSpec(lab / "llama"), kinds=["relearn"], relearn=rows, settings=settings, **common))
    with pytest.raises(ConfigError, match="--disguise mumble: unknown"):
        settings = AttackConfig(disguises=("mumble",))
        attack_model(AttackRequest(ModelSpec(lab / "llama"), kinds=["rephrase"], settings=settings, **common))
    for kind in ("relearn", "quantize"):
        with pytest.raises(ConfigError, match=f"attack {kind}: changes weights in memory, which --backend vllm keeps to itself"):
            attack_model(AttackRequest(ModelSpec(lab / "llama"), kinds=[kind], backend="vllm", **common))
    with pytest.raises(ConfigError, match="int4"):
        AttackConfig(quantizers=("int3",))
    done = run_sku("attack", "prefil", "--model", "x", "--forget", "a=b", "--retain", "c", "--judge", "refusal")
    assert done.returncode == 2 and "did you mean 'prefill'" in done.stderr


def test_interrupted_attacks_continue_where_they_were(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted when all is measured and nothing recorded, it comes to the same without asking again."""
    rows = [row for row in read_rows(lab / "forget/unseen.jsonl") if row.response][:6]
    reached: list[Any] = []

    def every_kind(**more: Any) -> AttackReport:
        request = AttackRequest(
            ModelSpec(lab / "llama", base=lab / "opt"),
            kinds=["all"],
            forget={"f": rows[:3]},
            retain=rows[:2],
            relearn=rows[2:],
            judge=f"lexicon:{lab / 'lexicon.json'}",
            config=EvalConfig(samples=1, max_new_tokens=8),
            settings=AttackConfig(steps=(1,), fractions=(0.5,), candidates=3, quantizers=("int4",), disguises=("polite",)),
            output=tmp_path / "out",
            **more,
        )
        return attack_model(request)

    def interrupted(*written: object) -> None:
        reached.append(written[2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sku_vllm.evaluate.attack.attack_model.record", interrupted)
        every_kind()
    monkeypatch.setattr(TransformersBackend, "_decode", lambda *_: pytest.fail("asked again"))
    again = every_kind(resume=True).to_json()
    of_the_file = {name: reached[0][name] for name in ("row_digests", "rows_sha256")}
    assert again | of_the_file == reached[0] and tuple(reached[0]["attacks"]) == KINDS
    answers_can_be_judged_again(tmp_path, lab, again)


def answers_can_be_judged_again(folder: Path, lab: Path, told: dict[str, Any]) -> None:
    """The same judge over the kept answers gives the shares of the record, set by set; a changed file is noticed."""
    assert (folder / "out/rows.jsonl").stat().st_mode & 0o777 == 0o600
    by_set = judge_file([f"lexicon:{lab / 'lexicon.json'}"], str(folder / "out/rows.jsonl"), str(folder / "judged.jsonl"))["by_set"]
    for name, entry in {"before": told["before"], "rephrase polite": told["attacks"]["rephrase"][0]}.items():
        for mode, shares in entry["forget"]["f"].items():
            assert by_set[f"{name}: f"][mode] == {key: shares[key] for key in by_set[f"{name}: f"][mode]}
    measured = {name.removesuffix(": f") for name in by_set if name.endswith(": f")}
    assert len(measured) >= sum(map(len, told["attacks"].values())) - 1, "steps 0 of relearning is the measurement before"
    assert not [attack["changed"] for attack in attacks(collect([folder / "out"])) if attack["changed"]]
    (folder / "out/rows.jsonl").write_text("{}\n")
    checks = row_checks([], attacks(collect([folder / "out"])))
    assert [check.name for check in checks] == ["Answers are those that were measured"] and checks[0].state == "fail"


SHOUT = """
from sku_vllm.data import Row
from sku_vllm.evaluate.attack.attack import Attack, Finding

class Shout(Attack):
    def run(self, case):
        loud = {name: [Row.ask(row.prompt.upper()) for row in rows] for name, rows in case.questions.forget.items()}
        case.progress("shouting")
        yield Finding("upper case", case.measured("shout", loud))
"""


def test_another_package_brings_an_attack(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text(SHOUT)
    (tmp_path / "shouting-1.dist-info").mkdir()
    (tmp_path / "shouting-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1\n")
    (tmp_path / "shouting-1.dist-info/entry_points.txt").write_text("[sku_vllm.attacks]\nshout = shouting:Shout\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows, said = read_rows(lab / "forget/unseen.jsonl")[:2], []
    asked = {"forget": {"f": rows}, "retain": rows, "judge": f"lexicon:{lab / 'lexicon.json'}"}
    request = AttackRequest(ModelSpec(lab / "llama"), kinds=["shout"], config=EvalConfig(samples=0, max_new_tokens=8), **asked)
    (entry,) = attack_model(request, said.append).attacks["shout"]
    assert entry["attack"] == "upper case" and "recovery" in entry and said[-1] == "shouting"
    assert AttackRequest(ModelSpec("m"), kinds=["all"], **asked).kinds == (*(kind for kind in KINDS if kind not in NEED_BASE), "shout")
