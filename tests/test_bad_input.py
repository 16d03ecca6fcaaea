"""What a user gets wrong costs one clear line, exit code 2, and nothing written."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def adapter(lab, run_sku, tmp_path_factory) -> Path:
    """A two-step task vector of the lab's Llama."""
    output = tmp_path_factory.mktemp("bad") / "adapter"
    result = run_sku("train", "--model", lab / "llama", "--forget", lab / "forget/train.jsonl", "--retain", lab / "retain/train.jsonl",
                     "--method", "task-vector", "--steps", 2, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def negated(adapter, run_sku) -> Path:
    output = adapter.parent / "negated"
    result = run_sku("negate", "--adapter", adapter, "--scale", 1, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


def refused(run_sku, place: Path, *arguments: object, words: tuple[str, ...]) -> None:
    before = sorted(str(path) for path in place.rglob("*"))
    result = run_sku(*arguments)
    assert result.returncode == 2, f"exit {result.returncode}: {result.stderr[-2000:]}"
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    for word in words:
        assert word in last, (word, last)
    assert sorted(str(path) for path in place.rglob("*")) == before, "something was written"


def train(lab: Path, place: Path, **changes: object) -> list[object]:
    options = {"model": lab / "llama", "forget": lab / "forget/train.jsonl", "retain": lab / "retain/train.jsonl", "method": "task-vector",
               "steps": 2, "output": place / "out", **changes}
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", value))]


def test_training_data(lab, run_sku, tmp_path):
    (tmp_path / "malformed.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "no_response.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "no_prompt.jsonl").write_text('{"question": "a", "response": "b"}\n')
    for name, words in {
        "absent": ("absent.jsonl",), "malformed": ("malformed.jsonl", "line 2"), "empty": ("empty.jsonl",),
        "no_response": ("no_response.jsonl", "response"), "no_prompt": ("no_prompt.jsonl", "prompt"),
    }.items():
        for option in ("forget", "retain"):
            refused(run_sku, tmp_path, *train(lab, tmp_path, **{option: tmp_path / f"{name}.jsonl"}), words=words)


def test_training_options(lab, run_sku, tmp_path):
    refused(run_sku, tmp_path, *train(lab, tmp_path, method="task-vectr"), words=("task-vectr", "task-vector"))
    refused(run_sku, tmp_path, *train(lab, tmp_path, model=tmp_path / "nowhere"), words=("nowhere",))
    refused(run_sku, tmp_path, *train(lab, tmp_path, steps=-1), words=("steps",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("keep")
    refused(run_sku, tmp_path, *train(lab, tmp_path, output=tmp_path / "full"), words=("full", "not empty"))
    config = tmp_path / "c.yaml"
    config.write_text("forgt: x\n")
    refused(run_sku, tmp_path, "train", "--config", config, words=("c.yaml", "forgt", "forget"))


def test_a_pickle_checkpoint(lab, run_sku, tmp_path, adapter):
    pickled = tmp_path / "pickled"
    shutil.copytree(lab / "llama", pickled)
    for path in pickled.glob("*.safetensors*"):
        path.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for arguments in (
        train(lab, tmp_path, model=pickled), ["fuse", "--model", pickled, "--adapter", adapter, "--output", tmp_path / "out"],
        ["eval", "--model", pickled, "--forget", f"seen={lab}/forget/seen.jsonl", "--retain", lab / "retain/test.jsonl", "--judge", "refusal", "--output", tmp_path / "out"],
    ):
        refused(run_sku, tmp_path, *arguments, words=("safetensors", "pytorch_model.bin"))


def test_adapters_that_do_not_fit(lab, run_sku, tmp_path, adapter, negated):
    other = lab / "opt"
    refused(run_sku, tmp_path, "fuse", "--model", other, "--adapter", adapter, "--output", tmp_path / "out", words=("base",))
    for command in (
        ["fuse", "--model", lab / "llama", "--adapter", negated, "--output", tmp_path / "out"],
        ["negate", "--adapter", negated, "--scale", 1, "--output", tmp_path / "out"],
        ["eval", "--model", lab / "llama", "--adapter", negated, "--scale", 1, "--forget", f"seen={lab}/forget/seen.jsonl", "--retain", lab / "retain/test.jsonl",
         "--judge", "refusal", "--output", tmp_path / "out"],
        ["serve", "--model", lab / "llama", "--arm", "original=base", "--arm", f"negated=lora:{negated}@1", "--split", "original=0.5,negated=0.5"],
    ):
        refused(run_sku, tmp_path, *command, words=("negated", "--as-is"))
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    refused(run_sku, tmp_path, "fuse", "--model", lab / "llama", "--adapter", broken, "--output", tmp_path / "out", words=("adapter_model.safetensors",))
    refused(run_sku, tmp_path, "negate", "--adapter", tmp_path / "nowhere", "--scale", 1, "--output", tmp_path / "out", words=("nowhere",))


def test_every_key_that_does_not_fit_is_listed(lab, run_sku, tmp_path, adapter):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    names = sorted(tensors)[:2]
    for name in names:
        tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, broken / "adapter_model.safetensors")
    modules = {name.split("base_model.model.")[1].split(".lora_")[0] for name in names}
    refused(run_sku, tmp_path, "fuse", "--model", lab / "llama", "--adapter", broken, "--output", tmp_path / "out", words=tuple(modules))


def test_evaluation_and_judges(lab, run_sku, tmp_path):
    common = ["eval", "--model", lab / "llama", "--retain", lab / "retain/test.jsonl", "--output", tmp_path / "out", "--forget"]
    refused(run_sku, tmp_path, *common, f"seen={lab}/forget/seen.jsonl", "--judge", "lexikon:x", words=("lexikon", "lexicon"))
    refused(run_sku, tmp_path, *common, f"seen={lab}/forget/seen.jsonl", "--judge", f"lexicon:{tmp_path}/absent.json", words=("absent.json",))
    refused(run_sku, tmp_path, *common, "seen", "--judge", "refusal", words=("--forget", "NAME=FILE"))
    refused(run_sku, tmp_path, *common, f"seen={tmp_path}/absent.jsonl", "--judge", "refusal", words=("absent.jsonl",))


def test_serving_refuses_before_the_engine_starts(lab, run_sku, tmp_path, adapter):
    serve = ["serve", "--model", lab / "llama"]
    arms = ["--arm", "original=base", "--arm", f"negated=lora:{adapter}@1"]
    refused(run_sku, tmp_path, *serve, *arms, "--split", "original=0.5,negated=0.6", words=("split", "1"))
    refused(run_sku, tmp_path, *serve, *arms, "--split", "original=0.5,negatd=0.5", words=("negatd",))
    refused(run_sku, tmp_path, *serve, "--arm", "negated=lorra:x@1", "--split", "negated=1", words=("lorra",))
    refused(run_sku, tmp_path, *serve, "--arm", f"negated=lora:{tmp_path}/nowhere@1", "--split", "negated=1", words=("nowhere",))
    refused(run_sku, tmp_path, *serve, *arms, "--split", "original=0.5,negated=0.5", "--judge", "lexikon:x", words=("lexikon",))
    refused(run_sku, tmp_path, *serve, *arms, "--split", "original=0.5,negated=0.5", "--max-modle-len", "64", words=("max-modle-len",))


def test_verify_says_what_it_was_given(run_sku, tmp_path, lab):
    refused(run_sku, tmp_path, "verify", tmp_path / "nowhere", words=("nowhere",))
    refused(run_sku, tmp_path, "verify", lab / "llama", words=("sku_manifest.json",))


def test_json_mode_keeps_stdout_clean_on_errors(lab, run_sku, tmp_path):
    result = run_sku(*train(lab, tmp_path, method="nothing"), "--json")
    assert result.returncode == 2 and result.stdout == ""
