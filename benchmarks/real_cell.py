"""One cell of bench_real: train a method on the base, choose its scale as `sku tune` does, measure the choice on other prompts."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sku_vllm.benchmarks.real_data import HH_BENIGN, VALIDATION, RealData
from sku_vllm.benchmarks.real_measure import measured, unfinished
from sku_vllm.benchmarks.real_own_answers import own_answers
from sku_vllm.benchmarks.real_setup import OWN, Setup
from sku_vllm.cli.options import log
from sku_vllm.data import Row, load_dataset
from sku_vllm.errors import ConfigError, RunError
from sku_vllm.evaluate.measure_request import RETAIN
from sku_vllm.evaluate.shares import harm
from sku_vllm.evaluate.tune import tune_scale
from sku_vllm.evaluate.tune_request import TuneRequest
from sku_vllm.model_spec import ModelSpec
from sku_vllm.records import read_json
from sku_vllm.train.refusal_voices import refusal
from sku_vllm.train.train_request import TrainRequest
from sku_vllm.train.trainer import train_adapter

Cell = dict[str, Any]
# Of sku_train.json, what a reader of a cell wants to know.
TOLD = ("steps", "seconds", "tokens", "peak_memory_bytes", "refusal_share", "targets", "looks", "cut_answers", "skipped_rows")


def place_of(setup: Setup, label: str, seed: int, what: str) -> Path:
    """WORK/WHAT/LABEL-SEED: where a cell keeps its adapter, its tuning, its measurement or its attacks."""
    place = setup.work / what
    place.mkdir(parents=True, exist_ok=True)
    return place / f"{label}-{seed}"


def measure_cell(setup: Setup, data: RealData, label: str, seed: int) -> Cell:
    """Train, choose, measure; every step that was stopped is continued. Where no scale qualifies, the nearest one is measured.

    Returns:
        The cell, or {"failed": why} of a method that diverges or refuses this base, which is a result too.
    """
    cell: Cell = {"label": label, "seed": seed}
    begun = time.process_time()
    try:
        told = train_cell(setup, data, label, seed)
    except (RunError, ConfigError) as error:
        return cell | {"failed": str(error)}
    trained = time.process_time()
    chosen = chosen_point(setup, data, label, seed)
    tuned = time.process_time()
    found = measured(setup, data, edited(setup, label, seed, chosen["scale"]), place_of(setup, label, seed, "measured"), seed)
    spent = {"training": trained - begun, "tuning": tuned - trained, "measuring": time.process_time() - tuned}
    return cell | {"training": told, **chosen, **found, "cpu_seconds": {name: round(value, 1) for name, value in spent.items()}}


def edited(setup: Setup, label: str, seed: int, scale: float) -> ModelSpec:
    """The edited model of a cell."""
    return ModelSpec(setup.model, dtype=setup.dtype, adapter=place_of(setup, label, seed, "adapters"), scale=scale)


def train_cell(setup: Setup, data: RealData, label: str, seed: int) -> dict[str, Any]:
    """Train the adapter of a cell, or go on with it. Returns the keys TOLD of its record."""
    rows = own_answers(setup, data) if setup.forget_answers == OWN else data.forget
    request = TrainRequest(
        setup.model,
        load_dataset(rows, "forget"),
        load_dataset(data.retain, "retain"),
        place_of(setup, label, seed, "adapters"),
        setup.train_config(label, seed),
        refusals=voiced(rows, seed) if label == "refusal-tune" else (),
        border=data.border,
        resume=True,
    )
    report = train_adapter(request, log=log).to_json()
    return {name: report[name] for name in TOLD}


def voiced(rows: list[Row], seed: int) -> list[Row]:
    """Each row with one of the package's own refusals as its answer."""
    random = np.random.default_rng(seed)
    return [replace(row, response=refusal(row, random)) for row in rows]


def chosen_point(setup: Setup, data: RealData, label: str, seed: int) -> dict[str, Any]:
    """{"scale", "qualifies", "excess", "tuned": rates by scale} of `sku tune` on the tuning halves.

    Without a scale within the limits, the one that exceeds fewest of them and has least harm.
    """
    output = place_of(setup, label, seed, "tuned")
    if not (output / "sku_tune.json").is_file():
        request = TuneRequest(
            ModelSpec(setup.model, dtype=setup.dtype, adapter=place_of(setup, label, seed, "adapters")),
            forget=data.tuned["forget"],
            retain=data.tuned["retain"][RETAIN],
            border=data.tuned["border"],
            judge=setup.judge,
            config=setup.eval_config(seed),
            scales=setup.scales,
            output=output,
            resume=unfinished(output),
        )
        tune_scale(request, log)
    record = read_json(output / "sku_tune.json")
    curve = [point for point in record["curve"] if point["scale"] > 0] or record["curve"]
    best = next((point for point in curve if point["scale"] == record["scale"]), None)
    chosen = best or min(curve, key=lambda point: (len(point["excess"]), harm(point)))
    shown = {f"{point['scale']:g}": _rates(point) for point in [{**record["base"], "scale": 0.0}, *curve]}
    return {"scale": chosen["scale"], "qualifies": record["qualifies"], "excess": chosen["excess"], "tuned": shown}


def _rates(point: Mapping[str, Any]) -> dict[str, Any]:
    retain, border = point["retain"], (point.get("border") or {}).get(HH_BENIGN)
    return {
        "harmful": {mode: shares["harmful"] for mode, shares in point["forget"][VALIDATION].items()},
        "over_refusal": retain["over_refusal"],
        "perplexity_ratio": retain["perplexity_ratio"],
        "border_refusal": border["refusal"] if border else None,
    }


def summary(cell: Mapping[str, Any]) -> str:
    """One line for a log."""
    if "failed" in cell:
        return f"failed: {cell['failed']}"
    modes = cell["forget"][VALIDATION]
    harmful = ", ".join(f"{mode} {shares['harmful']:.1%}" for mode, shares in modes.items())
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in cell["cpu_seconds"].items())
    qualifies = "" if cell["qualifies"] else " (none qualifies)"
    refused = cell["retain"]["over_refusal"]
    return f"scale {cell['scale']:g}{qualifies}: forget answered {harmful}; retain refused {refused:.1%} ({spent})"
