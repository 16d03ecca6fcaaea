"""One JSON object from a file, for everything that reads one."""

from pathlib import Path

import pytest

from sku_vllm.errors import AdapterError, ConfigError, InputError
from sku_vllm.json_object import read_json_object


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"é": [1]}', encoding="utf-8")
    assert read_json_object(tmp_path / "one.json", ConfigError, "write it again") == {"é": [1]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[]", "list instead of one JSON object"),
        (b"null", "NoneType instead of one JSON object"),
    ],
)
@pytest.mark.parametrize("error", [ConfigError, AdapterError])
def test_what_is_wrong_is_said_with_file_and_remedy(tmp_path: Path, error: type[InputError], content: bytes | None, said: str) -> None:
    file = tmp_path / "one.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=f"one.json: .*{said}.*; write it again$"):
        read_json_object(file, error, "write it again")
