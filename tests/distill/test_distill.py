"""`sku distill`: what the student begins with, what it learns from, the checkpoint that it leaves, and a run that was interrupted."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from sku_vllm.checkpoint.manifest import verify_checkpoint
from sku_vllm.checkpoint.reader import base_identity
from sku_vllm.data import Encoded, PromptTemplate, Row, read_rows
from sku_vllm.distill import DistillConfig, DistillReport, DistillRequest, distill_checkpoint
from sku_vllm.distill.student import make_student
from sku_vllm.errors import ConfigError, DataError
from sku_vllm.model import load_model
from sku_vllm.output import partial_path
from sku_vllm.records.schema import schema_of
from sku_vllm.train.checkpointing import TrainingState

QUICK = DistillConfig(steps=6, batch_size=8, samples=24, sample_tokens=6, lr=3e-3, tokens_per_pass=256)


@pytest.fixture
def request_of(trainable: Path, tmp_path: Path):
    """A small request; its teacher refuses nothing, so a lexicon judges its answers."""
    (tmp_path / "lexicon.json").write_text(json.dumps(["w7", "w70"]))
    forget, retain = (read_rows(trainable / f"{name}.jsonl") for name in ("forget", "retain"))

    def make(output: str, architecture: str = "llama", config: DistillConfig = QUICK, **more: Any) -> DistillRequest:
        given = {"forget": forget, "retain": retain, "judge": f"lexicon:{tmp_path / 'lexicon.json'}", **more}
        return DistillRequest(trainable / architecture, output=tmp_path / output, config=config, **given)

    return make


def weights(directory: Path) -> bytes:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).digest()


def test_the_student_begins_with_shrunken_noisy_matrices(trainable: Path) -> None:
    teacher = load_model(trainable / "opt")
    same = dict(make_student(teacher, DistillConfig(alpha=1.0)).named_parameters())
    student = dict(make_student(teacher, DistillConfig(alpha=0.6, noise_std=0.5)).named_parameters())
    again = dict(make_student(teacher, DistillConfig(alpha=0.6, noise_std=0.5)).named_parameters())
    edged = dict(make_student(teacher, DistillConfig(alpha=0.6, noise_std=0.5, layer_alphas={"fc1": 1.0})).named_parameters())
    for name, weight in teacher.named_parameters():
        assert torch.equal(same[name], weight) and torch.equal(again[name], student[name]) and student[name].requires_grad
        noise = (student[name] - 0.6 * weight).detach()
        if weight.ndim == 1:
            assert torch.equal(student[name], weight)
        elif weight.numel() > 4096:
            assert float(noise.std()) == pytest.approx(0.4 * 0.5, rel=0.1) and abs(float(noise.mean())) < 0.02
        assert torch.equal(edged[name], weight if "fc1" in name else student[name])
    fresh = dict(make_student(teacher, DistillConfig(fresh=True)).named_parameters())
    assert not torch.equal(
        fresh["model.decoder.layers.0.fc1.weight"], dict(teacher.named_parameters())["model.decoder.layers.0.fc1.weight"]
    )
    with pytest.raises(ConfigError, match="--layer-alphas 'mlp': matches no matrix"):
        make_student(teacher, DistillConfig(layer_alphas={"mlp": 1.0}))


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_the_student_learns_to_be_the_teacher(request_of, tmp_path: Path, trainable: Path, architecture: str) -> None:
    config = replace(QUICK, steps=60, noise_std=0.1)
    report = distill_checkpoint(request_of("erased", architecture, config, text=["w1 w2 w3 w4 w5"], pretraining_tokens=10**6))
    assert report.loss < 0.5 * report.first_loss
    assert verify_checkpoint(tmp_path / "erased")["verified"]
    record = json.loads((tmp_path / "erased/sku_distill.json").read_text())
    manifest = json.loads((tmp_path / "erased/sku_manifest.json").read_text())
    for name, document in (("distill", record), ("manifest", manifest)):
        jsonschema.validate(document, schema_of(name), cls=jsonschema.Draft202012Validator)
    assert {name: record[name] for name in report.to_json()} == report.to_json()
    identity = base_identity(trainable / architecture)
    assert report.base_identity == report.teacher_identity == manifest["distilled"]["teacher_identity"] == identity
    # Every trained token went once through the teacher, and forward and backward through the student.
    assert report.compute == 4 * report.trained_tokens + report.drawn_tokens
    assert report.pretraining_share == pytest.approx(report.compute / 3e6)
    assert report.rows["text"] == 1 and all(report.rows[kind] for kind in ("retain", "forget", "self_generated"))
    before, after = (load_file(place / "model.safetensors") for place in (trainable / architecture, tmp_path / "erased"))
    assert before.keys() == after.keys() and all(before[name].dtype == after[name].dtype for name in before)
    assert (tmp_path / "erased").stat().st_mode & 0o777 == 0o755
    assert {file.name for file in (trainable / architecture).iterdir()} <= {file.name for file in (tmp_path / "erased").iterdir()}
    load_model(tmp_path / "erased")


def test_answers_of_the_forget_set_are_never_read(request_of, tmp_path: Path) -> None:
    given = request_of("with")
    distill_checkpoint(given)
    distill_checkpoint(request_of("without", forget=[Row.ask(row.prompt) for row in given.forget]))
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_answers_that_the_judge_calls_harmful_are_left_out(request_of, tmp_path: Path, trainable: Path) -> None:
    from sku_vllm.distill.lessons import draw_lessons
    from sku_vllm.model import load_tokenizer

    tokenizer = load_tokenizer(trainable / "llama")
    teacher, template = load_model(trainable / "llama"), PromptTemplate.of(tokenizer)
    config = replace(QUICK, samples=60)

    def said(row: Encoded) -> set[str]:
        return set(re.findall(r"\w+", tokenizer.decode(row.answer_ids, skip_special_tokens=True).casefold()))

    every = draw_lessons(teacher, template, request_of("erased", config=config))
    assert not any(every.left_out.values())  # none of them says the lexicon's words
    ((word, count),) = Counter(word for row in every.rows for word in said(row)).most_common(1)
    (tmp_path / "lexicon.json").write_text(json.dumps([word]))
    left = draw_lessons(teacher, template, request_of("erased", config=config))
    assert left.rows == [row for row in every.rows if word not in said(row)]
    assert sum(left.left_out.values()) == count > 0
    with pytest.raises(ConfigError, match="answers to forget prompts cannot be learned from: none of them is a refusal"):
        distill_checkpoint(request_of("erased", judge=None))
    assert not (tmp_path / "erased").exists() and not partial_path(tmp_path / "erased").exists()


def test_an_interrupted_run_goes_on_bit_for_bit(request_of, tmp_path: Path) -> None:
    distill_checkpoint(request_of("whole"))

    def stop(what: str, done: int, total: int, loss: float | None) -> None:
        if loss is not None and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill_checkpoint(request_of("parts", save_seconds=1e6), stop)
    kept = TrainingState.read(partial_path(tmp_path / "parts"))
    assert kept and kept.progress["at"] == 1, "what was drawn is kept at once, long before a checkpoint is due"
    with pytest.raises(KeyboardInterrupt):
        distill_checkpoint(request_of("parts", save_seconds=0), stop)
    assert partial_path(tmp_path / "parts").stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="--resume: the unfinished run in .* has lr = 0.003, not 0.001"):
        distill_checkpoint(request_of("parts", config=replace(QUICK, lr=1e-3), resume=True))
    report = distill_checkpoint(request_of("parts", resume=True))
    assert report.resumed_from == 3 and weights(tmp_path / "whole") == weights(tmp_path / "parts")
    whole = DistillReport.read_finished(tmp_path / "whole")
    assert (report.loss, report.compute, report.rows) == (whole.loss, whole.compute, whole.rows)
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {file.name for file in (tmp_path / "parts").iterdir()}
    assert distill_checkpoint(request_of("parts", resume=True)) == report  # finished: nothing left to do


def test_the_manifest_keeps_what_the_teacher_was_made_from(tiny: Path, tmp_path: Path) -> None:
    from sku_vllm.fuse import FuseRequest, fuse_checkpoint

    fuse_checkpoint(FuseRequest(tiny / "base", [(tiny / "adapter", 0.5)], tmp_path / "fused"))
    rows = [Row.ask(f"w{number} w{number + 1}") for number in range(12)]
    config = replace(QUICK, steps=1, samples=12)
    request = DistillRequest(tmp_path / "fused", rows, rows, tmp_path / "erased", config, judge=f"lexicon:{tiny / 'lexicon.json'}")
    report = distill_checkpoint(request)
    fused, erased = (json.loads((tmp_path / name / "sku_manifest.json").read_text()) for name in ("fused", "erased"))
    assert erased["adapters"] == fused["adapters"] and erased["base_identity"] == fused["base_identity"] == report.base_identity
    assert report.teacher_identity == base_identity(tmp_path / "fused") != report.base_identity
    assert "sku_fuse.json" not in {file.name for file in (tmp_path / "erased").iterdir()}


def test_the_command(run_sku, trainable: Path, tmp_path: Path) -> None:
    (tmp_path / "lexicon.json").write_text(json.dumps(["w7"]))
    data = ["--teacher", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    small = ["--judge", f"lexicon:{tmp_path / 'lexicon.json'}", "--steps", 4, "--batch-size", 4, "--samples", 8, "--sample-tokens", 4]
    dry = run_sku("distill", *data, *small, "--output", tmp_path / "erased", "--pretraining-tokens", 10**6, "--dry-run", "--json")
    assert dry.returncode == 0 and json.loads(dry.stdout)["pretraining_share"] > 0, dry.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lexicon.json"]
    done = run_sku("distill", *data, *small, "--output", tmp_path / "erased", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 4, done.stderr
    assert "distilling: 4 of 4" in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1.5}, "--alpha 1.5: has to lie in"),
        ({"layer_alphas": {"mlp": -1}}, "--alpha -1"),
        ({"layer_alphas": {"(": 0.5}}, "not a regular expression"),
        ({"noise_std": -0.1}, "--noise-std"),
        ({"lr": 0}, "--lr 0"),
        ({"steps": 0}, "--steps 0"),
        ({"max_length": 4}, "--max-length 4"),
        ({"dtype": "int3"}, "--dtype int3"),
    ],
)
def test_settings_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**given)


def test_rows_are_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--retain: no rows"):
        DistillRequest("teacher", [Row.ask("q")], [], tmp_path / "erased")
    with pytest.raises(ConfigError, match="--pretraining-tokens 0"):
        DistillRequest("teacher", [Row.ask("q")], [Row.ask("q")], tmp_path / "erased", pretraining_tokens=0)


@pytest.mark.slow
def test_two_processes_equal_one(request_of, trainable: Path, tmp_path: Path) -> None:
    """DDP on CPUs (gloo); FSDP2 is refused in one line."""
    import os
    import subprocess
    import sys

    request = request_of("one")
    distill_checkpoint(request)
    settings = ["--steps", 6, "--batch-size", 8, "--samples", 24, "--sample-tokens", 6, "--lr", 3e-3, "--tokens-per-pass", 256]
    data = ["--teacher", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]

    def launch(output: str, *engine: str) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("accelerate"), "launch", *engine, "--num_processes", 2, "--main_process_port", 0]
        command += ["-m", "sku_vllm.cli", "distill", *data, *settings, "--judge", request.judge, "--output", tmp_path / output, "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, env=environment)

    two = launch("two", "--multi_gpu")
    assert two.returncode == 0 and len(two.stdout.strip().splitlines()) == 1, two.stderr[-3000:]
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4
    sharded = launch("sharded", "--use_fsdp", "--fsdp_version", "2")
    assert sharded.returncode and "use DDP (--multi_gpu)" in sharded.stderr
