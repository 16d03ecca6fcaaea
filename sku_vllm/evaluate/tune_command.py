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
from sku_vllm.evaluate.tune import TuneReport, check_scales, tune_scale
from sku_vllm.judges import judge_of
from sku_vllm.output import output_directory, record, write_text


def run_tune(options: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run `sku tune` with its options by name; `forget` and `test_forget` map names to files. Returns what `--json` prints."""
    config = EvalConfig(**{name: options[name] for name in CONFIG_FIELDS})
    limits = Limits(**{name: options[f"max_{name}"] for name in Limits.__dataclass_fields__})
    columns = column_names(options["columns"])
    test = None
    if options["test_retain"]:
        asked = {name: read_rows(path, columns=columns) for name, path in options["test_forget"].items()}
        test = (asked, read_rows(options["test_retain"], columns=columns, safe=True))
    scales = check_scales(options["scales"] if options["scales"] is not None else SCALES)
    report = tune_scale(
        options["model"], options["adapter"], judge=judge_of(options["judge"]), limits=limits, scales=scales, config=config, test=test,
        forget={name: read_rows(path, columns=columns) for name, path in options["forget"].items()},
        retain=read_rows(options["retain"], columns=columns, safe=True), progress=progress,
        **{name: options[name] for name in ("per_layer", "dtype", "revision", "any_base", "as_is")},
    )
    result = report.to_json()
    if options["output"]:
        _write(report, result, options)
    return result


def _write(report: TuneReport, result: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    with output_directory(options["output"]) as directory:
        write_text(directory / "curve.svg", curve_svg(report.base, report.curve, report.scale))
        if report.layers is not None:
            from sku_vllm.evaluate.per_layer import write_scaled

            write_scaled(options["adapter"], Path(directory) / "adapter", report.scale, report.layers)
        record(directory, "tune", result, options)
