"""`sku train` from end to end on tiny models: what it writes, what it refuses, and that the delta is the state training ended at."""

import json
import os
import re
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sku_vllm.adapter.adapter import load_adapter
from sku_vllm.adapter.vllm_ranks import VLLM_RANKS
from sku_vllm.checkpoint.reader import base_identity
from sku_vllm.data import Row, load_dataset
from sku_vllm.errors import AdapterError, CheckpointError, ConfigError, DivergenceError
from sku_vllm.methods import METHODS, TrainConfig
from sku_vllm.methods.method import Side
from sku_vllm.model import attach_adapter, load_model, set_scale
from sku_vllm.output import partial_path
from sku_vllm.train import trainer
from sku_vllm.train.train_report import TrainReport
from sku_vllm.train.train_request import TrainRequest

IDS = torch.tensor([list(range(5, 60))])


def train(trainable: Path, output: Path, method: str, arch: str = "llama", **settings: object) -> TrainReport:
    resume = bool(settings.pop("resume", False))
    config = TrainConfig.of(method, **{"steps": 3, "batch_size": 4, **settings})
    forget, retain = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    refusals = [replace(row, response="I can't help with that.") for row in forget.rows] if method == "refusal-tune" else ()
    request = TrainRequest(trainable / arch, forget, retain, output, config, refusals=refusals, resume=resume)
    return trainer.train_adapter(request, progress=False)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[trainer.Run]:
    """The runs that train_adapter made, for a look at the state they ended in."""
    made: list[trainer.Run] = []

    class Watched(trainer.Run):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(trainer, "Run", Watched)
    return made


@pytest.mark.parametrize("arch", ["llama", "opt"])
@pytest.mark.parametrize("method", ["sku-mirrored", "sku", "npo"])
def test_the_delta_at_scale_one_is_the_state_training_ended_at(trainable: Path, tmp_path: Path, runs: list, arch: str, method: str) -> None:
    report = train(trainable, tmp_path / "adapter", method, arch, lr=5e-3)
    (run,) = runs
    with torch.no_grad():
        # After the last fold the served model is what the next round would have started from.
        hidden, _ = run.passes([IDS[0].tolist()], [Side.ADAPTED if run.passes.folded else Side.SERVED])
        trained = run.passes.head(hidden)
        base = load_model(trainable / arch)
        plain = base(input_ids=IDS).logits[0]
        edited = attach_adapter(base, tmp_path / "adapter", 1.0)
        assert (edited(input_ids=IDS).logits[0] - trained).abs().max() < 1e-5
        assert (trained - plain).abs().max() > 1e-2
        assert (set_scale(edited, 0.0)(input_ids=IDS).logits[0] - plain).abs().max() < 1e-6
    assert report.rank in VLLM_RANKS and report.packed


def test_an_adapter_directory_is_private_complete_and_says_what_it_is(trainable: Path, tmp_path: Path) -> None:
    train(trainable, tmp_path / "adapter", "sku-mirrored")
    adapter = tmp_path / "adapter"
    assert adapter.stat().st_mode & 0o777 == 0o700
    assert not partial_path(adapter).exists()
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "sku_run.json", "sku_train.json", "README.md", "history.jsonl"} <= names
    assert "train_config.json" not in names  # what a resumed run would compare with
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    run = json.loads((adapter / "sku_run.json").read_text())
    assert run["schema"] == "sku.run/1" and run["method"] == "sku-mirrored" and run["adapter_kind"] == "lora"
    assert run["base_identity"] == base_identity(trainable / "llama") and run["config"]["rounds"] == 3
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_bias"]) == (128, 128, False, False)  # 3 rounds of 32
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    card = (adapter / "README.md").read_text()
    assert "do not publish" in card and "=lora:adapter@1" in card and "sku negate" not in card  # sku serve takes the raw adapter
    history = [json.loads(line) for line in (adapter / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == list(range(1, 10)) and set(history[0]["losses"]) == {
        "guided_distortion",
        "mirrored_preservation",
    }


def test_same_seed_same_bits_other_seed_other_bits(trainable: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(trainable, tmp_path / name, "sku", seed=seed)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


@pytest.mark.parametrize(("method", "sign"), [("task-vector", 1), ("gradient-ascent", -1)])
def test_a_dense_task_vector_is_the_difference_of_all_weights(trainable: Path, tmp_path: Path, runs: list, method: str, sign: int) -> None:
    report = train(trainable, tmp_path / "dense", method, "opt", full=True, lr=1e-4)
    assert report.adapter_kind == "dense"
    (run,) = runs
    trained = dict(run.passes.core.named_parameters())
    # Served = base − delta: the trained model's mirror image for a task vector, the trained model itself for gradient ascent.
    edited = attach_adapter(load_model(trainable / "opt"), tmp_path / "dense", -sign)
    for name, weight in edited.named_parameters():
        assert (weight - trained[name]).abs().max() < 1e-6, name
    with pytest.raises(ConfigError, match="--full: method sku-mirrored needs an adapter"):
        train(trainable, tmp_path / "no", "sku-mirrored", full=True)


def test_another_base_and_a_wrong_directory_are_refused(trainable: Path, tmp_path: Path) -> None:
    train(trainable, tmp_path / "adapter", "task-vector", target_modules=("q_proj", "v_proj"))
    other = load_model(trainable / "llama")
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="trained on another base"):
        attach_adapter(load_model(tmp_path / "other"), tmp_path / "adapter", 1.0)
    attach_adapter(load_model(tmp_path / "other"), tmp_path / "adapter", 1.0, any_base=True)
    with pytest.raises(AdapterError):
        attach_adapter(load_model(trainable / "llama"), trainable / "llama", 1.0)


def test_a_pickled_checkpoint_is_refused_with_the_way_out(trainable: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((trainable / "llama" / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*save_pretrained"):
        load_model(tmp_path)


def test_divergence_stops_with_the_step_and_keeps_the_last_good_adapter(trainable: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    with pytest.raises(DivergenceError, match="step .* not finite.*last-good") as caught:
        train(trainable, output, "task-vector", steps=40, lr=1e30, schedule="constant")
    assert caught.value.exit_code == 3 and not output.exists()
    kept = partial_path(output) / "last-good"
    assert kept.stat().st_mode & 0o777 == 0o700
    logits = attach_adapter(load_model(trainable / "llama"), kept, 1.0)(input_ids=IDS).logits
    assert torch.isfinite(logits).all()


def test_a_base_without_refusals_stops_a_contrastive_method(trainable: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--targets latent: only 0% of what this base says without the harmful adapter are refusals"):
        train(trainable, tmp_path / "adapter", "sku-contrastive", steps=4, samples=8, sample_tokens=4, targets="latent")
    assert not (tmp_path / "adapter").exists() and not partial_path(tmp_path / "adapter").exists()


def test_a_bfloat16_base_trains_fp32_factors_beside_its_one_set_of_weights(trainable: Path, tmp_path: Path, runs: list) -> None:
    """The states of the optimizer and the file are fp32 as well, and the delta points where that of an fp32 base does."""
    for dtype in ("bfloat16", "float32"):
        train(trainable, tmp_path / dtype, "sku-mirrored", rounds=1, steps=4, dtype=dtype)
    run = runs[0]
    assert {str(p.dtype) for name, p in run.model.named_parameters() if "lora_" not in name} == {"torch.bfloat16"}
    assert {p.dtype for p in run.names} == {torch.float32} and run.passes.reference == [run.passes.core]
    assert {moment.dtype for state in run.optimizer.state.values() for moment in state.values()} == {torch.float32}
    one, other = (load_adapter(tmp_path / dtype) for dtype in ("bfloat16", "float32"))
    for name, delta in one.deltas.items():
        assert delta.a.dtype == delta.b.dtype == torch.float32
        mine, theirs = ((found.b @ found.a).flatten() for found in (delta, other.deltas[name]))
        assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.8, name


def test_the_command_exits_3_when_it_diverged(trainable: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from sku_vllm.cli import main

    data = ["--model", trainable / "llama", "--forget", trainable / "forget.jsonl", "--output", tmp_path / "adapter"]
    with pytest.raises(SystemExit) as caught:
        main([*map(str, ["train", *data, "--method", "task-vector", "--lr", 1e30])])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 3 and "is not finite" in line and "last-good" in line


def test_rounds_beyond_the_largest_rank_are_recompressed_where_matrices_are_smaller(trainable: Path, tmp_path: Path, runs: list) -> None:
    """Three of 256 make 768 and vLLM takes 512, which holds all that matrices of these sizes can have."""
    report = train(trainable, tmp_path / "adapter", "sku-mirrored", rank=256, lr=5e-3)
    assert report.rank == 512 and report.fold_error < 1e-6
    (run,) = runs
    with torch.no_grad():
        trained = run.passes.head(run.passes([IDS[0].tolist()], [Side.ADAPTED])[0])
        edited = attach_adapter(load_model(trainable / "llama"), tmp_path / "adapter", 1.0)
        assert (edited(input_ids=IDS).logits[0] - trained).abs().max() < 1e-4


def test_the_stated_error_of_recompressing_is_the_deltas_own(trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(trainable, tmp_path / "exact", "sku-mirrored", rank=8, lr=5e-3)
    monkeypatch.setattr("sku_vllm.adapter.vllm_ranks.VLLM_RANKS", (8, 16))  # as if vLLM took no more than two of the three rounds
    report = train(trainable, tmp_path / "short", "sku-mirrored", rank=8, lr=5e-3)
    exact, short = (load_adapter(tmp_path / name).deltas for name in ("exact", "short"))
    pairs = [[found.scaling * found.b.float() @ found.a.float() for found in (exact[name], short[name])] for name in exact]
    lost, whole = (sum(float(part.square().sum()) for part in parts) for parts in ([b - a for a, b in pairs], [a for a, _ in pairs]))
    assert report.rank == 16 and report.fold_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3) and report.fold_error > 1e-3


def test_all_weights_that_diverged_are_not_kept_as_good(trainable: Path, tmp_path: Path) -> None:
    """A good copy would be the memory of the weights once more; the error says what there is instead."""
    with pytest.raises(DivergenceError, match="step .* not finite; --full keeps no copy.*checkpoint"):
        train(trainable, tmp_path / "dense", "task-vector", steps=40, lr=1e30, schedule="constant", full=True)
    assert not (tmp_path / "dense").exists() and not (partial_path(tmp_path / "dense") / "last-good").exists()


def test_tensorboard_has_what_the_history_has(trainable: Path, tmp_path: Path, run_sku: Callable[..., subprocess.CompletedProcess]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = ["--model", trainable / "opt", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    done = run_sku("train", *data, "--output", tmp_path / "adapter", "--method", "sku", "--steps", 3, "--tracker", "tensorboard")
    assert done.returncode == 0, done.stderr
    history = [json.loads(line) for line in (tmp_path / "adapter" / "history.jsonl").read_text().splitlines()]
    (events,) = (tmp_path / "adapter.logs").rglob("events.out.tfevents.*")
    logged = EventAccumulator(str(events)).Reload()
    wanted = {f"loss/{name}": [entry["losses"][name] for entry in history] for name in history[0]["losses"]}
    wanted |= {name: [entry[name] for entry in history] for name in ("lr", "gradient_norm")}
    assert set(logged.Tags()["scalars"]) == set(wanted)
    for name, values in wanted.items():
        assert [scalar.step for scalar in logged.Scalars(name)] == [1, 2, 3]
        assert [scalar.value for scalar in logged.Scalars(name)] == pytest.approx(values, rel=1e-6)


def test_a_terminal_gets_a_bar_and_a_log_gets_lines(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Both with losses, tokens/s and the time left."""
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    config = TrainConfig.of("task-vector", steps=20, batch_size=2)
    trainer.train_adapter(TrainRequest(trainable / "llama", *sets, tmp_path / "log", config))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("task-vector: step")]
    assert len(lines) == 10 and re.fullmatch(r"task-vector: step 2/20, guided_distortion \d+\.\d+, tok/s \d+, \d+:\d+ left", lines[0])
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    with open(theirs, "w") as terminal, open(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        trainer.train_adapter(TrainRequest(trainable / "llama", *sets, tmp_path / "bar", replace(config, steps=4)))
        os.set_blocking(ours, False)
        shown = b"".join(iter(lambda: screen.read(2**12), None)).decode()
    assert re.search(r"task-vector: 100%.*\| 4/4 \[\d+:\d+<\d+:\d+.*guided_distortion=\d+\.\d+, tok/s=\d+\]", shown)


def test_both_contrastive_forms_train_where_the_base_refuses(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list
) -> None:
    """A random base cannot refuse, so here the check alone is lifted; the lab's base passes it (test_train_lab)."""
    monkeypatch.setattr("sku_vllm.train.targets.NEEDED", {"latent": 0.0})
    monkeypatch.setattr("sku_vllm.train.targets.NEEDED_EARLY", 0.0)
    for method, its_own in (
        ("sku-contrastive", {"end_answer"}),
        ("sku-contrastive-two", {"recovery", "restart", "restart_first", "restart_relearned", "contrast_relearned"}),
    ):
        report = train(trainable, tmp_path / method, method, steps=8, samples=8, sample_tokens=6)
        assert {"contrast", "contrast_first", "mirrored_preservation", "guided_distortion"} | its_own <= set(report.losses)
        with torch.no_grad():
            hidden, _ = runs[-1].passes([IDS[0].tolist()], [Side.SERVED])
            edited = attach_adapter(load_model(trainable / "llama"), tmp_path / method, 1.0)
            assert (edited(input_ids=IDS).logits[0] - runs[-1].passes.head(hidden)).abs().max() < 1e-5


def test_the_command_reports_and_warns(trainable: Path, tmp_path: Path, run_sku: Callable[..., subprocess.CompletedProcess]) -> None:
    output = tmp_path / "adapter"
    data = ["--model", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    arguments = ["train", *data, "--output", output, "--steps", 2, "--rounds", 1, "--max-length", 48, "--method", "sku-mirrored"]
    done = run_sku(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["method"] == "sku-mirrored" and report["steps"] == 2 and report["cut_answers"] > 0 and report["tokens"] > 0
    assert "harmful knowledge" in done.stderr and "answers were cut by the length limit" in done.stderr
    record = json.loads((output / "sku_train.json").read_text())
    assert record["schema"] == "sku.train/1" and all(record[key] == value for key, value in report.items())
    again = run_sku(*arguments, "--resume")
    assert again.returncode == 0 and "already finished" in again.stderr
    refused = run_sku(*arguments)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "not empty" in refused.stderr


def test_a_run_that_went_down_the_ladder_and_was_killed_resumes_with_the_same_command(
    trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from sku_vllm.cli import main
    from sku_vllm.train.run import Run

    class Killed(BaseException):
        pass

    step = Run.step

    def killed(run: Run) -> dict:
        if run.config.targets == "given" and run.at == 2:
            raise Killed
        return step(run)

    data = ["--model", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    flags = ["--steps", 4, "--save-seconds", 0, "--resume", "--json"]
    command = [str(part) for part in ["train", *data, "--output", tmp_path / "adapter", *flags]]
    monkeypatch.setattr(Run, "step", killed)
    with pytest.raises(Killed):
        main(command)
    monkeypatch.setattr(Run, "step", step)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(command)
    report = json.loads(capsys.readouterr().out)
    assert not caught.value.code and report["targets"] == "given" and report["resumed_from"] == 2 and report["steps"] == 3
    assert [look["targets"] for look in report["looks"]] == ["latent", "asked"]


BAD = [
    (("--method", "skuu"), "--method skuu: unknown"),
    (("--forget", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    (("--model", "nowhere/at/all"), "no such model directory"),
    (("--target-modules", "q_prj"), "--target-modules q_prj: this model has no such linear layer; choose from"),
    (("--target-modules", "lm_head"), "--target-modules lm_head"),
    (("--quantize", "4bit"), "--quantize 4bit: needs bitsandbytes; install it with: pip install bitsandbytes"),
    (("--quantize", "8bit"), "--quantize 8bit: only 4bit"),
    (("--tracker", "wandb"), "--tracker wandb"),
    (("--columns", "prompt"), "--columns prompt: expected FIELD=COLUMN"),
    (("--method", "refusal-tune"), "--refusals: method refusal-tune needs"),
    (("--max-length", "10"), "--max-length is 10"),
    (("--on-long error --max-length", "10"), "--max-length is 10"),
    (("--on-long", "drop"), "--on-long drop: choose from skip, error"),
    (("--no-guided-distortion --method", "gradient-ascent"), "nothing to train"),
    (("--no-random-disassociation --method", "npo"), "--no-random-disassociation: there is none in --method npo"),
    (("--no-preservation --method", "task-vector"), "--no-preservation: there is none in --method task-vector"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(
    trainable: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, flags: tuple, message: str
) -> None:
    from sku_vllm.cli import main

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    given = {
        "--model": str(trainable / "llama"),
        "--forget": str(trainable / "forget.jsonl"),
        "--retain": str(trainable / "retain.jsonl"),
        "--output": str(tmp_path / "adapter"),
        "--steps": "1",
    }
    given.update(dict([flags]))
    with pytest.raises(SystemExit) as caught:
        main(["train", *(part for flags, value in given.items() for part in (*flags.split(), value))])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_term_may_be_left_out_twice(trainable: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from sku_vllm.cli import main

    data = ["--model", trainable / "llama", "--forget", trainable / "forget.jsonl", "--retain", trainable / "retain.jsonl"]
    flags = ["--method", "sku", "--random-weight", 0, "--no-random-disassociation", "--dry-run", "--json"]
    with pytest.raises(SystemExit) as caught:
        main([str(part) for part in ["train", *data, "--output", tmp_path / "adapter", *flags]])
    assert not caught.value.code
    assert json.loads(capsys.readouterr().out)["method"] == "sku"


def test_the_adversary_goes_by_two_names() -> None:
    from sku_vllm.cli.train import command

    for flag in ("--relearner-steps", "--adversary-steps"):
        given = ["--model", "m", "--forget", "f", "--output", "o", flag, "0"]
        assert command.make_context("train", given).params["relearner_steps"] == 0


def test_losses_that_explode_and_stay_finite_are_warned_about(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from sku_vllm.cli import main

    data = ["--model", lab / "llama", "--forget", lab / "forget/train.jsonl", "--retain", lab / "retain/train.jsonl"]
    for rate, warned in ((1e-3, 0), (0.1, 1)):
        flags = ["--method", "task-vector", "--steps", 20, "--lr", rate, "--json"]
        with pytest.raises(SystemExit) as caught:
            main([str(part) for part in ["train", *data, "--output", tmp_path / str(rate), *flags]])
        printed = capsys.readouterr()
        assert not caught.value.code and printed.err.count("above where it began") == warned
        risen = json.loads(printed.out)["risen"]
        assert list(risen) == ["guided_distortion"] * warned and all(rise > 1 for rise in risen.values())


def test_answers_beyond_the_models_context_are_cut_and_counted(trainable: Path, tmp_path: Path) -> None:
    """OPT has learned as many positions as its context (256) and none beyond."""
    forget, retain = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    rows = (replace(forget.rows[0], response="w1 " * 400), *forget.rows[1:])
    config = TrainConfig.of("task-vector", steps=10, batch_size=4, max_length=4096)
    request = TrainRequest(trainable / "opt", replace(forget, rows=rows), retain, tmp_path / "adapter", config)
    report = trainer.train_adapter(request, progress=False)
    assert report.cut_answers == 1
    assert json.loads((tmp_path / "adapter/sku_train.json").read_text())["config"]["max_length"] == 256


def test_a_resumed_run_needs_the_rows_and_the_base_it_was_begun_with(trainable: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError):
        train(trainable, tmp_path / "adapter", "task-vector", lr=1e30)
    forget, retain = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    config = TrainConfig.of("task-vector", steps=3, batch_size=4, lr=1e30)
    for arch, rows, key in (("llama", forget.rows[1:], "rows"), ("opt", forget.rows, "base_identity")):
        with pytest.raises(ConfigError, match=f"--resume: the unfinished run in .* has {key} ="):
            request = TrainRequest(trainable / arch, replace(forget, rows=rows), retain, tmp_path / "adapter", config, resume=True)
            trainer.train_adapter(replace(request, refusals=[Row.ask("q", "I won't do that.")]), progress=False)


def test_every_method_has_a_summary_and_sane_defaults() -> None:
    for name, method in METHODS.items():
        assert method.summary.endswith(".") and TrainConfig.of(name).method == name
        assert method.served_side == all(term.side is Side.SERVED for phase in method.phases(TrainConfig.of(name)) for term in phase.terms)


def test_a_4bit_base_gives_an_adapter_for_the_stored_weights(trainable: Path, tmp_path: Path) -> None:
    """Its record says so, and the edit points where that of the plain base does."""
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    train(trainable, tmp_path / "quantised", "task-vector", quantize="4bit", steps=4, lr=1e-3)
    train(trainable, tmp_path / "plain", "task-vector", steps=4, lr=1e-3)
    run = json.loads((tmp_path / "quantised" / "sku_run.json").read_text())
    assert run["base_identity"] == base_identity(trainable / "llama") and run["config"]["quantize"] == "4bit"
    one, other = (load_adapter(tmp_path / name) for name in ("quantised", "plain"))
    for name, delta in one.deltas.items():
        mine, theirs = ((found.b.float() @ found.a.float()).flatten() for found in (delta, other.deltas[name]))
        assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.8, name
