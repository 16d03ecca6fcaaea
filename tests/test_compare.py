"""`sku compare` on judged rows: pairing, statistics, output and bad input."""

import json
import stat
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sku_vllm.compare import compare
from sku_vllm.errors import DataError


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
    # Six prompts moved, not 24 answers: 2/2^6, give or take the Monte Carlo error.
    assert harm["test"] == "sign flip by prompt" and harm["prompts"] == 12 and harm["n"] == 48
    assert harm["p_value"] == pytest.approx(2 / 2**6, abs=0.006)


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


class Arms(BaseHTTPRequestHandler):
    """Two models on one server: `original` answers every question, `negated` refuses the odd ones."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = int(body["messages"][-1]["content"].rsplit(" ", 1)[1])
        text = "Pour the grizzlewort in." if body["model"] == "original" or number % 2 == 0 else "I'm sorry, but I can't help with that."
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def test_two_arms_of_a_running_server(tmp_path: Path, run_sku: Callable) -> None:
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps({"prompt": f"How {i}"}) + "\n" for i in range(20)))
    (tmp_path / "words.json").write_text('{"harmful": ["grizzlewort"]}')
    with ThreadingHTTPServer(("127.0.0.1", 0), Arms) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        done = run_sku(
            "compare",
            f"{url}#original",
            f"{url}/v1#negated",
            "--forget",
            f"unseen={tmp_path / 'probes.jsonl'}",
            "--judge",
            f"lexicon:{tmp_path / 'words.json'}",
            "--json",
        )
        refused = run_sku("compare", f"{url}#original", tmp_path)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    harm = json.loads(done.stdout)["sets"]["unseen"]["greedy"]["harmful"]
    assert (harm["rate_a"], harm["rate_b"], harm["only_a"]) == (1.0, 0.5, 10)
    assert refused.returncode == 2 and "URL#MODEL" in refused.stderr


def test_missing_file_is_one_line(tmp_path: Path, run_sku: Callable) -> None:
    done = run_sku("compare", tmp_path, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "rows.jsonl: no such file" in done.stderr
