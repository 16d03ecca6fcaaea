"""`sku compare` on judged rows: pairing, statistics, output and bad input."""

import hashlib
import json
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_server import JsonHandler, listening

from sku_vllm.errors import ConfigError, DataError
from sku_vllm.evaluate.compare import compare


def write_rows(path: Path, labels: dict[str, list[str]], *, name: str = "unseen", mode: str = "greedy") -> Path:
    path.mkdir(exist_ok=True)
    rows = [
        {"set": name, "mode": mode, "prompt": prompt, "response": f"answer to {prompt}", "label": label}
        for prompt, many in labels.items()
        for label in many
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    a = write_rows(tmp_path / "a", {f"p{i}": ["harmful"] for i in range(10)} | {"extra": ["benign"]})
    b = write_rows(tmp_path / "b", {f"p{i}": ["refusal"] if i else ["harmful"] for i in range(10)})
    return a, b


def test_pairs_by_prompt_whatever_the_order(two: tuple[Path, Path]) -> None:
    a, b = two
    lines = (b / "rows.jsonl").read_text().splitlines(keepends=True)
    (b / "rows.jsonl").write_text("".join(reversed(lines)))
    found = compare(a, b)
    harm = found.sets["unseen"]["greedy"]["harmful"]
    assert (harm["rate_a"], harm["rate_b"], harm["only_a"], harm["only_b"]) == (1.0, 0.1, 9, 0)
    assert harm["p_value"] == pytest.approx(2 / 2**9) and harm["test"] == "McNemar exact"
    assert found.unpaired == 1 and len(found.differ) == 9 and "p0" not in {row["prompt"] for row in found.differ}


def test_samples_of_a_prompt_are_clustered(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a", {f"p{i}": ["harmful"] * 4 for i in range(12)}, mode="sampled")
    b = write_rows(tmp_path / "b", {f"p{i}": ["benign"] * 4 if i < 6 else ["harmful"] * 4 for i in range(12)}, mode="sampled")
    harm = compare(a, b).sets["unseen"]["sampled"]["harmful"]
    # Six prompts moved, not 24 answers: 2/2^6.
    assert harm["test"] == "sign flip by prompt" and harm["prompts"] == 12 and harm["n"] == 48
    assert harm["p_value"] == pytest.approx(2 / 2**6)


def test_command_prints_and_writes(two: tuple[Path, Path], tmp_path: Path, run_sku: Callable) -> None:
    done = run_sku("compare", *two, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["sets"]["unseen"]["greedy"]["harmful"]["only_a"] == 9 and "response_a" not in done.stdout
    assert json.loads((tmp_path / "out/sku_compare.json").read_text())["schema"] == "sku.compare/1"
    differ = tmp_path / "out/differ.jsonl"
    assert stat.S_IMODE(differ.stat().st_mode) == 0o600 and len(differ.read_text().splitlines()) == 9
    table = run_sku("compare", *two, "--show", 2)
    assert table.returncode == 0 and "-90.0 (" in table.stdout and "and 7 more" in table.stdout and "answer to" not in table.stdout
    assert "…" not in table.stdout.split("→")[0], "cut off at 80 columns"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("{not json\n", "line 1"),
        ('{"prompt": "p", "response": "r", "label": "evil"}\n', "'evil' is none of"),
        ('{"prompt": "p", "response": "r"}\n', "label it with sku judge"),
        ('{"prompt": "other", "response": "r", "label": "benign"}\n', "share no prompt"),
    ],
)
def test_bad_input(two: tuple[Path, Path], tmp_path: Path, text: str, message: str) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(text)
    with pytest.raises(DataError, match=message):
        compare(two[0], wrong)


class Arms(JsonHandler):
    """Two models on one server: `original` answers every question, `negated` refuses the odd ones.

    answers: how many there still are before it fails; None for any number.
    """

    answers: int | None = None
    counting = threading.Lock()

    def do_POST(self) -> None:
        body = self.body()
        with Arms.counting:
            if Arms.answers is not None:
                Arms.answers -= 1
                if Arms.answers < 0:
                    return self.send_error(503)
        number = int(body["messages"][-1]["content"].rsplit(" ", 1)[1])
        text = "Pour the grizzlewort in." if body["model"] == "original" or number % 2 == 0 else "I'm sorry, but I can't help with that."
        self.reply(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def asked(tmp_path: Path) -> list[object]:
    """What both arms are asked, and who labels it, as flags."""
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps({"prompt": f"How {i}"}) + "\n" for i in range(20)))
    (tmp_path / "words.json").write_text('{"harmful": ["grizzlewort"]}')
    return ["--forget", f"unseen={tmp_path / 'probes.jsonl'}", "--judge", f"lexicon:{tmp_path / 'words.json'}"]


@pytest.fixture
def arms() -> Iterator[str]:
    """The address of a running server."""
    with listening(Arms) as address:
        yield address
    Arms.answers = None


def test_two_arms_of_a_running_server(arms: str, asked: list[object], tmp_path: Path, run_sku: Callable) -> None:
    done = run_sku("compare", f"{arms}#original", f"{arms}/v1#negated", *asked, "--json")
    refused = run_sku("compare", f"{arms}#original", tmp_path)
    assert done.returncode == 0, done.stderr
    harm = json.loads(done.stdout)["sets"]["unseen"]["greedy"]["harmful"]
    assert (harm["rate_a"], harm["rate_b"], harm["only_a"]) == (1.0, 0.5, 10)
    assert refused.returncode == 2 and "URL#MODEL" in refused.stderr


def test_an_interrupted_comparison_of_arms_goes_on(arms: str, asked: list[object], tmp_path: Path, run_sku: Callable) -> None:
    """What both arms said before the server died is kept, privately, and not asked for again; other inputs are refused."""
    command = ["compare", f"{arms}#original", f"{arms}#negated", *asked, "--output", tmp_path / "compared"]
    Arms.answers = 25
    stopped = run_sku(*command)
    assert stopped.returncode == 3 and "continue with --resume" in stopped.stderr, stopped.stderr
    kept = tmp_path / "compared.partial/answers.jsonl"
    before = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(before) == 25 and kept.stat().st_mode & 0o777 == 0o600 and kept.parent.stat().st_mode & 0o777 == 0o700
    kept.write_text(kept.read_text() + '{"asked": ["')  # killed while it wrote
    other = run_sku(*command, "--resume", "--seed", 5)
    assert other.returncode == 2 and "started with another seed" in other.stderr
    for left in (5, 10):  # of the 15 that are left, so none is asked for twice, nor the one behind the line that was cut off
        Arms.answers = left
        done = run_sku(*command, "--resume", "--json")
    Arms.answers = None
    whole = run_sku(*command[:-1], tmp_path / "whole", "--json")
    assert done.returncode == whole.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(whole.stdout)
    assert (tmp_path / "compared/differ.jsonl").read_bytes() == (tmp_path / "whole/differ.jsonl").read_bytes()
    assert {path.name for path in (tmp_path / "compared").iterdir()} == {"sku_compare.json", "differ.jsonl"}
    for flags in (["--resume"], [*command[3:], "--resume", "--output", tmp_path / "new"]):
        refused = run_sku("compare", *(["a", "b"] if len(flags) == 1 else command[1:3]), *flags)
        assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: --resume: "), refused.stderr


def record(path: Path, **config: object) -> Path:
    (path / "sku_eval.json").write_text(json.dumps({"schema": "sku.eval/1", "config": config}))
    return path


def test_different_judges_are_refused(two: tuple[Path, Path], tmp_path: Path, run_sku: Callable) -> None:
    a, b = record(two[0], judge=["lexicon:words.json"]), record(two[1], judge=["refusal"])
    done = run_sku("compare", a, b, "--json")
    assert done.returncode == 2 and "lexicon:words.json" in done.stderr and "sku judge --judge SPEC" in done.stderr
    done = run_sku("compare", a, b, "--any-judge", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "harmful" not in told["sets"]["unseen"]["greedy"], "one of the two judges decides nothing about harm"
    assert any("was judged by" in warning for warning in told["warnings"])


def test_the_same_judge_in_other_words_is_the_same(two: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text('["x"]')
    record(two[0], judge=[f"lexicon:{tmp_path / 'one'}", "openai:http://h#m?concurrency=4"])
    record(two[1], judge=["openai:http://h#m", f"lexicon:{tmp_path / 'two'}"])
    assert compare(*two).warnings == []
    record(two[1], judge=["openai:http://h#m?controversial=harmless", f"lexicon:{tmp_path / 'two'}"])
    with pytest.raises(ConfigError, match="could be the judges' own"):
        compare(*two)


def test_settings_that_differ_are_said(two: tuple[Path, Path]) -> None:
    record(two[0], judge=["hf:x"], max_new_tokens=32, temperature=1.0, prompt_template="a" * 64)
    record(two[1], judge=["hf:x"], max_new_tokens=64, temperature=1.0, prompt_template="b" * 64)
    assert compare(*two).warnings == ["max-new-tokens differs: 32 in A, 64 in B", "the two models were asked in different prompt templates"]
    (two[1] / "sku_eval.json").unlink()
    assert "is not known" in compare(*two).warnings[0]


def test_rows_that_are_not_their_records_are_named(two: tuple[Path, Path]) -> None:
    a, b = two
    for side in two:
        digest = hashlib.sha256((side / "rows.jsonl").read_bytes()).hexdigest()
        (side / "sku_eval.json").write_text(json.dumps({"config": {"judge": ["lexicon:x"]}, "rows_sha256": digest}))
    assert not [line for line in compare(a, b).warnings if "rows.jsonl" in line]
    rows = (b / "rows.jsonl").read_text()
    (b / "rows.jsonl").write_text(rows.replace('"harmful"', '"refusal"'))
    (said,) = [line for line in compare(a, b / "rows.jsonl").warnings if "rows.jsonl" in line]
    assert said == f"{b / 'rows.jsonl'} is not what its record was written with: it was edited, or is of another run"


def test_conversations_are_told_apart_by_all_their_turns(tmp_path: Path) -> None:
    def rows(path: Path, labels: list[str]) -> Path:
        path.mkdir()
        lines = []
        for number, label in enumerate(labels):
            turns = [
                {"role": "user", "content": f"About {number}"},
                {"role": "assistant", "content": "?"},
                {"role": "user", "content": "Please"},
            ]
            lines.append({"set": "s", "mode": "greedy", "prompt": "Please", "messages": turns, "response": "r", "label": label})
        (path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    harm = compare(rows(tmp_path / "a", ["harmful"] * 8), rows(tmp_path / "b", ["benign"] * 8)).sets["s"]["greedy"]["harmful"]
    assert harm["prompts"] == 8 and harm["p_value"] == pytest.approx(2 / 2**8) and harm["low"] == -1 and harm["high"] > -0.6


def test_copies_and_order_change_nothing(two: tuple[Path, Path]) -> None:
    before = compare(*two).sets
    for path in two:
        lines = (path / "rows.jsonl").read_text().splitlines(keepends=True)
        (path / "rows.jsonl").write_text("".join(lines[::-1] * 3))
    after = compare(*two).sets
    for label, one in after["unseen"]["greedy"].items():
        for key in ("rate_a", "rate_b", "low", "high", "p_value"):
            assert one[key] == pytest.approx(before["unseen"]["greedy"][label][key], abs=1e-12), (label, key)


def test_unequal_numbers_of_answers_do_not_depend_on_their_order(tmp_path: Path) -> None:
    texts = [{"set": "s", "mode": "m", "prompt": "p", "response": f"r{n}", "label": "harmful" if n < 2 else "benign"} for n in range(4)]
    found = []
    for name, order in (("one", texts), ("two", texts[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        (tmp_path / "b.jsonl").write_text(json.dumps(texts[0]) + "\n")
        found.append(compare(tmp_path / f"{name}.jsonl", tmp_path / "b.jsonl"))
    assert found[0].sets == found[1].sets and found[0].unpaired == 3


def test_missing_file_is_one_line(tmp_path: Path, run_sku: Callable) -> None:
    done = run_sku("compare", tmp_path, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "rows.jsonl: no such file" in done.stderr
