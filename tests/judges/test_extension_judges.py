"""Judges that other packages bring by the entry points `sku_vllm.judges`."""

import os
from pathlib import Path

import pytest

from sku_vllm.errors import ConfigError, DataError
from sku_vllm.judges import Exchange, judge_specs, load_judge, load_labeller

CODE = """
from sku_vllm.errors import DataError

class Longer:
    def __init__(self, rest):
        self.name = f"longer:{rest}"
        self.limit = int(rest or 3)

    def judge(self, exchanges):
        return [len(exchange.response) > self.limit for exchange in exchanges]

def broken(rest):
    raise DataError("longer: this file is broken")

def nameless(rest):
    return object()
"""
EXCHANGES = [Exchange("q", text) for text in ("Yes.", "Yes, by all means.")]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that brings the judges longer, broken, nameless and missing."""
    (tmp_path / "long_judge.py").write_text(CODE)
    info = tmp_path / "long_judge-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: long-judge\nVersion: 1\n")
    names = {"longer": "Longer", "broken": "broken", "nameless": "nameless", "missing": "none_such"}
    (info / "entry_points.txt").write_text(
        "[sku_vllm.judges]\n" + "".join(f"{name} = long_judge:{target}\n" for name, target in names.items())
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_judge_of_another_package(package: Path) -> None:
    judge = load_judge("longer:10")
    assert judge.name == "longer:10" and judge.judge(EXCHANGES) == [False, True]
    assert load_judge("longer").judge(EXCHANGES) == [True, True]  # a bare name: REST is empty
    assert [verdict.label for verdict in load_labeller("longer:10")(EXCHANGES)] == ["benign", "harmful"]


def test_several_judges_may_be_of_other_packages(package: Path) -> None:
    (package / "words,more.json").write_text('["means"]')
    judge = load_judge(f"all:lexicon:{package}/words,more.json,longer:100,longer,refusal")
    assert [part.name for part in judge.judges] == [f"lexicon:{package}/words,more.json", "longer:100", "longer:", "refusal"]


def test_help_and_errors_name_them(package: Path) -> None:
    assert judge_specs()[:3] == ["lexicon:FILE", "refusal", "answered"] and "longer:…" in judge_specs()
    with pytest.raises(ConfigError, match="did you mean 'longer'.*all:A,B.*longer:…"):
        load_judge("longr:3")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("longer:many", ConfigError, "--judge longer:many: cannot be made .ValueError: invalid literal"),
        ("broken:x", DataError, "^longer: this file is broken$"),
        ("nameless:", ConfigError, "gives a object without `name` or `judge`"),
        ("missing:x", ConfigError, "'missing' of long-judge cannot be loaded"),
        ("refusal:x", ConfigError, "unknown judge; did you mean 'refusal'"),
    ],
)
def test_what_cannot_be_used(package: Path, spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_judge(spec)


def test_the_judge_process_of_a_server_has_them(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sku_vllm.serving.judge_process import JudgeProcess

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")])))
    judge = JudgeProcess("longer:10")
    try:
        assert [verdict.harmful for verdict in judge(EXCHANGES)] == [False, True]
    finally:
        judge.process.kill()
        judge.process.wait()
