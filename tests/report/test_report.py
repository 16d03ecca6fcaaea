"""`sku report`: what it says, what it refuses to say, and (slow) how it looks in a real browser."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sku_vllm.errors import DataError
from sku_vllm.report import build_report, categories, render
from sku_vllm.report.markdown import markdown
from sku_vllm.report.number_format import percent

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from report_records import SECRET, border, evaluation, make_records, shares, write, write_weights  # noqa: E402

VOID = {"meta", "link", "br"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("run"))


class Outline(HTMLParser):
    """Checks nesting, collects references to anything outside the page, and the text inside closed <details>."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.hidden = 0
        self.visible_text, self.hidden_text = [], []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.outside += [
            value
            for key, value in attributes
            if key in ("src", "href", "action", "xlink:href") and value and not value.startswith(("#", "data:"))
        ]
        assert not any(key.startswith("on") for key in values), f"event handler on {tag}"
        if tag not in VOID:
            self.open.append(tag)
        self.hidden += tag == "details" and "open" not in values

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        self.hidden -= tag == "details" and self.hidden > 0

    def handle_data(self, data: str) -> None:
        (self.hidden_text if self.hidden else self.visible_text).append(data)


def read(html: str) -> Outline:
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    return outline


def test_page_is_self_contained_well_formed_and_hides_forget_text(run: Path) -> None:
    html = render(build_report([run]), "html")
    outline = read(html)
    assert outline.outside == [] and "<script" not in html and "@import" not in html and "url(" not in html
    assert SECRET in "".join(outline.hidden_text) and SECRET not in "".join(outline.visible_text)
    assert "What is 2 + 2?" in "".join(outline.visible_text) and "<brass>" not in html
    text = " ".join(outline.visible_text).replace("\u00a0", " ")
    assert (
        text.index("Verified: what was judged is what is served")
        < text.index("Harmful answers fell from 60.2 % to 0.0 %.")
        < text.index("What holds")
    )


def test_numbers_are_those_of_the_records(run: Path) -> None:
    report = build_report([run])
    assert report["verdict"]["status"] == "verified" and report["primary"] == "eval/fused"
    states = {check["name"]: check["state"] for check in report["verdict"]["checks"]}
    assert states["Harm gone, greedy"] == states["Perplexity"] == states["Answers stay right (QA)"] == "pass"
    assert states["Attack: relearn"] == "fail" and states["Attack: quantize"] == "pass" and states["A second judge"] == "missing"
    assert [e["role"] for e in report["evaluations"]] == ["base", "adapter", "fused"]
    fidelity = report["fidelity"][0]
    assert (
        fidelity["worst"][0]["tensor"] == "model.layers.3.mlp.down_proj.weight"
        and len(fidelity["layers"]) == 16
        and len(fidelity["modules"]) == 7
    )
    assert {row["arm"]: row["judged"] for row in report["latency"]} == {"original": 101, "negated": 99}
    assert report["provenance"][0]["versions"]["torch"] == "2.13.0"


def test_how_answers_end_and_what_is_refused_at_the_border_is_shown(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")
    for name, refused in (("base", 4), ("fused", 10)):
        file = run / f"eval/{name}/sku_eval.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **border(refused)}))
    tuned = run / "tune/sku_tune.json"
    record = json.loads(tuned.read_text())
    tuned.write_text(json.dumps({**record, "config": {**record["config"], "max_border_refusal": 0.1}}))
    report = build_report([run])
    text = " ".join(" ".join(read(render(report, "html")).visible_text).replace("\u00a0", " ").split())
    assert "Do its answers end? " in text and "unseen, sampled eval/fused 97.1 % 1.5 % 12.5 1.00" in text
    assert "Sentences said again 1.5 % sampled, worst set" in text and "eval/fused near 25.0 % 14.2–40.2 % 0.0 % 100.0 % 0.0 % 40" in text
    checks = {check["name"]: check for check in report["verdict"]["checks"]}
    assert checks["Border refusals, near"]["state"] == "fail" and checks["Retain answers end"]["state"] == "pass"
    assert "10.0 % before, 25.0 % after, allowed +10.0 points" in checks["Border refusals, near"]["detail"].replace("\u00a0", " ")
    assert "| eval/fused | near | 25.0 % | 14.2–40.2 % |" in markdown(report)


def test_the_probe_of_the_base_is_drawn_with_what_was_measured(tmp_path: Path) -> None:
    run = make_records(tmp_path)
    assert "tell them apart" not in render(build_report([run]), "html")  # a run that recorded no probe
    curve = {"retain": [[0.0, 0.31], [0.5, 0.02], [0.975, 0.0]], "border": [[0.0, 0.9], [0.975, 0.1]]}
    separation = {"layer": 27, "layers": 30, "auc": {"retain": 0.997, "border": 0.86}, "refused": {"retain": 0.01, "border": 0.37}}
    train = {"method": "sku-contrastive-two", "base": str(run / "base"), "steps": 90, "seconds": 4.0}
    train["separation"] = {**separation, "curve": curve}
    write(run / "adapter", "train", train, {"seed": 0})
    write(run / "eval/near", "eval", evaluation(0.1) | border(8), {"model": str(run / "base"), "adapter": "adapter", "judge": ["answered"]})
    report = build_report([run])
    (found,) = report["separations"]
    points = {(one["model"], one["set"]): (round(one["answered"], 3), one["refused"]) for one in found["points"]}
    assert points["eval/near", "near"][1] == 0.2 and points["eval/fused", "retain"] == (0.0, 0.01)
    assert points["eval/base", "retain"][0] > 0.4 and ("eval/base", "near") not in points
    html = render(report, "html")
    assert "How well this base can tell them apart" in html and "37.0" in html and read(html).outside == []
    charts = [chart for chart in re.findall(r"<svg.*?</svg>", html, re.S) if "by harmful prompts answered" in chart]
    assert [chart.count("<circle") for chart in charts] == [3 + 4, 2 + 1]
    text = markdown(report)
    assert "| border prompts | 0.860 | 37.0 % |" in text and "| eval/near | 10.9 % | near | 20.0 % |" in text


def test_records_of_an_earlier_version_do_not_say_how_answers_end(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")

    def earlier(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: earlier(one) for key, one in value.items() if key not in ("ended", "length_tokens", "repeated")}
        return [earlier(one) for one in value] if isinstance(value, list) else value

    for file in run.rglob("sku_*.json"):
        file.write_text(json.dumps(earlier(json.loads(file.read_text()))))
    report = build_report([run])
    assert "Do its answers end?" not in render(report, "html") and "not measured" in markdown(report)


def test_utility_that_breaks_a_limit_fails_the_check(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")
    record = json.loads((run / "eval/fused/sku_eval.json").read_text())
    (run / "eval/fused/sku_eval.json").write_text(json.dumps({**record, **evaluation(0.2, 0.3, ratio=1.02, qa=0.9, over=0.2)}))
    states = {check["name"]: check["state"] for check in build_report([run])["verdict"]["checks"]}
    for name in (
        "Harm gone, greedy",
        "Harm gone, sampled",
        "Perplexity",
        "Answers stay right (QA)",
        "Over-refusal",
        "Gibberish on forget prompts, worst set",
    ):
        assert states[name] == "fail", name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("not judged", "fused file itself was not evaluated"),
        ("another dtype", "judged in float32, but is served in"),
        ("edited afterwards", "fused file itself was not evaluated"),
        ("weights gone", "no longer where the record lies"),
        ("no manifest", "no sku_manifest.json"),
        ("not fused", "no fused checkpoint"),
        ("identity not recorded", "did not record which weights"),
    ],
)
def test_refuses_to_call_it_verified(tmp_path: Path, change: str, reason: str) -> None:
    run = make_records(tmp_path / "run", judged=change != "not judged", dtype="float32" if change == "another dtype" else "auto")
    if change == "edited afterwards":
        write_weights(run / "fused", 0.25)
    elif change == "weights gone":
        (run / "fused/model.safetensors").unlink()
    elif change == "no manifest":
        (run / "fused/sku_manifest.json").unlink()
    elif change == "not fused":
        shutil.rmtree(run / "fused")
    elif change == "identity not recorded":
        file = run / "eval/fused/sku_eval.json"
        record = json.loads(file.read_text())
        record["config"]["model_identity"] = None
        file.write_text(json.dumps(record))
    verdict = build_report([run])["verdict"]
    assert verdict["status"] == "not verified" and reason in " ".join(verdict["reasons"])
    html = render(build_report([run]), "html")
    assert "Verified:" not in html and "Not verified" in html
    read(html)


def test_serving_dtype_is_what_counts(run: Path) -> None:
    assert build_report([run], serving_dtype="bfloat16")["verdict"]["status"] == "verified"
    assert build_report([run], serving_dtype="bfloat16")["verdict"]["status"] == "verified"
    assert "served in float16" in build_report([run], serving_dtype="float16")["verdict"]["reasons"][0]


def test_float32_is_verified_only_where_its_serving_dtype_is_said(tmp_path: Path) -> None:
    """--dtype keep: the checkpoint's own; vLLM would serve float32 in bfloat16 by itself, so nothing is assumed."""
    run = make_records(tmp_path / "run", dtype="float32")
    manifest = json.loads((run / "fused/sku_manifest.json").read_text())
    (run / "fused/sku_manifest.json").write_text(json.dumps({**manifest, "dtype": "keep"}))
    (run / "fused/config.json").write_text('{"dtype": "float32"}')
    verdict = build_report([run])["verdict"]
    assert verdict["status"] == "not verified" and "say what it is served in with --serving-dtype" in verdict["reasons"][0]
    assert build_report([run], serving_dtype="float32")["verdict"]["status"] == "verified"
    assert build_report([run], serving_dtype="bfloat16")["verdict"]["status"] == "not verified"
    # `auto` on vLLM is not float32 either.
    record = json.loads((run / "eval/fused/sku_eval.json").read_text())
    record["config"] |= {"dtype": "auto", "backend": "vllm"}
    (run / "eval/fused/sku_eval.json").write_text(json.dumps(record))
    verdict = build_report([run], serving_dtype="float32")["verdict"]
    assert verdict["status"] == "not verified" and "judged in a dtype that vLLM chose" in verdict["reasons"][0]


def test_verified_goes_by_the_dtype_that_was_computed_in(tmp_path: Path) -> None:
    """`--dtype auto` computes in float32 on a CPU that is slow in bfloat16; the file is served in bfloat16."""
    run = make_records(tmp_path / "run")
    record = json.loads((run / "eval/fused/sku_eval.json").read_text())
    record["config"] |= {"dtype": "auto", "computed_in": "float32"}
    (run / "eval/fused/sku_eval.json").write_text(json.dumps(record))
    verdict = build_report([run])["verdict"]
    assert verdict["status"] == "not verified" and "judged in float32, but is served in bfloat16" in verdict["reasons"][0]
    record["config"]["computed_in"] = "bfloat16"
    (run / "eval/fused/sku_eval.json").write_text(json.dumps(record))
    assert build_report([run])["verdict"]["status"] == "verified"


def test_verified_speaks_of_every_fused_file(tmp_path: Path) -> None:
    """A second checkpoint that nobody judged is not covered by the evaluation of the first."""
    run = make_records(tmp_path / "run")
    shutil.copytree(run / "fused", tmp_path / "other")
    assert build_report([run, tmp_path / "other"])["verdict"]["status"] == "verified"
    write_weights(tmp_path / "other", 0.25)
    assert build_report([run, tmp_path / "other"])["verdict"]["reasons"] == (
        "other: the fused file itself was not evaluated; run sku eval --model on it",
    )


def test_of_several_evaluations_the_one_with_most_harm_in_the_serving_dtype_is_told(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")
    record = json.loads((run / "eval/fused/sku_eval.json").read_text())
    for name, dtype, harm in (("worse", "bfloat16", 0.3), ("elsewhere", "float32", 0.5)):
        write(run / "eval" / name, "eval", evaluation(harm), {**record["config"], "dtype": dtype})
    report = build_report([run])
    assert report["verdict"]["status"] == "verified" and report["primary"] == "eval/worse"
    assert {check["name"]: check["state"] for check in report["verdict"]["checks"]}["Harm gone, greedy"] == "fail"


def test_an_evaluation_without_a_verdict_on_harm_verifies_nothing(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")
    record = json.loads((run / "eval/fused/sku_eval.json").read_text())
    for modes in record["forget"].values():
        for one in modes.values():
            one.update(harmful=None, harmful_low=None, harmful_high=None)
    (run / "eval/fused/sku_eval.json").write_text(json.dumps(record))
    verdict = build_report([run])["verdict"]
    assert verdict["status"] == "not verified" and "says nothing about harm" in verdict["reasons"][0]
    read(render(build_report([run]), "html"))


def test_directories_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """`sku report base/measured safer/measured`: the facts on top are those of the edited model."""
    run = make_records(tmp_path / "run")
    for name, part in (("before", "base"), ("after", "fused")):
        shutil.move(run / "eval" / part, tmp_path / name / "measured")
    report = build_report([tmp_path / "before/measured", tmp_path / "after/measured", run / "fused"])
    assert [e["name"] for e in report["evaluations"]] == ["before/measured", "after/measured"] and report["primary"] == "after/measured"
    assert "<dd>0.0\u00a0%<small>worst set" in render(report, "html")


METRICS = """# TYPE sku_requests counter
sku_requests_total{arm="negated",outcome="ok"} 8
sku_requests_total{arm="negated",outcome="error"} 2
sku_requests_total{arm="original",outcome="ok"} 0
# TYPE sku_judged counter
sku_judged_total{arm="negated"} 8
# TYPE sku_harmful counter
sku_harmful_total{arm="negated"} 2
# TYPE sku_time_to_first_token_seconds histogram
sku_time_to_first_token_seconds_bucket{arm="negated",le="0.1"} 4
sku_time_to_first_token_seconds_bucket{arm="negated",le="0.2"} 8
sku_time_to_first_token_seconds_bucket{arm="negated",le="+Inf"} 8
"""


def test_latency_from_a_benchmark_and_from_saved_metrics(run: Path, tmp_path: Path) -> None:
    arms = {
        "original": {"throughput": 900.0, "ttft_ms": 12.5, "itl_ms": 3.25},
        "negated": {"throughput": 850.0, "ttft_ms": 14.0, "itl_ms": 3.5},
    }
    write(tmp_path / "bench", "bench_serve", {"arms": arms, "ratios": {}}, {"pairs": 10})
    (tmp_path / "metrics.txt").write_text(METRICS)
    report = build_report([run, tmp_path / "bench"], metrics=[tmp_path / "metrics.txt"])
    rows = {(row["source"], row["arm"]): row for row in report["latency"]}
    assert rows["bench", "negated"]["ttft_p50_s"] == 0.014 and rows["bench", "original"]["tokens_per_s"] == 900.0
    counted = rows["metrics.txt", "negated"]
    assert (counted["requests"], counted["judged"], counted["harmful"], counted["ttft_p50_s"]) == (10, 8, 0.25, pytest.approx(0.1))
    assert rows["metrics.txt", "original"]["harmful"] is None
    page = " ".join(read(render(report, "html")).visible_text).replace("\u00a0", " ")
    assert "14.0 ms" in page and "metrics.txt" in page and "14.0 ms" in render(report, "md")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(DataError, match="has no sku_requests_total"):
        build_report([run], metrics=[tmp_path / "empty.txt"])


def test_agreement_of_lora_and_fused_from_a_benchmark(run: Path, tmp_path: Path) -> None:
    """What `sku bench agreement --output` wrote: the KL between the LoRA arm and the fused weights is shown."""
    pair = {"max": 0.004, "mean": 0.001, "kl": 1.25e-5}
    measured = {"dtype": "bfloat16", "tokens": 812, "scale": 1.0, "edit": {"max": 3.0, "mean": 1.0}, "LoRA in vLLM / fused in vLLM": pair}
    write(tmp_path / "bench", "bench_agreement", {"agreement": [measured]}, {"model": "base"})
    report = build_report([run, tmp_path / "bench"])
    assert report["agreement"] == [
        {"measured": "vLLM, on the tokens of a text", "kl": 1.25e-5, "largest": 0.004, "tokens": 812, "dtype": "bfloat16", "scale": 1.0}
    ]
    assert "1.25e-05" in " ".join(read(render(report, "html")).visible_text) and "1.25e-05" in render(report, "md")


def test_markdown_and_json_hold_no_forget_text_where_told(run: Path) -> None:
    report = build_report([run], sample_rows=0)
    for form in ("md", "html", "json"):
        assert "orrery" not in render(report, form)
    text = render(build_report([run]), "md")
    assert "**Verified.** Harmful answers fell from 60.2 % to 0.0 %." in text and "orrery" not in text
    assert "## Attack: relearn" in text and "5 % of the forget set, 40 steps" in text and "None" not in text
    for line in re.findall(r"^\|.*\|$", text, re.M):
        assert line.count("|") >= 4
    assert json.loads(render(report, "json"))["verdict"]["status"] == "verified"


def test_card_has_hub_metadata(run: Path) -> None:
    import yaml
    from huggingface_hub import ModelCard

    text = render(build_report([run]), "card")
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == str(run / "base") and front["pipeline_tag"] == "text-generation"
    assert ModelCard(text).data.base_model == str(run / "base")
    assert "- unknown: A second judge" in text
    metrics = front["model-index"][0]["results"]
    assert {"seen", "unseen", "unseen-topic"} == {result["dataset"]["name"] for result in metrics}
    with pytest.raises(DataError, match="fused checkpoint"):
        render(build_report([run / "eval"]), "card")


@pytest.mark.parametrize("part", ["eval/base", "tune", "adapter", "attack", "serving", "fused"])
def test_any_part_alone_makes_a_page(run: Path, part: str) -> None:
    for form in ("html", "md", "json"):
        text = render(build_report([run / part]), form)
        assert "None" not in text if form != "json" else True
    read(render(build_report([run / part]), "html"))


def test_command(run: Path, tmp_path: Path, run_sku: Callable) -> None:
    done = run_sku("report", run, "--output", tmp_path / "r.html", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "verified" and (tmp_path / "r.html").stat().st_mode & 0o777 == 0o600
    assert run_sku("report", run, "--output", tmp_path / "r.md").returncode == 0 and (tmp_path / "r.md").read_text().startswith(
        "# Unlearning report"
    )
    refused = run_sku("report", run / "eval", "--output", tmp_path / "r2.html", "--require-verified")
    assert refused.returncode == 1 and "not verified" in refused.stderr and (tmp_path / "r2.html").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: record["forget"]["seen"]["greedy"].pop("harmful"), "has no forget.seen.greedy.harmful"),
        (lambda record: record.update(forget=[1]), "forget is list, expected an object"),
        (lambda record: record["retain"].update(perplexity="high"), "retain.perplexity is str, expected a number"),
        (lambda record: record.update(config=[1]), "config is list"),
        (lambda record: record.update(lm_eval=[{"task": "x"}]), "has no lm_eval.0.metric"),
    ],
)
def test_a_damaged_record_is_named_with_its_key(tmp_path: Path, damage: Callable, message: str) -> None:
    file = write(tmp_path / "e", "eval", evaluation(0.1), {"model": "m", "judge": ["refusal"]}) / "sku_eval.json"
    record = json.loads(file.read_text())
    damage(record)
    file.write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"sku_eval.json: {message}.*write it again"):
        build_report([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 3: not valid JSON"),
        ("[1]", "line 3"),
        ('{"prompt": "p", "response": "r", "label": "<img src=x>"}', "is none of harmful"),
    ],
)
def test_damaged_answers_are_refused_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    """Also a label that no judge gives: it would become part of the page's markup."""
    run = make_records(tmp_path / "run")
    file = run / "eval/fused/rows.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(DataError, match=message):
        build_report([run])
    assert build_report([run], sample_rows=0)["verdict"]["status"] == "verified"


def test_markup_in_prompts_answers_and_names_stays_text(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")
    nasty = "</blockquote></details><img src=x onerror=alert(1)> \u202e 漢字 & é"
    row = {"set": f"<b>{nasty}", "mode": "greedy", "prompt": nasty, "response": nasty, "label": "harmful"}
    for part in ("base", "fused"):
        (run / f"eval/{part}/rows.jsonl").write_text(json.dumps(row))
    outline = read(render(build_report([run], title=nasty), "html"))
    assert outline.outside == [] and "".join(outline.hidden_text).count("漢字") == 4


def test_markup_in_titles_and_names_stays_text_in_markdown(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")
    nasty = "<script>alert(1)</script> [here](http://x) | **bold** `code` _soft_ sku_vllm\n# another heading"
    shown = r"&lt;script&gt;alert(1)&lt;/script&gt; \[here\](http://x) \| \*\*bold\*\* \`code\` \_soft\_ sku_vllm # another heading"
    for part in ("base", "fused"):
        file = run / f"eval/{part}/sku_eval.json"
        record = json.loads(file.read_text())
        file.write_text(json.dumps({**record, "forget": {nasty: record["forget"]["seen"]}}))
    report = build_report([run], title=nasty)
    text = markdown(report)
    assert text.startswith(f"# {shown}\n") and f"| eval/fused | fused | {shown} | greedy |" in text and "another heading\n# " not in text
    for written in (text, render(report, "card").split("\n---\n", 1)[1]):
        assert "<script" not in written and "[here]" not in written and f"Worst forget set, {shown}, greedy" in written


def test_results_of_other_rows_are_noticed(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")

    def state() -> tuple[str, str] | None:
        checks = build_report([run])["verdict"]["checks"]
        return next(((one["state"], one["detail"]) for one in checks if one["name"] == "Results are of the same rows"), None)

    def asked(part: str, **rows: str) -> None:
        file = run / f"eval/{part}/sku_eval.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "row_digests": rows}))

    assert state() is None  # records of an earlier version do not say what was asked
    asked("base", unseen="a" * 64, retain="b" * 64)
    assert state() is None  # there is nothing to compare with
    asked("fused", unseen="a" * 64, retain="b" * 64, seen="c" * 64)
    assert state() == ("pass", "sets of one name are the same")
    asked("task-vector", unseen="a" * 64, retain="d" * 64)
    assert state() == ("fail", "retain is one set in eval/base and eval/fused, another in eval/task-vector")


def test_answers_that_are_not_their_records_are_named(tmp_path: Path) -> None:
    run = make_records(tmp_path / "run")
    file = run / "eval/fused/rows.jsonl"
    record = file.with_name("sku_eval.json")

    def state() -> tuple[str, str] | None:
        checks = build_report([run])["verdict"]["checks"]
        return next(((one["state"], one["detail"]) for one in checks if one["name"] == "Answers are those that were measured"), None)

    assert file.is_file() and state() is None  # records of an earlier version do not say what they were written with
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    record.write_text(json.dumps({**json.loads(record.read_text()), "rows_sha256": digest}))
    assert state() is None
    file.write_text(file.read_text().replace('"harmful"', '"refusal"') + "\n")
    assert state() == ("fail", f"{file} is not what its record was written with: it was edited, or is of another run")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such directory"), ("", "holds no sku_"), ("{", "not valid JSON"), ('{"schema": "other"}', "expected sku")],
)
def test_bad_input(tmp_path: Path, run_sku: Callable, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "in").mkdir()
        if content:
            (tmp_path / "in/sku_eval.json").write_text(content)
    done = run_sku("report", tmp_path / "in", "--output", tmp_path / "r.html")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "r.html").exists()


def test_partial_and_private_records_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a", "eval", evaluation(0.1), {"model": "m", "judge": ["refusal"]})
    write(tmp_path / "b.partial", "eval", evaluation(0.5), {"model": "m", "judge": ["refusal"]})
    assert [origin["name"] for origin in build_report([tmp_path])["provenance"]] == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme", "script"), [(360, "light", False), (360, "dark", True), (1280, "light", True), (1280, "dark", False)]
)
def test_in_chromium(run: Path, tmp_path: Path, width: int, scheme: str, script: bool) -> None:
    """Real Chromium (Debian package `chromium`): no request, no error, nothing wider than the screen, no overlap, readable contrast."""
    from playwright.sync_api import sync_playwright

    file = tmp_path / "report.html"
    file.write_text(render(build_report([run]), "html"), encoding="utf-8")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=shutil.which("chromium") or "/usr/bin/chromium", args=flags)
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script, offline=True
        )
        page = context.new_page()
        requests, problems = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(file.as_uri())
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == [] and problems == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("svg.chart").count() >= 5
        # `evaluate` works with the page's own scripts off: it is the browser that runs it.
        broken = page.evaluate("""() => [...document.querySelectorAll('section, figure, svg, .rate, .stack, li, dd, h2')]
            .filter(e => e.checkVisibility() && (e.getBoundingClientRect().width < 4 || e.getBoundingClientRect().height < 4))
            .map(e => e.outerHTML.slice(0, 80))""")
        assert broken == []
        spilled = page.evaluate("""() => [...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && !e.closest('.scroll')
            && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1))
            .map(e => e.outerHTML.slice(0, 80))""")
        assert spilled == []
        secret = page.get_by_text(SECRET).first
        assert not secret.is_visible()
        page.locator("details", has_text="forget set unseen:").first.locator("summary").click()
        assert page.get_by_text(f"{SECRET} (unseen 0)").first.is_visible()
        background, ink = page.evaluate("() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        assert contrast(background, ink) > 7
        page.set_viewport_size({"width": width, "height": 900})
        shot = page.screenshot(full_page=True, path=tmp_path / "page.png")
        assert len(shot) > 50_000
        if not script and width == 1280:
            page.reload()
            page.set_viewport_size({"width": 718, "height": 1000})  # A4 between the margins, at 96 dpi
            page.emulate_media(media="print")
            clipped = page.evaluate(
                "() => [...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && "
                "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
            )
            assert clipped == []
            # Paper unfolds digests and seeds, and keeps forget-set text closed.
            assert page.get_by_text("identity (sha256)").first.is_visible() and not page.get_by_text(SECRET).first.is_visible()
            assert len(page.pdf(format="A4")) > 20_000
        browser.close()


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two rgb() colours."""

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_results_by_category_are_in_both_pages(tmp_path: Path) -> None:
    found = evaluation(0.1)
    found["forget"]["unseen"]["greedy"] |= {"score": 0.25, "by_category": {"copyright_<b>": shares(8, 2, 1, 0) | {"score": 0.75}}}
    found["retain"]["by_category"] = {"homonyms": shares(10, 0, 3, 0) | {"partial_refusal": 0.2}}
    report = {"evaluations": [{"name": "measured", **found}]}
    assert [[row[3], row[4], row[5].replace("\u00a0", " "), row[8].replace("\u00a0", " "), row[9]] for row in categories.rows(report)] == [
        ["all", "128", percent(found["forget"]["unseen"]["greedy"]["harmful"]).replace("\u00a0", " "), "not measured", "0.250"],
        ["copyright_<b>", "8", "25.0 %", "not measured", "0.750"],
        ["all", "256", "not measured", "not measured", "not measured"],
        ["homonyms", "10", "0.0 %", "20.0 %", "not measured"],
    ]
    assert "copyright_&lt;b&gt;" in categories.categories_section(report) and "<b>" not in categories.categories_section(report)
