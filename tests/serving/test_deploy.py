"""What `deploy/` names exists: flags of `sku serve`, metrics of the plugin, files that are mounted."""

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def serve_flags():
    from sku_vllm.cli.serve import command

    return {option for parameter in command.params for option in parameter.opts}


def exported():
    from sku_vllm.serving.metrics import metrics

    names = set()
    for each in vars(metrics()).values():
        if hasattr(each, "_name"):
            kind, name = type(each).__name__, each._name
            names |= {"Counter": {f"{name}_total"}, "Gauge": {name}, "Histogram": {f"{name}_bucket", f"{name}_sum", f"{name}_count"}}[kind]
    return names


def test_every_metric_in_dashboard_and_rules_is_exported_and_every_exported_one_is_shown():
    board, rules = (DEPLOY / "grafana/sku.json").read_text(), (DEPLOY / "prometheus/rules.yml").read_text()
    used = set(re.findall(r"\bsku_[a-z_]+", board + rules)) - {"sku_vllm"}
    assert used <= exported()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()}
    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in set(re.findall(r"\bsku_[a-z_]+", board))}


def test_the_dashboard_is_one_grafana_can_lay_out():
    board = json.loads((DEPLOY / "grafana/sku.json").read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(board)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken
        taken |= cells


def test_manifests_pass_flags_that_exist_and_mount_files_that_exist():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    documents = [each for name in ("sku", "canary") for each in yaml.safe_load_all((DEPLOY / f"kubernetes/{name}.yaml").read_text())]
    deployment = next(each for each in documents if each["kind"] == "Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    entrypoint = re.search(r"ENTRYPOINT (\[.*\])", (DEPLOY / "Containerfile").read_text())[1]
    for words in (compose["services"]["serve"]["command"], container["args"], json.loads(entrypoint)):
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert flags and set(flags) <= serve_flags()
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).exists(), source
    volumes = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    service = next(each for each in documents if each["kind"] == "Service")
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    for line in (DEPLOY / "Containerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
