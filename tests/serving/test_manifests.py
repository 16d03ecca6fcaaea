"""Every manifest of `deploy/` against its schema: Kubernetes' own and Compose's from installed packages, the Gateway API's written out."""

import copy
import importlib.resources
import json
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = "1.29"  # the oldest release the Gateway API's v1 names as supported


def strict(properties, *required):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def many(item, least=0, most=64):
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
HEADER = {"type": "string", "pattern": "^[A-Za-z0-9!#$%&'*+\\-.^_`|~]+$"}
PAIR = strict({"name": HEADER, "value": {"type": "string", "minLength": 1, "maxLength": 4096}}, "name", "value")
METADATA = strict({"name": NAME, "namespace": NAME, "labels": {"type": "object"}, "annotations": {"type": "object"}}, "name")
BACKEND = strict(
    {
        "group": {"type": "string"},
        "kind": {"type": "string"},
        "name": NAME,
        "namespace": NAME,
        "port": PORT,
        "weight": {"type": "integer", "minimum": 0, "maximum": 1_000_000},
    },
    "name",
    "port",
)
MATCH = strict(
    {
        "path": strict({"type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]}, "value": {"type": "string", "pattern": "^/"}}),
        "headers": many(
            strict({"type": {"enum": ["Exact", "RegularExpression"]}, "name": HEADER, "value": {"type": "string"}}, "name", "value"), 0, 16
        ),
        "method": {"enum": ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"]},
    }
)
MODIFIER = strict({"set": many(PAIR, 0, 16), "add": many(PAIR, 0, 16), "remove": many(HEADER, 0, 16)})
FILTER = strict({"type": {"enum": ["RequestHeaderModifier"]}, "requestHeaderModifier": MODIFIER}, "type", "requestHeaderModifier")
PARENT = strict(
    {"group": {"type": "string"}, "kind": {"type": "string"}, "namespace": NAME, "name": NAME, "sectionName": NAME, "port": PORT}, "name"
)
LISTENER = strict(
    {
        "name": NAME,
        "hostname": {"type": "string"},
        "port": PORT,
        "protocol": {"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]},
        "tls": {"type": "object"},
        "allowedRoutes": {"type": "object"},
    },
    "name",
    "port",
    "protocol",
)
# gateway.networking.k8s.io/v1, the parts a canary needs; a field outside them fails here until it is added with its rule.
GATEWAY_API = {
    "Gateway": strict({"gatewayClassName": NAME, "listeners": many(LISTENER, 1)}, "gatewayClassName", "listeners"),
    "HTTPRoute": strict(
        {
            "parentRefs": many(PARENT, 1, 32),
            "hostnames": many({"type": "string"}, 0, 16),
            "rules": many(
                strict({"name": NAME, "matches": many(MATCH), "filters": many(FILTER, 0, 16), "backendRefs": many(BACKEND, 1, 16)}), 1, 16
            ),
        },
        "parentRefs",
        "rules",
    ),
}


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / f"kubernetes/{name}.yaml").read_text()))


def check_gateway_api(document):
    whole = strict(
        {"apiVersion": {"const": "gateway.networking.k8s.io/v1"}, "kind": {}, "metadata": METADATA, "spec": GATEWAY_API[document["kind"]]},
        "apiVersion",
        "kind",
        "metadata",
        "spec",
    )
    jsonschema.validate(document, whole)


def compose_schema():
    return json.loads((importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())


@pytest.mark.parametrize("document", documents("sku"), ids=lambda document: document["kind"])
@pytest.mark.parametrize("version", [KUBERNETES, kubernetes_validate.latest_version()])
def test_kubernetes_accepts_the_deployment(document, version):
    kubernetes_validate.validate(document, version, strict=True)
    broken = copy.deepcopy(document)
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_the_canary_is_a_gateway_api_one():
    found = documents("canary")
    assert [each["kind"] for each in found] == ["Gateway", "HTTPRoute"]
    for document in found:
        check_gateway_api(document)
    gateway, route = found
    assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]
    shares = [sum(each.get("weight", 1) for each in rule["backendRefs"]) for rule in route["spec"]["rules"]]
    assert all(share > 0 for share in shares) and {each["name"] for rule in route["spec"]["rules"] for each in rule["backendRefs"]} == {
        "sku",
        "vllm",
    }
    services = {each["metadata"]["name"] for each in documents("sku") if each["kind"] == "Service"}
    assert services == {"sku"}
    for wrong in ({"weight": -1}, {"port": 70000}, {"wieght": 3}):
        broken = copy.deepcopy(route)
        broken["spec"]["rules"][1]["backendRefs"][0].update(wrong)
        with pytest.raises(jsonschema.ValidationError):
            check_gateway_api(broken)


def test_compose_accepts_its_file():
    compose, schema = yaml.safe_load((DEPLOY / "compose.yaml").read_text()), compose_schema()
    check = jsonschema.validators.validator_for(schema)(schema)
    assert list(check.iter_errors(compose)) == []
    compose["services"]["serve"]["comand"] = []
    assert [error.message for error in check.iter_errors(compose)] != []


# The parts of other projects' formats that deploy/stack/ uses; a field outside them fails here until it is added with its rule.
POOL_PORT = strict({"number": PORT}, "number")
STACK = {
    "InferencePool": strict(
        {
            "selector": strict({"matchLabels": {"type": "object"}}, "matchLabels"),
            "targetPorts": many(POOL_PORT, 1, 8),
            "endpointPickerRef": strict({"group": {"type": "string"}, "kind": {"type": "string"}, "name": NAME, "port": POOL_PORT}, "name"),
        },
        "selector",
        "targetPorts",
        "endpointPickerRef",
    ),
    "InferenceModelRewrite": strict(
        {
            "poolRef": strict({"group": {"type": "string"}, "name": NAME}, "name"),
            "rules": many(
                strict(
                    {
                        "matches": many(
                            strict({"model": strict({"type": {"const": "Exact"}, "value": {"type": "string"}}, "value")}, "model")
                        ),
                        "targets": many(
                            strict({"modelRewrite": {"type": "string"}, "weight": {"type": "integer", "minimum": 1}}, "modelRewrite"), 1
                        ),
                    },
                    "targets",
                ),
                1,
            ),
        },
        "poolRef",
        "rules",
    ),
}
ENV = strict({"name": {"type": "string"}, "value": {"type": "string"}, "valueFrom": {"type": "object"}}, "name")
MODEL = strict(
    {
        **{name: {"type": "string"} for name in ("name", "repository", "tag", "modelURL", "requestMemory", "pvcStorage")},
        **{name: {"type": "integer"} for name in ("replicaCount", "requestCPU", "requestGPU")},
        "vllmConfig": strict({"extraArgs": many({"type": "string"})}),
        "env": many(ENV),
        "extraVolumes": many({"type": "object"}),
        "extraVolumeMounts": many({"type": "object"}),
    },
    *("name", "repository", "tag", "modelURL", "replicaCount", "requestCPU", "requestMemory", "requestGPU"),
)


def stack(name):
    return list(yaml.safe_load_all((DEPLOY / f"stack/{name}.yaml").read_text()))


def test_the_inference_pool_picks_replicas_of_our_deployment():
    pool, rewrite, route = stack("inference-pool")
    for document, group in ((pool, "inference.networking.k8s.io/v1"), (rewrite, "inference.networking.x-k8s.io/v1alpha2")):
        assert document["apiVersion"] == group
        jsonschema.validate(document["spec"], STACK[document["kind"]])
    deployment = next(each for each in documents("sku") if each["kind"] == "Deployment")
    labels, container = deployment["spec"]["template"]["metadata"]["labels"], deployment["spec"]["template"]["spec"]["containers"][0]
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert pool["spec"]["targetPorts"] == [{"number": container["ports"][0]["containerPort"]}]
    assert rewrite["spec"]["poolRef"]["name"] == pool["metadata"]["name"]
    assert f"--alias={rewrite['spec']['rules'][0]['targets'][0]['modelRewrite']}" in container["args"]
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    for wrong in ({"targetPort": 1}, {"targetPorts": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**pool["spec"], **wrong}, STACK["InferencePool"])


def flags_of(arguments):
    return {each.partition("=")[0] for each in arguments if each.startswith("--")}


def test_kserve_gets_a_pod_that_kubernetes_accepts():
    (service,) = stack("kserve")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = dict(service["spec"]["predictor"])
    assert predictor.pop("minReplicas") == 1
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": predictor}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container" and container["readinessProbe"]["httpGet"]["path"] == "/v1/sku/ready"
    drains(predictor)


def drains(pod):
    """The pod gets no new requests when SIGTERM comes, and lives longer after that than the server drains."""
    (container,) = pod["containers"]
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    (drain,) = [int(each.partition("=")[2]) for each in container["args"] if each.startswith("--shutdown-timeout=")]
    assert command == "sleep" and pod["terminationGracePeriodSeconds"] > int(seconds) + drain + 20


def test_every_way_to_start_it_drains_and_names_a_release():
    deployment = next(each for each in documents("sku") if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    drains(pod)
    release = re.search(r"^ARG VLLM_IMAGE=\S+:v(\S+)$", (DEPLOY / "Containerfile").read_text(), re.M)[1]
    tags = [pod["containers"][0]["image"], stack("kserve")[0]["spec"]["predictor"]["containers"][0]["image"]]
    (values,) = stack("production-stack")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert [*tags, f"{model['repository']}:{model['tag']}"] == [f"sku-vllm:{release}"] * 3


def test_production_stack_switches_the_plugin_on(monkeypatch, tmp_path):
    from sku_vllm.serving.serve_config import ServeConfig

    (values,) = stack("production-stack")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    jsonschema.validate(model, MODEL)
    assert {"name": "VLLM_PLUGINS", "value": "sku"} in model["env"]
    (settings,) = stack("serve")
    monkeypatch.setenv("SKU_TOKEN", "12345678")
    followed = DEPLOY / "stack/arms.yaml"
    config = ServeConfig(**{**settings, "follow": str(followed)})
    assert config.parsed_split() == {"original": 0.9, "negated": 0.1} and Path(settings["follow"]).name == followed.name
    arguments = model["vllmConfig"]["extraArgs"]
    assert "--shutdown-timeout=20" in arguments  # and 5 for the engine's end: the chart leaves a pod Kubernetes' 30
    assert flags_of(arguments) >= {"--enable-lora", "--max-loras", "--max-lora-rank", "--worker-extension-cls"}


def test_litellm_asks_for_what_is_served():
    (proxy,) = stack("litellm")
    (entry,) = proxy["model_list"]
    assert entry["litellm_params"]["model"] == "hosted_vllm/prod-model" and entry["litellm_params"]["api_base"].endswith("/v1")
    assert set(proxy) == {"model_list", "litellm_settings", "general_settings"}


def test_no_manifest_goes_unchecked():
    assert {path.name for path in (DEPLOY / "kubernetes").iterdir()} == {"sku.yaml", "canary.yaml"}
    names = {"inference-pool", "kserve", "production-stack", "serve", "arms", "litellm"}
    assert {path.stem for path in (DEPLOY / "stack").iterdir()} == names
