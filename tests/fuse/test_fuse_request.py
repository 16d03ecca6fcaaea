"""A fusion's request refuses what means nothing before a file is opened, and is what `sku_fuse.json` records."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from sku_vllm.errors import ConfigError
from sku_vllm.fuse import FuseRequest


def test_json_is_the_recorded_configuration():
    request = FuseRequest(
        Path("base"), [(Path("one"), 0.5), ("two", {"q_proj": 2.0})], "out", simulate=["int8", "int4", "int8"], seed=3, signing_key="key"
    )
    assert request.to_json() == {
        "model": "base",
        "adapters": [["one", 0.5], ["two", {"q_proj": 2.0}]],
        "dtype": "keep",
        "untie": False,
        "fp8_scales": "keep",
        "simulate": ["int8", "int4"],
        "digests": True,
        "any_base": False,
        "as_is": False,
        "seed": 3,
        "device": "auto",
        "revision": None,
    }


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "int8"}, "--dtype int8: unknown; choose from keep"),
        ({"fp8_scales": "drop"}, "--fp8-scales drop: unknown; choose from keep, recompute"),
        ({"simulate": ["int3"]}, "--simulate int3: unknown; choose from int4"),
        ({"adapters": []}, "--adapter: give at least one"),
        ({"adapters": [("a", -1.0)]}, "--adapter a: scale -1.0 must be a number ≥ 0"),
        ({"adapters": [("a", {"q_proj": float("nan")})]}, "--adapter a: scale nan must be"),
    ],
)
def test_what_means_nothing_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        FuseRequest(**{"model": "base", "adapters": [("a", 1.0)], "output": "out", **settings})


def test_a_request_stays_as_it_was_checked():
    adapters = [("a", 1.0)]
    request = FuseRequest("base", adapters, "out")
    adapters.append(("b", -1.0))
    assert request.adapters == (("a", 1.0),)
    with pytest.raises(FrozenInstanceError):
        request.dtype = "int8"
