"""`--tuned DIR` and `lora:ADAPTER@tuned` say what `sku tune` chose, and why not where it chose nothing."""

import json

import pytest

from sku_vllm.errors import ConfigError
from sku_vllm.records import Tuned, note_tuned, read_tuned, tuned_arm


def tuned_directory(place, adapter, scale, **more):
    place.mkdir()
    (place / "sku_tune.json").write_text(json.dumps({"schema": "sku.tune/1", "scale": scale, "config": {"adapter": str(adapter)}, **more}))
    return place


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    return tmp_path / "adapter"


def test_the_choice_is_the_adapter_and_its_scale(tmp_path, adapter):
    tuned = tuned_directory(tmp_path / "tuned", adapter, 0.75)
    assert read_tuned(tuned) == Tuned(str(adapter), 0.75)


def test_after_a_search_by_layer_it_is_the_scaled_copy_at_one(tmp_path, adapter):
    tuned = tuned_directory(tmp_path / "tuned", adapter, 0.75, layers={"0": 1.25})
    (tuned / "adapter").mkdir()
    assert read_tuned(tuned) == Tuned(str(tuned / "adapter"), 1.0)


def test_a_tuned_adapter_knows_its_last_choice(tmp_path, adapter):
    first, last = (tuned_directory(tmp_path / name, adapter, scale) for name, scale in (("one", 0.5), ("two", 0.9)))
    assert note_tuned(adapter, first) and note_tuned(adapter, last)
    assert tuned_arm(str(adapter), "--arm a") == Tuned(str(adapter), 0.9)
    assert tuned_arm(str(first), "--arm a") == Tuned(str(adapter), 0.5)
    assert (adapter / "sku_tuned.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (None, "holds no sku_tune.json"),
        ({"scale": None, "config": {"adapter": "a"}}, "no scale stayed within the limits"),
        ({"scale": 1.0, "config": {"adapter": "gone"}}, "is not there"),
        ({"scale": 1.0}, "is not what sku tune writes"),
        ({"scale": "much", "config": {"adapter": "a"}}, "is not what sku tune writes"),
    ],
)
def test_what_is_no_choice_is_refused_in_one_line(tmp_path, record, says):
    if record is not None:
        (tmp_path / "sku_tune.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=says):
        read_tuned(tmp_path)


def test_an_adapter_nobody_tuned(adapter):
    with pytest.raises(ConfigError, match="has chosen no scale"):
        tuned_arm(str(adapter), "--arm a")
