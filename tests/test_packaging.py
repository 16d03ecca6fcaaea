"""The package list in pyproject.toml is written by hand (kernels/ must not be a package): hold it against the tree."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {"kernels/delta_merge": "sku_vllm.kernels.delta_merge", "cli": "sku_vllm.cli", "benchmarks": "sku_vllm.benchmarks"}


def test_every_package_of_the_tree_is_listed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sku_vllm").rglob("__init__.py")}
    found |= set(MAPPED.values())
    for path in ("cli", "benchmarks", "kernels"):
        nested = [str(init.parent.relative_to(ROOT)) for init in (ROOT / path).rglob("__init__.py")]
        assert set(nested) <= set(MAPPED), f"{path}/ holds a package that pyproject.toml does not map"
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_kernels_is_not_a_package_at_the_root():
    """A regular package called `kernels` on sys.path breaks `import transformers`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_data_files_of_the_wheel_exist():
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        assert any(list(folder.glob(pattern)) for pattern in patterns), f"{package}: nothing matches {patterns}"


def test_no_file_is_large_and_no_pickle_is_tracked():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for path in (ROOT / name for name in names if name):
        if path.is_file():
            assert path.stat().st_size <= 4 * 2**20, f"{path.name} is over 4 MiB"
            assert path.suffix not in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}, f"{path.name}: safetensors only"


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment(tmp_path):
    """Built, installed without the checkout, `sku lab` finds its models and `sku train` its methods (dependencies are shared)."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import sku_vllm; print(sku_vllm.__file__); "
        "from sku_vllm.cli import main; main(sys.argv[1:])"
    )

    def sku(*arguments: str) -> str:
        result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert str(site) in result.stdout
        return result.stdout

    sku("lab", "--output", "lab")
    sku(
        "train",
        "--model",
        "lab/llama",
        "--forget",
        "lab/forget/train.jsonl",
        "--retain",
        "lab/retain/train.jsonl",
        "--method",
        "task-vector",
        "--steps",
        "2",
        "--output",
        "adapter",
    )
    sku("fuse", "--model", "lab/llama", "--adapter", "adapter@0.5", "--output", "fused")
    sku("verify", "fused")
    sku("report", "adapter", "fused", "--output", "report.md")  # reads the schemas
    sku("bench", "--help")
