"""docs/contracts.md against the code: every command, flag, exit code, metric, route and record it names exists, and it names them all."""

import inspect
import re
from pathlib import Path

import pytest

from sku_vllm import errors
from sku_vllm.cli import COMMANDS, sku

PAGE = (Path(__file__).resolve().parents[1] / "docs/contracts.md").read_text(encoding="utf-8")
SHARED = {"--json", "--debug", "--config", "--help"}  # every command has them; the page says so once


def section(title: str) -> str:
    """The text under one heading, up to the next of its level."""
    return re.split(r"^## ", PAGE.split(f"\n## {title}\n")[1], flags=re.M)[0]


ROWS = dict(re.findall(r"^\| `sku ([\w-]+)[^|]*\| ([^|]*) \|", section("Commands"), re.M))


def test_every_command():
    assert list(ROWS) == list(COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "bench"])
def test_every_flag(name):
    parameters = [p for p in sku.get_command(None, name).params if p.opts[0].startswith("-") and not getattr(p, "hidden", False)]
    known = {max(p.opts, key=len) for p in parameters if not set(p.opts) & SHARED}
    assert set(re.findall(r"`(--[\w-]+)`", ROWS[name])) == known
    assert {flag for p in parameters for flag in p.opts} >= SHARED - {"--help"}


def test_exit_codes():
    codes = {kind.exit_code for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.SkuError)}
    named = re.search(r"^Exit codes: (.*)$", section("Commands"), re.M)[1]
    assert {int(code) for code in re.findall(r"(?:^|; )(\d+) ", named)} == codes | {0, 130}


def test_every_metric():
    source = (Path(inspect.getfile(errors)).parent / "serving/metrics.py").read_text(encoding="utf-8")
    made = re.findall(r'(Counter|Histogram|Gauge)\(\s*"(sku_\w+)"', source)
    kinds = {name + "_total" * (kind == "Counter"): kind.lower() for kind, name in made}
    rows = re.findall(r"^\| (`sku_[^|]*) \| (\w+) \|", section("Metrics"), re.M)
    listed = {name: kind for names, kind in rows for name in re.findall(r"\w+", names)}
    assert listed == kinds
    assert not set(re.findall(r"`(sku_\w+_total|sku_\w+_seconds)`", PAGE)) - kinds.keys()


def test_every_route():
    source = (Path(inspect.getfile(errors)).parent / "serving/control.py").read_text(encoding="utf-8")
    made = set(re.findall(r'\(\s*"(GET|PUT|POST|DELETE)",\s*"(/[\w/{}]*)"', source)) | {("GET", "/ready")}
    assert set(re.findall(r"`(GET|PUT|POST|DELETE) (/[\w/{}]*)`", section("Serving"))) - {("GET", "/v1/sku/ready")} == made


def test_every_record_has_a_schema():
    from sku_vllm.records import schema_names

    named = set(re.findall(r"`sku_(\w+)\.json`", PAGE))
    files = {"state": "serve-state"}  # sku_state.json is sku.serve-state/1
    assert {files.get(name, name) for name in named if name != "COMMAND"} <= set(schema_names())
