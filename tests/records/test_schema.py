"""The JSON Schemas, held against records that real commands leave, and the check that readers make."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sku_vllm.cli import sku
from sku_vllm.errors import ConfigError, DataError
from sku_vllm.records import collect, note_tuned, schema_names, schema_of
from sku_vllm.records.schema import FOLDER, READ, TYPES, check_record

ROOT = Path(__file__).resolve().parents[2]


def validate(record: dict[str, Any]) -> None:
    """Raise jsonschema.ValidationError where a record is not what its own `schema` says."""
    name = re.fullmatch(r"sku\.(.+)/1", record["schema"])[1]
    jsonschema.validate(record, schema_of(name), cls=jsonschema.Draft202012Validator)


@pytest.fixture(scope="module")
def left(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tiny runs of the real commands leave below one folder."""
    place = tmp_path_factory.mktemp("left")
    for name, source in {"forget": "forget/train", "other": "forget/unseen", "retain": "retain/train"}.items():
        lines = (lab / f"{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (place / f"{name}.jsonl").write_text("".join(lines[:6] if name == "retain" else lines[:2]), encoding="utf-8")
    model, judge = ("--model", lab / "llama"), ("--judge", f"lexicon:{lab / 'lexicon.json'}")
    data = (
        "--forget",
        f"unseen={place / 'other.jsonl'}",
        "--retain",
        place / "retain.jsonl",
        "--border",
        f"near={place / 'other.jsonl'}",
        *judge,
    )
    short = ("--samples", 1, "--max-new-tokens", 4)
    edit = (*model, "--adapter", place / "adapter")

    def run(*arguments: object) -> None:
        sku.main([*map(str, arguments)], standalone_mode=False)

    forget, retain = ("--forget", place / "forget.jsonl"), ("--retain", place / "retain.jsonl")
    train = ("train", *model, *forget, *retain, "--steps", 1, "--batch-size", 2)
    run(*train, "--method", "sku", "--rank", 4, "--output", place / "adapter")
    run(*train, "--method", "task-vector", "--full", "--output", place / "dense")
    run("negate", "--adapter", place / "adapter", "--scale", 1, "--output", place / "negated")
    run("fuse", *edit, "--scale", 1, "--simulate", "int4", "--output", place / "fused")
    run(
        "fuse",
        *model,
        "--adapter",
        f"{place / 'adapter'}@0.5",
        "--adapter",
        f"{place / 'dense'}@1",
        "--no-digests",
        "--output",
        place / "both",
    )
    run("eval", *model, *data, "--judge", "refusal", *short, "--output", place / "eval-base")
    run("eval", "--model", place / "fused", "--base", lab / "llama", *data, *short, "--samples", 0, "--output", place / "eval-fused")
    test = ("--test-forget", f"seen={place / 'forget.jsonl'}", "--test-retain", place / "retain.jsonl")
    loose = [word for name in ("perplexity-ratio", "qa-drop", "over-refusal", "gibberish", "harmful") for word in (f"--max-{name}", 100)]
    run("tune", *edit, *data, *test, *short, *loose, "--scales", "0.5", "--per-layer", "--output", place / "tune")
    note_tuned(place / "adapter", place / "tune")
    kinds = ("relearn", "quantize", "prefill", "ban-eos")
    run("attack", *edit, "--scale", 1, *kinds, *data, *short, "--steps", "1", "--output", place / "attack")
    small = ("--steps", 1, "--batch-size", 2, "--samples", 4, "--sample-tokens", 2)
    run("distill", "--teacher", place / "fused", *forget, *retain, *judge, *small, "--output", place / "erased")
    run("compare", place / "eval-base", place / "eval-fused", "--output", place / "compare")
    return place


def records(*places: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for place in places:
        for file in sorted(place.rglob("sku_*.json")):
            yield file, json.loads(file.read_text(encoding="utf-8"))


def test_what_commands_leave_is_what_the_schemas_say(left: Path, lab: Path) -> None:
    seen = set()
    for file, record in records(left, lab):
        seen.add(record["schema"])
        try:
            validate(record)
        except jsonschema.ValidationError as error:
            pytest.fail(f"{file.relative_to(file.parents[1])}: {error.json_path}: {error.message[:300]}")
    wanted = ("attack", "compare", "distill", "eval", "fuse", "lab", "manifest", "negate", "run", "train", "tune", "tuned")
    assert seen == {f"sku.{name}/1" for name in wanted}
    assert collect([left])  # and readers take them


def test_every_key_that_a_schema_requires_is_missed(left: Path, lab: Path) -> None:
    for name, record in {record["schema"][4:-2]: record for _, record in records(left, lab)}.items():
        schema = jsonschema.Draft202012Validator(schema_of(name))
        assert schema.is_valid(record)
        for key in schema.schema["required"]:
            assert not schema.is_valid({other: value for other, value in record.items() if other != key}), f"{name}: {key}"


def test_more_keys_are_welcome_and_wrong_types_are_not(left: Path) -> None:
    record = json.loads((left / "eval-base/sku_eval.json").read_text(encoding="utf-8"))
    validate({**record, "later": 1})
    for wrong in ({"forget": []}, {"retain": None}, {"schema": "sku.eval/2"}, {"versions": {"torch": 2}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**record, **wrong}, schema_of("eval"))


def test_every_record_that_code_writes_has_a_schema() -> None:
    """By the calls of `record(directory, NAME, …)` and the schemas that are written out."""
    written = set()
    for folder in ("sku_vllm", "cli", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            written |= set(re.findall(r'\brecord\([^,()]+(?:\([^()]*\)[^,()]*)?, "([a-z_]+)"', text)) | set(
                re.findall(r'"sku\.([a-z-]+)/1"', text)
            )
    assert written == set(schema_names())


@pytest.mark.parametrize("name", schema_names())
def test_schemas_are_valid_and_documented(name: str) -> None:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["title"] and schema["description"] and schema["properties"]["schema"]["const"] == f"sku.{name}/1"

    def documented(part: Any, at: str) -> None:
        if isinstance(part, dict):
            for key, inner in part.get("properties", {}).items():
                assert "description" in inner or "$ref" in inner, f"{at}.{key}"
            for key, inner in part.items():
                documented(inner, f"{at}.{key}")

    documented(schema, name)
    assert all(inner["description"] for inner in schema["$defs"].values())


def test_schemas_use_what_the_reader_understands() -> None:
    """The reader checks types, required keys and items; a keyword that changes where values lie would be lost on it."""
    unknown = {"allOf", "oneOf", "not", "if", "patternProperties", "prefixItems", "dependentSchemas", "unevaluatedProperties"}
    for file in FOLDER.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert not [word for word in unknown if f'"{word}"' in text], file.name
    assert set(READ) <= set(schema_names())
    for name, keys in READ.items():
        assert set(keys) <= set(schema_of(name)["properties"])


def test_references_also_hold_between_the_files() -> None:
    """Another program may read the files as they are: the shared definitions lie beside them."""
    for file in FOLDER.glob("sku.*.json"):
        for target, name in re.findall(r'"\$ref": "([^#"]*)#/\$defs/([a-z_0-9]+)"', file.read_text(encoding="utf-8")):
            assert name in json.loads((FOLDER / target).read_text(encoding="utf-8"))["$defs"], file.name


def test_no_such_record() -> None:
    with pytest.raises(ConfigError, match="sku.evil/1: no such record; choose from attack, "):
        schema_of("evil")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "1"}, "scale is str, expected a number"),
        ({"scale": True}, "scale is bool, expected a number"),
        ({"curve": {}}, "curve is dict, expected a list"),
        ({"curve": [{"scale": 1.0, "excess": {}, "forget": {}}]}, "has no curve.0.retain"),
        ({"versions": {"torch": None}}, "versions.torch is NoneType, expected text"),
        ({"config": None}, "config is NoneType, expected an object"),
    ],
)
def test_readers_say_which_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"schema": "sku.tune/1", "scale": 1.0, "curve": [], "versions": {}, "config": {}}
    check_record(tmp_path / "sku_tune.json", "tune", good)
    with pytest.raises(DataError, match=re.escape(f"sku_tune.json: {message}; write it again")):
        check_record(tmp_path / "sku_tune.json", "tune", {**good, **change})


def test_readers_take_no_more_than_they_need(tmp_path: Path) -> None:
    """Keys nobody reads may be missing, optional ones may be null, whole numbers may be written 128.0, unknown records are left alone."""
    check_record(tmp_path, "demo", {"serving": None, "versions": {}, "config": {}})
    arm = {"requests": 3.0, "judged": 3, "harmful": 0, "refused": 3, "latency_p50_s": None}
    check_record(tmp_path, "demo", {"serving": {"original": arm}, "versions": {}, "config": {}})
    with pytest.raises(DataError, match="serving.original.requests is float, expected a whole number"):
        check_record(tmp_path, "demo", {"serving": {"original": {**arm, "requests": 3.5}}, "versions": {}, "config": {}})
    check_record(tmp_path, "a later command", [])
    assert set(TYPES) == {"object", "array", "string", "number", "integer", "boolean", "null"}


def test_the_state_of_a_server(tmp_path: Path) -> None:
    from sku_vllm.serving.arms import Arm
    from sku_vllm.serving.state import Served, StateFile, Table

    served = Served(Arm("negated", "lora", "adapter", 1.0), "", 1_000_001)
    StateFile(tmp_path).write(Table({"original": Served(Arm("original", "base")), "negated": served}, {"original": 1.0, "negated": 0.0}))
    validate(json.loads((tmp_path / "sku_state.json").read_text(encoding="utf-8")))
