"""A real Prometheus against a running server: every expression of dashboard and rules."""

import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import httpx
from serving_tools import PROMPTS, complete, eventually

from sku_vllm.serving.start import free_port

ROOT = Path(__file__).resolve().parents[2]


def expressions():
    """Every PromQL expression of dashboard and rules, with Grafana's interval filled in."""
    import yaml

    board = json.loads((ROOT / "deploy/grafana/sku.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    found += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return [expression.replace("$__rate_interval", "15s") for expression in found]


def check_prometheus(server, tmp_path):
    """A real Prometheus scrapes the server and loads the rules; every panel's and alert's expression evaluates, panels to data."""
    binary = shutil.which("prometheus")
    assert binary, "install the Debian package prometheus; this test does not skip"
    subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=ROOT / "deploy/prometheus", check=True, capture_output=True)
    port = free_port("127.0.0.1")
    (tmp_path / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{ROOT}/deploy/prometheus/rules.yml']\n"
        f"scrape_configs: [{{job_name: sku, static_configs: [{{targets: ['127.0.0.1:{server.port}']}}]}}]\n"
    )
    process = subprocess.Popen(
        [
            binary,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    api = f"http://127.0.0.1:{port}/api/v1"
    try:
        assert eventually(lambda: _scraped(api))
        for number in range(12):
            complete(server, ("original", "negated")[number % 2], PROMPTS[number])
            time.sleep(0.5)
        time.sleep(2)
        results = {expression: httpx.get(f"{api}/query", params={"query": expression}).json() for expression in expressions()}
        assert {expression for expression, reply in results.items() if reply["status"] != "success"} == set()
        dashboard = json.loads((ROOT / "deploy/grafana/sku.json").read_text())
        panels = [target["expr"].replace("$__rate_interval", "15s") for panel in dashboard["panels"] for target in panel["targets"]]
        # only swaps have not happened yet
        empty = [expression for expression in panels if not results[expression]["data"]["result"] and "sku_swap" not in expression]
        assert empty == []
        rules = [rule for group in httpx.get(f"{api}/rules").json()["data"]["groups"] for rule in group["rules"]]
        assert rules and {rule["health"] for rule in rules} == {"ok"}
    finally:
        process.terminate()
        process.wait(20)


def _scraped(api):
    with contextlib.suppress(httpx.HTTPError, ValueError):  # no answer yet, or "Service Unavailable" while it starts
        result = httpx.get(f"{api}/query", params={"query": "sku_plugin_up"}).json()["data"]["result"]
        return bool(result) and result[0]["value"][1] == "1"
    return False
