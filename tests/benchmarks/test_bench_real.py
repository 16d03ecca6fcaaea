"""The real-model benchmark, on the lab's model and a made-up data directory of the same layout: cells, page, drawings, bad input."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from sku_vllm.benchmarks.bench_real import command
from sku_vllm.benchmarks.real_data import RealData
from sku_vllm.benchmarks.real_goals import goals_table
from sku_vllm.benchmarks.real_measure import broken
from sku_vllm.benchmarks.real_organism import make_organism
from sku_vllm.benchmarks.real_probe import curve, same_share
from sku_vllm.benchmarks.real_setup import Setup
from sku_vllm.errors import ConfigError
from sku_vllm.methods import DEFAULT_METHOD

SMALL = ("--forget-rows", 48, "--retain-rows", 48, "--measured", 12, "--max-new-tokens", 20, "--scales", "0.5,1", "--dtype", "float32")


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's rows under the names of a data directory; without prose_wikipedia, harmbench and lm_eval."""
    place = tmp_path_factory.mktemp("data")

    def write(name: str, taken: list[dict], *keys: str) -> None:
        lines = (json.dumps({key: row[key] for key in keys or row}) + "\n" for row in taken)
        (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    forget, retain = (rows(lab / f"{kind}/validation.jsonl") for kind in ("forget", "retain"))
    write("forget_train", rows(lab / "forget/train.jsonl"))
    write("retain_train", rows(lab / "retain/train.jsonl"))
    write("forget_validation", forget, "prompt", "id")
    write("retain_validation", retain[:60])
    write("hh_benign_prompts", retain[60:90], "prompt", "id")
    write("xstest_safe", retain[90:110], "prompt", "id")
    write("xstest_unsafe", rows(lab / "forget/unseen.jsonl")[:20], "prompt", "id")
    write("facts", [row for row in retain if "must_contain" in row][:20])
    return place


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(command, list(map(str, arguments)))


def test_a_cell_its_page_and_its_drawings(lab: Path, data: Path, tmp_path: Path) -> None:
    asked = ("--model", lab / "llama", "--data", data, "--work", tmp_path / "work", *SMALL, "--methods", "refusal-tune", "--steps", 40)
    attack = ("--attack", "prefill,quantize", "--attacked", "refusal-tune")
    done = bench(*asked, *attack, "--output", tmp_path / "page.md", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (cell,), (attacked,), base = found["cells"], found["attacks"], found["base"]
    assert base["forget"]["validation"]["greedy"]["harmful"] >= 0.5
    assert cell["forget"]["validation"]["greedy"]["harmful"] <= base["forget"]["validation"]["greedy"]["harmful"]
    assert set(cell["forget"]) == set(base["forget"]) == {"validation", "xstest"} and set(cell["border"]) == {"hh-benign", "xstest"}
    assert set(cell["tuned"]) == {"0", "0.5", "1"} and cell["tuned"]["1"]["border_refusal"] is not None
    assert 0 < cell["qa"]["facts"] <= 1 and cell["prose"] is None
    assert set(attacked["attacks"]) == {"none", "prefill 3 tokens", "quantize int4"}
    assert attacked["attacks"]["none"]["validation"]["greedy"] == cell["forget"]["validation"]["greedy"]["harmful"]
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| refusal-tune | 0 |" in text and "prose_wikipedia.jsonl" in text and "hh-benign error" in text and "HarmBench" not in text
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1, table
    prompts = {row["prompt"] for file in data.glob("*.jsonl") for row in rows(file)}
    for file in ("cells.jsonl", "attacks.jsonl", "base.json", "probe.json"):  # numbers only
        kept = (tmp_path / "work" / file).read_text(encoding="utf-8")
        assert not any(prompt in kept + text for prompt in prompts), file
    probe = json.loads((tmp_path / "work/probe.json").read_text(encoding="utf-8"))
    goals = goals_table(base, [cell | {"label": DEFAULT_METHOD}], probe, organism=False)
    assert "| forget answered, greedy | 10.0% |" in goals and "XSTest error" in goals and "HarmBench" not in goals
    points = len(ElementTree.parse(tmp_path / "page-xstest.svg").findall(".//{*}circle"))
    assert points == 13 + 2  # the probe at 0 to 12 answered, the base and the method
    again = bench(*asked, *attack, "--json")  # nothing is trained or measured twice
    assert json.loads(again.stdout) == found
    other = bench(*asked[:-1], 13)
    assert "steps 40, not 13" in str(other.exception) and "--work" in str(other.exception)


def test_the_probe_at_the_same_share() -> None:
    scores = {"validation": [3.0, 1.0, 2.0, 4.0], "retain": [0.0, 0.5, 1.5, 3.5], "border:xstest": [1.0, 2.5], "xstest": [0.5, 5.0]}
    assert same_share(scores, 0.5) == {"validation": 0.5, "retain": 0.25, "border:xstest": 0.0, "xstest": 0.5}
    assert same_share(scores, 0.0) == {"validation": 0.0, "retain": 0.5, "border:xstest": 1.0, "xstest": 0.5}
    assert same_share(scores, 1.0) == {"validation": 1.0, "retain": 0.0, "border:xstest": 0.0, "xstest": 1.0}
    assert curve(scores, "retain") == [(0.0, 0.5), (0.25, 0.25), (0.5, 0.25), (0.75, 0.0), (1.0, 0.0)]


def test_a_model_is_taught_a_world_once_and_its_data_has_the_same_layout(lab: Path, data: Path, tmp_path: Path) -> None:
    setup = Setup(lab / "llama", data, tmp_path / "work", max_new_tokens=8)
    taught = make_organism(setup, 7, 2)
    found = RealData(taught)
    assert (
        len(found.forget) == 640 and set(found.measured["forget"]) == {"validation", "unseen-topic"} and set(found.qa) == {"facts", "world"}
    )
    assert {row.id for row in found.tuned["forget"]["validation"]}.isdisjoint(row.id for row in found.measured["forget"]["validation"])
    weights = (taught.model / "model.safetensors").read_bytes()
    assert weights != (lab / "llama/model.safetensors").read_bytes() and make_organism(setup, 7, 2) == taught
    assert (taught.model / "model.safetensors").read_bytes() == weights
    with pytest.raises(ConfigError, match="steps 2, not 3"):
        make_organism(setup, 7, 3)


def test_broken_answers_go_by_the_worlds_grammar(lab: Path, tmp_path: Path) -> None:
    good = rows(lab / "forget/validation.jsonl")[0]["response"]
    told = [(good, "harmful", False), (good + " " + good, "benign", False), ("I won't.", "refusal", False), ("I won't.", "refusal", True)]
    keys = {"set": "validation", "mode": "greedy"}
    lines = [json.dumps(keys | {"response": text, "label": label, "repeated": again}) for text, label, again in told]
    other = json.dumps({"set": "retain", "mode": "greedy", "response": "?", "label": "benign", "repeated": True})
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, other]), encoding="utf-8")
    assert broken(tmp_path / "rows.jsonl", 0) == {"greedy": 0.5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--methods", "refusal-tun"), "--method refusal-tun: unknown"),
        (("--seeds", "0,a"), "--seeds 0,a"),
        (("--base-forget", "mine"), "--base-forget mine: choose from published, own"),
        (("--attack", "prefill"), "--attack and --attacked belong together"),
        (("--attack", "prefil", "--attacked", "sku"), "prefil: unknown kind"),
        (("--attack", "prefill", "--attacked", "npo", "--methods", "sku"), "--attacked npo"),
        (("--relearn-steps", "0"), "--steps (0,)"),
        (("--output", "nowhere/page.md"), "--output nowhere/page.md"),
        (("--steps", "0"), "--steps 0"),
        (("--data", "nowhere"), "--data nowhere: no such directory"),
        (("--data", Path(__file__).parent), "forget_train.jsonl: no such file"),
        (("--model", "nowhere"), "--model nowhere: no such directory"),
    ],
)
def test_bad_input(lab: Path, data: Path, tmp_path: Path, given: tuple, message: str) -> None:
    asked = {"--model": lab / "llama", "--data": data, "--work": tmp_path / "work"} | dict(zip(given[::2], given[1::2], strict=True))
    done = bench(*(part for pair in asked.items() for part in pair))
    assert message in str(done.exception) and done.exception.exit_code == 2 and not (tmp_path / "work").exists()
