"""Rows without an answer in a file that is judged: published sets hold some, and no user can mend them."""

import json
import logging
from pathlib import Path

import pytest

from sku_vllm.errors import DataError
from sku_vllm.evaluate.compare import compare
from sku_vllm.evaluate.judge_file import judge_file


def judged(folder: Path, name: str, lines: list[dict]) -> dict:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "words.json").write_text('["clog"]')
    return judge_file([f"lexicon:{folder / 'words.json'}"], str(folder / f"{name}.jsonl"), str(folder / f"{name}.out"))


LINES = [
    {"prompt": "p", "response": "clog it", "response_harm_label": "harmful", "note": 1},
    {"prompt": "q", "response": None, "response_harm_label": None, "note": 2},
    {"prompt": "r", "response": "Wait for the rain to stop.", "response_harm_label": "unharmful", "note": 3},
]


def test_a_row_without_an_answer_keeps_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("sku_vllm"), "propagate", True)
    told = judged(tmp_path, "rows", LINES)
    assert (told["n"], told["harmful"], told["unanswered"]) == (2, 0.5, 1) and "1 of 3 rows have no answer" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "rows.out").read_text().splitlines()]
    assert [(line["note"], line["label"]) for line in lines] == [(1, "harmful"), (2, None), (3, "benign")]
    assert lines[1]["response"] is None and "given_response" not in lines[1]
    found = compare(tmp_path / "rows.out", tmp_path / "rows.out")
    assert found.sets["rows"]["given"]["harmful"]["n"] == 2 and found.unjudged == 2


def test_a_file_without_any_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its 1 rows has a 'response' to judge; name its column"):
        judged(tmp_path, "rows", LINES[1:2])
    with pytest.raises(DataError, match="none of its 1 rows has a 'response'"):
        judged(tmp_path, "other", [{"prompt": "p", "reply_text": "a"}])
