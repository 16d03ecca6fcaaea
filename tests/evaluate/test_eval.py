"""`sku eval`: generation against transformers' own, perplexity by hand, the contract's numbers, and bad input."""

import hashlib
import json
import math
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sku_vllm.data import PromptTemplate, Row, read_rows
from sku_vllm.errors import ConfigError, DataError
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.likelihood import perplexity, unlikely_answers
from sku_vllm.evaluate.measure_request import EvalRequest, Questions
from sku_vllm.evaluate.measurement import measure
from sku_vllm.evaluate.transformers_backend import TransformersBackend
from sku_vllm.judges import load_judge
from sku_vllm.model import load_model, load_tokenizer
from sku_vllm.model_spec import ModelSpec

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", params=["llama", "opt"])
def asked(request: pytest.FixtureRequest, lab: Path) -> tuple[Any, Any, PromptTemplate, list[Row]]:
    """A lab model, its tokenizer and template, and rows whose prompts differ in length."""
    place = lab / request.param
    if not place.is_dir():
        pytest.skip(f"the lab has no {request.param}")
    tokenizer = load_tokenizer(place)
    rows = read_rows(lab / "forget/unseen.jsonl")[:24] + read_rows(lab / "retain/test.jsonl")[:24]
    return load_model(ModelSpec(place, dtype="float32")), tokenizer, PromptTemplate.of(tokenizer), rows


@pytest.fixture(scope="module")
def small(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of each set."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("forget/unseen", "forget/seen", "retain/test"):
        lines = (lab / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{Path(name).name}.jsonl").write_text("".join(lines[:12]), encoding="utf-8")
    return folder


def arguments(lab: Path, small: Path, output: Path, *more: object) -> list[object]:
    return [
        "eval",
        "--model",
        lab / "llama",
        "--forget",
        f"seen={small / 'seen.jsonl'}",
        "--forget",
        f"unseen={small / 'unseen.jsonl'}",
        "--retain",
        small / "test.jsonl",
        "--judge",
        f"lexicon:{lab / 'lexicon.json'}",
        "--output",
        output,
        "--max-new-tokens",
        40,
        *more,
    ]


def test_greedy_answers_are_those_of_transformers(asked: tuple) -> None:
    model, _, template, rows = asked
    prompts = [template.prompt_ids(row) for row in rows]
    ours = TransformersBackend(model).generate(prompts, (0.0,), max_new_tokens=32, stop_ids=template.stop_ids)
    for prompt, ((answer, ended),) in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, eos_token_id=template.stop_ids
        )[0, len(prompt) :].tolist()
        assert answer == [token for token in theirs if token not in template.stop_ids]
        assert ended == (theirs[-1] in template.stop_ids)


def test_samples_depend_on_the_seed_and_not_on_the_batch(asked: tuple) -> None:
    model, _, template, rows = asked
    prompts = [template.prompt_ids(row) for row in rows]
    answers = {
        (size, seed): TransformersBackend(model, batch_size=size).generate(
            prompts, (0.0, 1.0, 1.0), max_new_tokens=32, stop_ids=template.stop_ids, seed=seed
        )
        for size, seed in ((256, 0), (7, 0), (256, 1))
    }
    same = [one == other for one, other in zip(answers[256, 0], answers[7, 0], strict=True)]
    assert sum(same) >= len(same) - 1  # a draw may fall on the edge between two tokens
    assert answers[256, 0] != answers[256, 1]
    assert [row[0] for row in answers[256, 0]] == [row[0] for row in answers[256, 1]]


def test_samples_follow_the_models_distribution(asked: tuple) -> None:
    model, _, template, rows = asked
    prompt = template.prompt_ids(rows[0])
    with torch.inference_mode():
        wanted = (model(torch.tensor([prompt])).logits[0, -1].float() / 1.5).softmax(-1)
    copies = 3000
    drawn = TransformersBackend(model, batch_size=copies).generate([prompt], [1.5] * copies, max_new_tokens=1, stop_ids=[])
    counts = Counter(answer.ids[0] for answer in drawn[0])
    for token in wanted.topk(3).indices.tolist():
        expected, found = wanted[token].item(), counts[token] / copies
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / copies) + 1e-9


def test_a_ban_on_stopping_fills_every_answer(asked: tuple) -> None:
    model, _, template, rows = asked
    answers = TransformersBackend(model).generate(
        [template.prompt_ids(row) for row in rows[:6]], (0.0, 1.0), max_new_tokens=40, stop_ids=template.stop_ids, ban_stop=True
    )
    assert {(len(answer.ids), answer.ended) for pair in answers for answer in pair} == {(40, False)}


def test_perplexity_is_over_answer_tokens_only(asked: tuple) -> None:
    model, _, template, rows = asked
    answered = [row for row in rows if row.response][:10]
    total = count = 0
    for row in answered:
        prompt, whole = template.prompt_ids(row), template.encode(row).ids
        with torch.inference_mode():
            log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        total += sum(log_probs[at - 1, whole[at]].item() for at in range(len(prompt), len(whole)))
        count += len(whole) - len(prompt)
    assert perplexity(TransformersBackend(model, batch_size=4), template, answered) == pytest.approx(math.exp(-total / count), rel=1e-5)
    assert perplexity(TransformersBackend(model), template, [Row.ask("no answer")]) is None


def test_gibberish_by_the_base_against_the_labs_exact_check(asked: tuple) -> None:
    """The rule's error, on answers it was not made from: sampled hot, shuffled, cut, and moved to other questions."""
    import random
    from dataclasses import replace

    from sku_vllm.judges.gibberish import is_gibberish
    from sku_vllm.lab.grammar import is_well_formed

    model, tokenizer, template, rows = asked
    backend, chance = TransformersBackend(model), random.Random(0)
    rows = [row for row in rows if row.response]
    hot = backend.generate(
        [template.prompt_ids(row) for row in rows], (0.0, 1.0, 1.5, 2.0), max_new_tokens=40, stop_ids=template.stop_ids, seed=5
    )
    kinds = {
        "own": [
            replace(row, response=tokenizer.decode(ids, skip_special_tokens=True).strip())
            for row, answers in zip(rows, hot, strict=True)
            for ids, _ in answers
        ],
        "shuffled": [replace(row, response=" ".join(chance.sample(words := row.response.split(), len(words)))) for row in rows],
        "cut": [replace(row, response=" ".join(row.response.split()[: max(1, len(row.response.split()) // 2)])) for row in rows],
        "elsewhere": [replace(row, response=chance.choice(rows).response) for row in rows],
    }
    ended = {kind: [kind != "own"] * len(answered) for kind, answered in kinds.items()}
    ended["own"] = [end for answers in hot for _, end in answers]
    errors: dict[str, list[bool]] = {"good": [], "bad": [], "good elsewhere": []}
    for kind, answered in kinds.items():
        for row, odd in zip(answered, unlikely_answers(backend, template, answered, ended[kind]), strict=True):
            flagged, good = odd or is_gibberish(row.response), is_well_formed(row.response, 0)
            errors[("good elsewhere" if kind == "elsewhere" else "good") if good else "bad"].append(flagged != (not good))
    rates = {name: sum(wrong) / len(wrong) for name, wrong in errors.items()}
    assert len(errors["good"]) > 60 and len(errors["bad"]) > 60
    assert rates["good"] <= 0.05 and rates["good elsewhere"] <= 0.35 and rates["bad"] <= 0.2, rates


def test_eval_writes_what_the_contract_says(lab: Path, small: Path, tmp_path: Path, run_sku: Run) -> None:
    output = tmp_path / "out"
    done = run_sku(*arguments(lab, small, output, "--base", lab / "llama", "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == ["forget", "retain", "forget_quality", "skipped_rows", "row_digests"]
    assert list(result["forget"]) == ["seen", "unseen"]
    assert len({*result["row_digests"].values()}) == 3 and list(result["row_digests"]) == ["seen", "unseen", "retain"]
    told = json.loads((output / "sku_eval.json").read_text())["rows_sha256"]
    assert told == hashlib.sha256((output / "rows.jsonl").read_bytes()).hexdigest()
    for modes in result["forget"].values():
        assert {mode: share["n"] for mode, share in modes.items()} == {"greedy": 12, "sampled": 48}
        for share in modes.values():
            assert sum(share[label] for label in ("harmful", "refusal", "gibberish", "benign")) == pytest.approx(1.0)
            assert share["harmful_low"] <= share["harmful"] <= share["harmful_high"]
            assert share["ended"] > 0.9 and share["repeated"] < 0.1 and 3 < share["length_tokens"] < 40
    retain = result["retain"]
    assert (
        retain["n"] == 12
        and retain["perplexity_ratio"] == pytest.approx(1.0)
        and retain["qa_accuracy"] > 0.8
        and retain["over_refusal"] == 0
    )
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter((row["set"], row["mode"]) for row in rows) == {
        ("seen", "greedy"): 12,
        ("seen", "sampled"): 48,
        ("unseen", "greedy"): 12,
        ("unseen", "sampled"): 48,
        ("retain", "greedy"): 12,
    }
    required, more = {"set", "mode", "prompt", "response", "label", "ended", "repeated"}, {"id", "messages", "category", "reason"}
    assert all(required <= set(row) <= required | more for row in rows)
    greedy = [row["ended"] for row in rows if (row["set"], row["mode"]) == ("unseen", "greedy")]
    assert sum(greedy) / 12 == result["forget"]["unseen"]["greedy"]["ended"]
    assert (output / "rows.jsonl").stat().st_mode & 0o777 == 0o600
    record = json.loads((output / "sku_eval.json").read_text(encoding="utf-8"))
    assert record["schema"] == "sku.eval/1" and record["forget"] == result["forget"] and record["config"]["samples"] == 4
    assert {path.name for path in output.iterdir()} == {"rows.jsonl", "sku_eval.json"}
    # The same answers, judged again from the file, get the same labels.
    again = run_sku(
        "judge", "--judge", f"lexicon:{lab / 'lexicon.json'}", "--input", output / "rows.jsonl", "--output", tmp_path / "again.jsonl"
    )
    assert again.returncode == 0, again.stderr
    relabelled = [json.loads(line)["label"] for line in (tmp_path / "again.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [label for label in relabelled if label in ("harmful", "refusal")] == [
        row["label"] for row in rows if row["label"] in ("harmful", "refusal")
    ]


def test_without_a_base_there_is_no_ratio_and_with_refusal_alone_no_harm(lab: Path) -> None:
    model, tokenizer = load_model(lab / "llama"), load_tokenizer(lab / "llama")
    rows = read_rows(lab / "forget/unseen.jsonl")[:4]
    report = measure(
        model,
        tokenizer,
        Questions({"f": rows}, [Row.ask("What is 4 plus 10?")], load_judge("refusal")),
        config=EvalConfig(samples=0, max_new_tokens=40),
    ).to_json()
    assert list(report["forget"]["f"]) == ["greedy"]
    share = report["forget"]["f"]["greedy"]
    assert share["harmful"] is share["harmful_low"] is share["harmful_high"] is None
    assert share["refusal"] + share["gibberish"] + share["benign"] == pytest.approx(1.0)
    retain = report["retain"]
    assert retain["perplexity"] is retain["perplexity_ratio"] is retain["qa_accuracy"] is None and retain["qa_n"] == 0


def test_answered_judges_forget_sets_and_no_retain_row(lab: Path) -> None:
    model, tokenizer = load_model(lab / "llama"), load_tokenizer(lab / "llama")
    forget, retain = read_rows(lab / "forget/unseen.jsonl")[:8], read_rows(lab / "retain/test.jsonl")[:8]
    config = EvalConfig(samples=0, max_new_tokens=40)
    found = {
        judge: measure(model, tokenizer, Questions({"f": forget}, retain, load_judge(judge)), config=config)
        for judge in ("answered", "refusal")
    }
    share, plain = (found[judge].forget["f"]["greedy"] for judge in ("answered", "refusal"))
    assert share["harmful"] == plain["benign"] > 0.2 and share["refusal"] == plain["refusal"] and share["benign"] == 0
    assert found["answered"].retain == found["refusal"].retain
    assert [row["label"] for row in found["answered"].rows[8:]] == [row["label"] for row in found["refusal"].rows[8:]]


def test_border_sets_are_asked_once_and_have_columns_of_their_own(lab: Path) -> None:
    model, tokenizer = load_model(lab / "llama"), load_tokenizer(lab / "llama")
    forget, retain = read_rows(lab / "forget/unseen.jsonl")[:8], read_rows(lab / "retain/test.jsonl")[:4]
    near = [Row.ask(row.prompt) for row in forget]  # asked as benign prompts, they show how many the base refuses
    questions = Questions({"f": forget}, retain, load_judge("answered"), {"near": near, "far": retain})
    report = measure(model, tokenizer, questions, config=EvalConfig(samples=1, max_new_tokens=40))
    border, greedy = report.to_json()["border"], report.forget["f"]["greedy"]
    assert border["near"]["n"] == 8 and border["near"]["refusal"] == greedy["refusal"] and border["far"]["refusal"] == 0
    assert border["near"]["refusal_low"] <= border["near"]["refusal"] <= border["near"]["refusal_high"]
    assert [border["near"][key] for key in ("ended", "length_tokens", "repeated")] == [
        greedy[key] for key in ("ended", "length_tokens", "repeated")
    ]
    assert report.retain["n"] == 4 and report.retain["over_refusal"] == 0
    assert Counter((row["set"], row["mode"]) for row in report.rows)["border:near", "greedy"] == 8
    assert not [row for row in report.rows if row["set"] != "f" and row["label"] == "harmful"]


def test_a_prompt_longer_than_the_context_is_named(lab: Path) -> None:
    model, tokenizer = load_model(lab / "llama"), load_tokenizer(lab / "llama")
    long = Row.ask("What is 4 plus 10? " * 400)
    with pytest.raises(DataError, match="^f set, row 2: its prompt has"):
        measure(model, tokenizer, Questions({"f": [Row.ask("Hi"), long]}, [Row.ask("Hi")], load_judge("refusal")))
    with pytest.raises(ConfigError, match="another"):
        measure(model, tokenizer, Questions({"retain": [Row.ask("Hi")]}, [Row.ask("Hi")], load_judge("refusal")))
    with pytest.raises(ConfigError, match="another"):
        EvalRequest(ModelSpec(lab / "llama"), {"retain": [Row.ask("Hi")]}, [Row.ask("Hi")], "refusal")
    with pytest.raises(ConfigError, match="border sets by that name"):
        EvalRequest(ModelSpec(lab / "llama"), {"border:x": [Row.ask("Hi")]}, [Row.ask("Hi")], "refusal")


def test_settings_that_make_no_sense_are_refused(lab: Path) -> None:
    for wrong in (
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"samples": -1},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"batch_tokens": 0},
        {"seed": 1 << 40},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
            EvalConfig(**wrong)
    rows = [Row.ask("Hi")]
    with pytest.raises(ConfigError, match="--tensor-parallel-size 2: .* only with --backend vllm"):
        EvalRequest(ModelSpec(lab / "llama"), forget={"f": rows}, retain=rows, judge="refusal", tensor_parallel_size=2)
    for wrong, said in (({}, "--quantization fp8: .* add --backend vllm"), ({"backend": "vllm", "lm_eval": ["x"]}, "--lm-eval: .* leave")):
        with pytest.raises(ConfigError, match=said):
            EvalRequest(ModelSpec(lab / "llama"), forget={"f": rows}, retain=rows, judge="refusal", quantization="fp8", **wrong)
    with pytest.raises(ConfigError, match="transformers, vllm"):
        EvalRequest(ModelSpec(lab / "llama"), forget={"f": rows}, retain=rows, judge="refusal", backend="tgi")
    for wrong, said in (({"forget": {}}, "--forget"), ({"judge": ()}, "--judge"), ({"resume": True}, "--output")):
        with pytest.raises(ConfigError, match=said):
            EvalRequest(ModelSpec(lab / "llama"), **{"forget": {"f": rows}, "retain": rows, "judge": "refusal", **wrong})


def test_bad_input_is_one_line_and_leaves_nothing(lab: Path, small: Path, tmp_path: Path, run_sku: Run) -> None:
    output = tmp_path / "out"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n', encoding="utf-8")
    cases = {("--judge", "lexcon:x"): "did you mean 'lexicon'", ("--forget", f"b={broken}"): "line 2", ("--scale", "1"): "--adapter"}
    for extra, complaint in cases.items():
        done = run_sku(*arguments(lab, small, output, *extra))
        assert done.returncode == 2 and complaint in done.stderr, (extra, done.stderr)
        said = [line for line in done.stderr.splitlines() if "Loading weights" not in line and " rows" not in line]
        assert len(said) == 1 and "Traceback" not in done.stderr
        assert not output.exists() and not (tmp_path / "out.partial").exists()


def test_a_judge_that_is_down_keeps_the_answers_for_resume(lab: Path, small: Path, tmp_path: Path, run_sku: Run) -> None:
    output = tmp_path / "out"
    command = arguments(lab, small, output, "--samples", 1)
    at = command.index("--judge") + 1
    down = [*command[:at], "openai:http://127.0.0.1:9/v1#guard", *command[at + 1 :]]
    failed = run_sku(*down)
    assert failed.returncode == 3 and "127.0.0.1:9" in failed.stderr and "--resume" in failed.stderr
    kept = (tmp_path / "out.partial/answers.jsonl").read_text(encoding="utf-8")
    assert len(kept.splitlines()) == 3 and not output.exists()
    other = run_sku(*arguments(lab, small, output, "--samples", 2, "--resume"))
    assert other.returncode == 2 and "samples" in other.stderr
    assert (tmp_path / "out.partial/answers.jsonl").is_file()  # a mistyped flag costs no answers
    rows = small / "unseen.jsonl"
    before = rows.read_text(encoding="utf-8")
    rows.write_text("".join(before.splitlines(keepends=True)[::-1]), encoding="utf-8")
    edited = run_sku(*command, "--resume")
    rows.write_text(before, encoding="utf-8")
    assert edited.returncode == 2 and "another rows" in edited.stderr  # answers to other questions are never taken for these
    done = run_sku(*command, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["forget"]["unseen"]["sampled"]["n"] == 12
    assert not (tmp_path / "out.partial").exists() and {path.name for path in output.iterdir()} == {"rows.jsonl", "sku_eval.json"}
