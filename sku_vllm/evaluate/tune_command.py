"""What `sku tune` does with its options: read the rows, measure the curve, write the directory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sku_vllm.data import read_rows
from sku_vllm.evaluate.columns import column_names
from sku_vllm.evaluate.command import CONFIG_FIELDS
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.curve import curve_svg
from sku_vllm.evaluate.limits import SCALES, Limits
from sku_vllm.evaluate.tune import Sets, TuneReport, check_scales, tune_scale
from sku_vllm.evaluate.unfinished import measuring_directory
from sku_vllm.judges import judge_of
from sku_vllm.output import record, write_text


def run_tune(options: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run `sku tune` with its options by name; `forget` and `test_forget` map names to files. Returns what `--json` prints."""
    config = EvalConfig(**{name: options[name] for name in CONFIG_FIELDS})
    limits = Limits(**{name: options[f"max_{name}"] for name in Limits.__dataclass_fields__})
    columns = column_names(options["columns"])

    def read(forget: str, retain: str) -> Sets:
        asked = {name: read_rows(path, columns=columns) for name, path in options[forget].items()}
        return asked, read_rows(options[retain], columns=columns, safe=True)

    forget, retain = read("forget", "retain")
    test = read("test_forget", "test_retain") if options["test_retain"] else None
    scales = check_scales(options["scales"] if options["scales"] is not None else SCALES)
    judge = judge_of(options["judge"])
    sets = [rows for asked, benign in ((forget, retain), test or ({}, [])) for rows in (*asked.values(), benign)]
    with measuring_directory(options, *sets) as directory:
        report = tune_scale(
            options["model"], options["adapter"], judge=judge, limits=limits, scales=scales, config=config, test=test,
            forget=forget, retain=retain, kept=directory, progress=progress,
            **{name: options[name] for name in ("per_layer", "dtype", "revision", "any_base", "as_is")},
        )
        result = report.to_json()
        if directory:
            _write(directory, report, result, {key: value for key, value in options.items() if key != "resume"})
    return result


def _write(directory: Path, report: TuneReport, result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    write_text(directory / "curve.svg", curve_svg(report.base, report.curve, report.scale))
    if report.layers is not None:
        from sku_vllm.evaluate.per_layer import write_scaled

        write_scaled(options["adapter"], directory / "adapter", report.scale, report.layers)
    record(directory, "tune", result, options)
