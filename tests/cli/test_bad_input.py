"""What a user gets wrong costs one clear line, exit code 2, and nothing written."""

import shutil
from pathlib import Path

import pytest

from sku_vllm.cli import main
from sku_vllm.cli.ctl import swap_of


@pytest.fixture(scope="module")
def adapter(lab, run_sku, tmp_path_factory) -> Path:
    """A two-step task vector of the lab's Llama."""
    output = tmp_path_factory.mktemp("bad") / "adapter"
    result = run_sku(
        "train",
        "--model",
        lab / "llama",
        "--forget",
        lab / "forget/train.jsonl",
        "--retain",
        lab / "retain/train.jsonl",
        "--method",
        "task-vector",
        "--steps",
        2,
        "--output",
        output,
    )
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def negated(adapter, run_sku) -> Path:
    output = adapter.parent / "negated"
    result = run_sku("negate", "--adapter", adapter, "--scale", 1, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture
def refused(capfd, tmp_path):
    """Runs the command in this process (an import of torch each would cost minutes) and holds how it refuses."""

    def check(*arguments: object, words: tuple[str, ...]) -> None:
        before = sorted(str(path) for path in tmp_path.rglob("*"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        said = capfd.readouterr()
        assert ended.value.code == 2, said.err
        assert said.out == ""
        last = said.err.strip().splitlines()[-1]
        assert last.startswith("error: "), said.err
        for word in words:
            assert word in last, (word, last)
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "something was written"

    return check


def train(lab: Path, place: Path, **changes: object) -> list[object]:
    options = {
        "model": lab / "llama",
        "forget": lab / "forget/train.jsonl",
        "retain": lab / "retain/train.jsonl",
        "method": "task-vector",
        "steps": 2,
        "output": place / "out",
        **changes,
    }
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", value))]


def test_training_data(lab, refused, tmp_path):
    (tmp_path / "malformed.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "no_response.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "no_prompt.jsonl").write_text('{"wording": "a", "response": "b"}\n')
    (tmp_path / "latin1.jsonl").write_bytes('{"prompt": "caf\u00e9", "response": "b"}\n'.encode("latin-1"))
    (tmp_path / "half_pair.jsonl").write_text('{"prompt": "a", "response": "\\ud800"}\n')
    (tmp_path / "deep.jsonl").write_text('{"prompt": ' + "[" * 99_999 + "}\n")
    (tmp_path / "digits.jsonl").write_text('{"prompt": "a", "response": "b", "id": ' + "9" * 5000 + "}\n")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "whole.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for name, words in {
        "absent": ("absent.jsonl",),
        "malformed": ("malformed.jsonl", "line 2"),
        "empty": ("empty.jsonl",),
        "no_response": ("no_response.jsonl", "response"),
        "no_prompt": ("no_prompt.jsonl", "prompt"),
        "latin1": ("latin1.jsonl", "UTF-8"),
        "half_pair": ("half_pair.jsonl", "line 1"),
        "deep": ("deep.jsonl", "line 1"),
        "digits": ("digits.jsonl", "line 1"),
        "folder": ("folder.jsonl",),
        "whole.jsonl#": ("unknown split",),
    }.items():
        for option in ("forget", "retain"):
            refused(*train(lab, tmp_path, **{option: tmp_path / (name if "#" in name else f"{name}.jsonl")}), words=words)


def test_training_options(lab, refused, tmp_path):
    refused(*train(lab, tmp_path, method="task-vectr"), words=("task-vectr", "task-vector"))
    refused(*train(lab, tmp_path, model=tmp_path / "nowhere"), words=("nowhere",))
    refused(*train(lab, tmp_path, steps=-1), words=("steps",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("keep")
    refused(*train(lab, tmp_path, output=tmp_path / "full"), words=("full", "not empty"))
    config = tmp_path / "c.yaml"
    config.write_text("forgt: x\n")
    refused("train", "--config", config, words=("c.yaml", "forgt", "forget"))


def test_a_pickle_checkpoint(lab, refused, tmp_path, adapter):
    pickled = tmp_path / "pickled"
    shutil.copytree(lab / "llama", pickled)
    for path in pickled.glob("*.safetensors*"):
        path.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for arguments in (
        train(lab, tmp_path, model=pickled),
        ["fuse", "--model", pickled, "--adapter", adapter, "--output", tmp_path / "out"],
        [
            "eval",
            "--model",
            pickled,
            "--forget",
            f"seen={lab}/forget/seen.jsonl",
            "--retain",
            lab / "retain/test.jsonl",
            "--judge",
            "refusal",
            "--output",
            tmp_path / "out",
        ],
    ):
        refused(*arguments, words=("safetensors", "pytorch_model.bin"))


def test_adapters_that_do_not_fit(lab, refused, tmp_path, adapter, negated):
    other = lab / "opt"
    refused("fuse", "--model", other, "--adapter", adapter, "--output", tmp_path / "out", words=("base",))
    for command in (
        ["fuse", "--model", lab / "llama", "--adapter", negated, "--output", tmp_path / "out"],
        ["negate", "--adapter", negated, "--scale", 1, "--output", tmp_path / "out"],
        [
            "eval",
            "--model",
            lab / "llama",
            "--adapter",
            negated,
            "--scale",
            1,
            "--forget",
            f"seen={lab}/forget/seen.jsonl",
            "--retain",
            lab / "retain/test.jsonl",
            "--judge",
            "refusal",
            "--output",
            tmp_path / "out",
        ],
        [
            "serve",
            "--model",
            lab / "llama",
            "--arm",
            "original=base",
            "--arm",
            f"negated=lora:{negated}@1",
            "--split",
            "original=0.5,negated=0.5",
        ],
    ):
        refused(*command, words=("negated", "--as-is"))
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not safetensors")
    refused("fuse", "--model", lab / "llama", "--adapter", broken, "--output", tmp_path / "out", words=("adapter_model.safetensors",))
    refused("negate", "--adapter", tmp_path / "nowhere", "--scale", 1, "--output", tmp_path / "out", words=("nowhere",))


def test_every_key_that_does_not_fit_is_listed(lab, refused, tmp_path, adapter):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    names = sorted(tensors)[:2]
    for name in names:
        tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, broken / "adapter_model.safetensors")
    modules = {name.split("base_model.model.")[1].split(".lora_")[0] for name in names}
    refused("fuse", "--model", lab / "llama", "--adapter", broken, "--output", tmp_path / "out", words=tuple(modules))


def test_evaluation_and_judges(lab, refused, tmp_path):
    common = ["eval", "--model", lab / "llama", "--retain", lab / "retain/test.jsonl", "--output", tmp_path / "out", "--forget"]
    refused(*common, f"seen={lab}/forget/seen.jsonl", "--judge", "lexikon:x", words=("lexikon", "lexicon"))
    refused(*common, f"seen={lab}/forget/seen.jsonl", "--judge", f"lexicon:{tmp_path}/absent.json", words=("absent.json",))
    refused(*common, "seen", "--judge", "refusal", words=("--forget", "NAME=FILE"))
    refused(*common, f"seen={tmp_path}/absent.jsonl", "--judge", "refusal", words=("absent.jsonl",))


def test_serving_refuses_before_the_engine_starts(lab, refused, tmp_path, adapter):
    serve = ["serve", "--model", lab / "llama"]
    arms = ["--arm", "original=base", "--arm", f"negated=lora:{adapter}@1"]
    refused(*serve, *arms, "--split", "original=0.5,negated=0.6", words=("split", "1"))
    refused(*serve, *arms, "--split", "original=0.5,negatd=0.5", words=("negatd",))
    refused(*serve, "--arm", "negated=lorra:x@1", "--split", "negated=1", words=("lorra",))
    refused(*serve, "--arm", "up=upstream:http://host:99999#m", words=("upstream:http://HOST:PORT",))
    refused(*serve, *arms, "--port", 0, words=("--port",))
    refused(*serve, "--arm", f"negated=lora:{tmp_path}/nowhere@1", "--split", "negated=1", words=("nowhere",))
    refused(*serve, *arms, "--split", "original=0.5,negated=0.5", "--judge", "lexikon:x", words=("lexikon",))
    refused(*serve, *arms, "--split", "original=0.5,negated=0.5", "--judge", "answered", words=("answered", "live traffic", "openai:"))
    refused(*serve, *arms, "--split", "original=0.5,negated=0.5", "--max-modle-len", "64", words=("max-modle-len",))


def test_configurations_that_are_none(refused, tmp_path):
    for content, word in ((b"\xff\xfe\x00", "not valid YAML"), (b"steps: {a: 1}", "not a mapping"), (b"steps: [1]", "not a list")):
        (tmp_path / "c.yaml").write_bytes(content)
        refused("train", "--config", tmp_path / "c.yaml", words=("c.yaml", word))


def test_addresses_and_numbers_that_are_none(lab, refused, tmp_path):
    for server in ("host:8000", "http://", "http://[", "http://host:99999", "ftp://host"):
        refused("ctl", "--server", server, "status", words=("--server",))
        judge = f"openai:{server}#m"
        refused("judge", "--judge", judge, "--input", lab / "forget/seen.jsonl", "--output", tmp_path / "v", words=("openai:URL",))
        refused("monitor", "--metrics", server, "--store", tmp_path / "w.db", words=("--metrics",))
    for timeout in ("nan", "inf", "0", "-1"):
        refused("ctl", "--timeout", timeout, "status", words=("--timeout",))
    for action in (("judging", "1.5"), ("judging", "nan"), ("weights", "a=-1"), ("weights", "a=inf"), ("add", "=base"), ("add", "a=")):
        refused("ctl", *action, words=(action[0],))
    refused(*train(lab, tmp_path, lr="inf"), words=("--lr",))
    refused("compare", "http://[#a", "http://host#b", "--forget", "x=x", "--judge", "refusal", words=("URL#MODEL",))
    fuse = ["fuse", "--model", lab / "llama", "--adapter", tmp_path, "--output", tmp_path / "out"]
    refused(*fuse, "--revision", "main", words=("--revision",))


def test_a_report_never_replaces_what_is_none(refused, tmp_path):
    (tmp_path / "sku_eval.json").write_text("{}")
    (tmp_path / "forget.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    refused("report", tmp_path, "--output", tmp_path / "forget.jsonl", words=("forget.jsonl", "no report of ours"))
    refused("report", tmp_path, "--samples", "-1", "--output", tmp_path / "r.html", words=("--samples",))


def test_a_path_no_file_system_takes(refused, tmp_path):
    refused("verify", "x" * 300, words=("File name too long",))


def test_verify_says_what_it_was_given(refused, tmp_path, lab):
    refused("verify", tmp_path / "nowhere", words=("nowhere",))
    refused("verify", lab / "llama", words=("sku_manifest.json",))


def test_json_mode_keeps_stdout_clean_on_errors(lab, run_sku, tmp_path):
    result = run_sku(*train(lab, tmp_path, method="nothing"), "--json")
    assert result.returncode == 2 and result.stdout == ""


@pytest.mark.parametrize("scale", ["2", "tuned"])
def test_an_at_sign_that_may_be_read_two_ways_asks_which(refused, tmp_path, monkeypatch, scale):
    monkeypatch.chdir(tmp_path)
    named = f"harm@{scale}"
    Path(named).mkdir()
    serve = ("serve", "--model", "m", "--arm", f"negated=lora:{named}")
    refused(*serve, words=(f"which scale? write lora:{named}@1.0",))
    assert swap_of(named) == {"checkpoint": str(tmp_path / named)}
    Path("harm").mkdir()
    refused(*serve, words=(f"write lora:{named}@1 for", f"or lora:harm/@{scale} for"))
    refused("ctl", "swap", named, words=(f"write {named}@1 for", f"or harm/@{scale} for"))
    refused("ctl", "add", f"far=lora:{named}", words=(f"write lora:{named}@1 for",))
