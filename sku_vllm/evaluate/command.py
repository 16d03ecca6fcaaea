"""What `sku eval` does with its options: read the rows, measure resumably, write the directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sku_vllm.checkpoint import base_identity
from sku_vllm.data import read_rows
from sku_vllm.evaluate import lm_eval
from sku_vllm.evaluate.answers import KEPT_ANSWERS
from sku_vllm.evaluate.columns import column_names
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.evaluate import evaluate_model
from sku_vllm.evaluate.judging import KEPT_VERDICTS
from sku_vllm.evaluate.progress import answer_bar
from sku_vllm.evaluate.unfinished import begun_with, resumable_directory
from sku_vllm.judges import judge_of

CONFIG_FIELDS = ("samples", "temperature", "max_new_tokens", "seed", "batch_size", "template")
RUN_FIELDS = ("adapter", "scale", "base", "dtype", "backend", "revision", "any_base", "as_is")


def run_eval(options: Mapping[str, Any]) -> dict[str, Any]:
    """Run `sku eval` with its options by name; `forget` maps names to files. Returns what `--json` prints."""
    config = EvalConfig(**{name: options[name] for name in CONFIG_FIELDS})
    judge = judge_of(options["judge"])
    columns = column_names(options["columns"])
    forget = {name: read_rows(path, columns=columns) for name, path in options["forget"].items()}
    retain = read_rows(options["retain"], columns=columns, safe=True)
    tasks = [task.strip() for value in options.get("lm_eval") or () for task in value.split(",") if task.strip()]
    if tasks:
        lm_eval.check_tasks(tasks)
    inputs = begun_with(options, *forget.values(), retain)
    with resumable_directory(options["output"], inputs, resume=options["resume"], leftovers=(KEPT_ANSWERS, KEPT_VERDICTS)) as directory:
        total = sum(map(len, forget.values())) * (1 + config.samples) + len(retain)
        with answer_bar(total, Path(options["output"]).name) as progress:
            report = evaluate_model(
                options["model"], forget=forget, retain=retain, judge=judge, config=config, kept=directory, progress=progress,
                **{name: options[name] for name in RUN_FIELDS},
            )
        if tasks:
            report.lm_eval = lm_eval.run(
                options["model"], tasks, limit=options["lm_eval_limit"], **{name: options[name] for name in RUN_FIELDS}
            )
        # Which weights were judged: what a report needs to call a fused checkpoint verified.
        identity = base_identity(options["model"]) if Path(options["model"]).is_dir() else None
        report.write(directory, {key: value for key, value in options.items() if key != "resume"} | {"model_identity": identity})
    return report.to_json()
