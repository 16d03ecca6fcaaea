"""No prompt and no answer in what a command says by default, on either stream (servers and the monitor: test_monitor.py)."""

import json
from pathlib import Path

import pytest

from sku_vllm.cli import main


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]):
    """Runs a command in this process and returns its exit code and all it wrote, Python's warnings and C code's included."""

    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return int(ended.value.code or 0), "".join(capfd.readouterr())

    return run


def test_commands_never_say_what_was_asked_or_answered(lab: Path, tmp_path: Path, said) -> None:
    texts = set()
    for name, source in (("forget", "forget/unseen"), ("retain", "retain/test")):
        rows = (lab / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:16]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        texts |= {text for row in map(json.loads, rows) for text in (row["prompt"], row.get("response")) if text}
    forget, retain, adapter = (tmp_path / name for name in ("forget.jsonl", "retain.jsonl", "adapter"))
    judge = f"lexicon:{lab}/lexicon.json"
    measured = ["--model", lab / "llama", "--adapter", adapter, "--forget", f"f={forget}", "--retain", retain, "--judge", judge]
    measured += ["--samples", 1, "--max-new-tokens", 12]
    broken = tmp_path / "broken.jsonl"
    broken.write_text(forget.read_text(encoding="utf-8") + "\n" + json.dumps({"prompt": min(texts), "response": 3}), encoding="utf-8")
    train = ["train", "--model", lab / "llama", "--method", "task-vector", "--steps", 2, "--output", adapter]
    train += ["--retain", retain, "--forget"]
    for command, code in (
        ([*train, forget], 0),
        (["eval", *measured, "--output", tmp_path / "out"], 0),
        (["tune", *measured, "--scales", "1", "--max-gibberish", 1], None),
        (["attack", *measured, "prefill"], 0),
        (["judge", "--judge", judge, "--input", forget, "--output", tmp_path / "verdicts.jsonl"], 0),
        (["fuse", "--model", lab / "llama", "--adapter", adapter, "--output", tmp_path / "fused"], 0),
        (["report", tmp_path / "out", tmp_path / "fused", "--serving-dtype", "float32", "--output", tmp_path / "r.html"], 0),
        (["judge", "--judge", judge, "--input", broken, "--output", tmp_path / "no.jsonl"], 2),
    ):
        status, output = said(*command)
        assert code is None or status == code, output
        assert output and not [text for text in texts if text in output], command[0]
    answers = {json.loads(line)["response"] for line in (tmp_path / "out/rows.jsonl").read_text(encoding="utf-8").splitlines()}
    assert len(answers) > 5, "nothing was answered, so nothing was shown"
