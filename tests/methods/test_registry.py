"""Methods of other packages: named without importing them, trained by their names, and refused in one line where they are no methods."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sku_vllm.errors import ConfigError
from sku_vllm.extensions import METHODS as GROUP
from sku_vllm.methods import METHODS, TrainConfig

CODE = """
from sku_vllm.methods.losses import cross_entropy
from sku_vllm.methods.method import Method, Side, Term, one_phase

def terms(config):
    return [Term("guided_distortion", config.guided_weight, "forget", Side.ADAPTED, cross_entropy)]

METHOD = Method("gentle", "Learn the harmful answers slowly.", one_phase(terms), {"steps": 2, "lr": 1e-4})
BUILT_IN = Method("sku", "Something else under a built-in name.", one_phase(terms), {"steps": 7})
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a package ext_method, as pip would leave it, with the entry points given."""

    def install(**entries: str) -> None:
        place = tmp_path / "site"
        info = place / "ext_method-1.dist-info"
        info.mkdir(parents=True)
        (place / "ext_method.py").write_text(CODE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ext_method\nVersion: 1\n")
        lines = [f"{name} = ext_method:{target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        monkeypatch.syspath_prepend(str(place))

    yield install
    sys.modules.pop("ext_method", None)
    if "gentle" in METHODS._loaded:
        del METHODS["gentle"]


def test_a_package_brings_a_method(install: Callable[..., None]) -> None:
    before = len(METHODS)
    install(gentle="METHOD")
    assert "gentle" in METHODS and list(METHODS)[-1] == "gentle" and len(METHODS) == before + 1
    assert "ext_method" not in sys.modules  # not for its name alone
    config = TrainConfig.of("gentle")
    assert (config.method, config.steps, config.lr) == ("gentle", 2, 1e-4)
    with pytest.raises(ConfigError, match="--method gentel: unknown; choose from .*sku-mirrored.*gentle"):
        TrainConfig.of("gentel")


def test_a_built_in_name_stays_built_in(install: Callable[..., None]) -> None:
    install(sku="BUILT_IN")
    assert list(METHODS).count("sku") == 1 and METHODS["sku"].defaults["steps"] == 60 and "ext_method" not in sys.modules


@pytest.mark.parametrize(("target", "message"), [("terms", "points to a function"), ("METHOD", "points to a method called 'gentle'")])
def test_what_is_not_a_method_of_that_name(install: Callable[..., None], target: str, message: str) -> None:
    install(other=target)
    with pytest.raises(ConfigError, match=f"sku_vllm.methods: 'other' {message}; point it to a Method whose name is 'other'"):
        TrainConfig.of("other")


def test_the_command_trains_and_resumes_it(
    install: Callable[..., None], trainable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from sku_vllm.cli import main
    from sku_vllm.train.run import Run

    class Killed(BaseException):
        pass

    step = Run.step

    def killed(run: Run) -> dict:
        if run.at == 1:
            raise Killed
        return step(run)

    install(gentle="METHOD")
    given = {"--model": trainable / "llama", "--forget": trainable / "forget.jsonl", "--output": tmp_path / "adapter"}
    command = ["train", *(str(part) for pair in given.items() for part in pair), "--method", "gentle", "--save-seconds", "0", "--json"]
    monkeypatch.setattr(Run, "step", killed)
    with pytest.raises(Killed):
        main(command)
    monkeypatch.setattr(Run, "step", step)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*command, "--resume"])
    report = json.loads(capsys.readouterr().out)
    assert not caught.value.code and (report["method"], report["steps"], report["resumed_from"]) == ("gentle", 2, 1)
