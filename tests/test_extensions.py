"""Entry points of other packages: found without importing them, and refused in one line where they cannot be used."""

import sys

import pytest

from sku_vllm.errors import ConfigError
from sku_vllm.extensions import JUDGES, extension_names, load_extension


def installed(place, name, entry, code="class Mine: pass\n"):
    """A package as pip leaves it: a module, and metadata with an entry point."""
    (place / f"{name}.py").write_text(code)
    info = place / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{JUDGES}]\nmine = {entry}\n")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("ext_one", "ext_two"):
        sys.modules.pop(name, None)


def test_a_package_brings_a_judge(place):
    installed(place, "ext_one", "ext_one:Mine")
    assert "mine" in extension_names(JUDGES) and "ext_one" not in sys.modules
    assert load_extension(JUDGES, "mine").__name__ == "Mine"


def test_what_nobody_brings():
    with pytest.raises(KeyError):
        load_extension(JUDGES, "nobody brings this")


def test_two_packages_with_one_name(place):
    installed(place, "ext_one", "ext_one:Mine")
    installed(place, "ext_two", "ext_two:Mine")
    with pytest.raises(ConfigError, match="comes from ext_one and ext_two; uninstall all but one"):
        load_extension(JUDGES, "mine")


def test_a_package_that_breaks_while_it_loads(place):
    installed(place, "ext_one", "ext_one:Mine", "raise RuntimeError('half installed')\n")
    with pytest.raises(ConfigError, match="ext_one cannot be loaded .RuntimeError: half installed"):
        load_extension(JUDGES, "mine")
