"""Standard benchmarks through lm-evaluation-harness: base and edited model side by side, with the difference and its standard error.

Open this file to change what `sku eval --lm-eval` runs and reports.
"""

import gc
import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.model_spec import ModelSpec

# Names of suites in papers, and the harness's names for them.
ALSO_CALLED = {"super_glue": "super-glue-lm-eval-v1", "superglue": "super-glue-lm-eval-v1"}


def run_tasks(
    model: ModelSpec,
    tasks: Sequence[str],
    *,
    backend: str = "transformers",
    batch_size: int = 8,
    limit: int | None = None,
    few_shot: int | None = None,
    seed: int = 0,
    compared: bool = True,
) -> list[dict[str, Any]]:
    """Run `tasks` on the edited model and on the model it is compared with, if there is one (`ModelSpec.reference`) and it is wanted.

    Args:
        tasks: names the harness knows (`mmlu`), or YAML files that define a task.
        backend: "transformers" or "vllm".
        limit: most documents per task. few_shot: examples before each question; None uses the task's own number.
        compared: False leaves the other model out, whose entries then are None.

    Returns:
        One entry per task and metric: {"task", "metric", "n", "base", "base_stderr", "edited", "edited_stderr", "difference", "stderr"}.
        "stderr" is the standard error of the difference: paired over documents where the harness returns them, else the root of the
        sum of both variances.

    Raises:
        ConfigError: lm-eval is not installed, it does not know a task, or an adapter is given with backend "vllm".
    """
    manager, names = _tasks(tasks)
    asked = {"tasks": names, "task_manager": manager, "limit": limit, "num_fewshot": few_shot, "seed": seed}
    edited = _evaluate(_language_model(model, backend, batch_size), **asked)
    gc.collect()
    other = model.reference if compared else None
    reference = None if other is None else _evaluate(_language_model(other, backend, batch_size), **asked)
    return side_by_side(reference, edited)


def check_tasks(tasks: Sequence[str]) -> None:
    """Check task names before a long measurement. Raises ConfigError as `run_tasks` does."""
    _tasks(tasks)


def side_by_side(base: Mapping[str, Any] | None, edited: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of `run_tasks` from the harness's results (`simple_evaluate`) on the same tasks; `base` may be None."""
    rows = []
    for task, scores in {**(edited.get("groups") or {}), **edited["results"]}.items():
        for key, value in scores.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            before = (base["results"].get(task) or base["groups"].get(task, {})).get(key) if base else None
            own, others = scores.get(f"{metric}_stderr,{chosen}"), _error(base, task, metric, chosen)
            paired = _paired_error(base, edited, task, metric, chosen)
            rows.append(
                {
                    "task": task,
                    "metric": metric if chosen == "none" else f"{metric} ({chosen})",
                    "n": len(edited.get("samples", {}).get(task, [])) or None,
                    "base": before,
                    "base_stderr": others,
                    "edited": float(value),
                    "edited_stderr": _finite(own),
                    "difference": None if before is None else float(value) - float(before),
                    "stderr": paired if paired is not None else _root(_finite(own), others),
                }
            )
    return rows


def _language_model(spec: ModelSpec, backend: str, batch_size: int) -> Any:
    """The model as a language model of the harness. With vLLM an adapter must be fused first: the harness would add it."""
    if backend == "vllm":
        if spec.adapter:
            raise ConfigError(
                "--lm-eval --backend vllm: takes a checkpoint, not an --adapter; fuse it first (sku fuse) and give --model and --base"
            )
        # stdout is for --json only. On a CPU, vLLM would otherwise reserve nearly all memory for its KV cache.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        settings = {"dtype": spec.dtype, "revision": spec.revision, "batch_size": batch_size, "gpu_memory_utilization": 0.8}
        return _vllm_class()(pretrained=str(spec.model), **settings)
    from lm_eval.models.huggingface import HFLM

    from sku_vllm.model import load_model, load_tokenizer

    tokenizer = load_tokenizer(spec.model, spec.revision)
    return HFLM(pretrained=load_model(spec), tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def _vllm_class() -> Any:
    """The harness's model class for vLLM.

    Its import asks for the version of the distribution `vllm`; the CPU build is called `vllm-cpu`, so that call is answered here.
    """
    try:
        import vllm
        from vllm.platforms import current_platform

        current_platform.device_type  # noqa: B018 (vLLM looks up its own distribution here, so it must happen before the replacement)
    except ImportError as error:
        raise ConfigError(f"--backend vllm: vLLM cannot be imported ({error}); pip install 'sku-vllm[gpu]' or '[cpu]'") from error
    known = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return str(vllm.__version__) if distribution_name == "vllm" else known(distribution_name)

    importlib.metadata.version = version
    try:
        from lm_eval.models.vllm_causallms import VLLM  # it binds `version` at import
    finally:
        importlib.metadata.version = known
    return VLLM


def _evaluate(lm: Any, *, tasks: Sequence[str], task_manager: Any, limit: int | None, num_fewshot: int | None, seed: int) -> dict[str, Any]:
    import lm_eval

    found = lm_eval.simple_evaluate(
        lm,
        tasks=list(tasks),
        task_manager=task_manager,
        limit=limit,
        num_fewshot=num_fewshot,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        bootstrap_iters=1000,
    )
    if hasattr(lm, "model") and hasattr(lm.model, "llm_engine"):
        lm.model.llm_engine.engine_core.shutdown()  # the next engine needs its memory
    return {"groups": {}, **found}


def _tasks(given: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's task manager and task names; a YAML file is named by the `task` it defines."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("--lm-eval: needs lm-evaluation-harness; install it with: pip install 'sku-vllm[eval]'") from error
    import yaml

    names, folders = [], []
    for task in given:
        if not task.endswith((".yaml", ".yml")):
            names.append(ALSO_CALLED.get(task, task))
            continue
        file = Path(task)
        if not file.is_file():
            raise ConfigError(f"--lm-eval {task}: no such file; give a task's YAML file or the name of a task the harness knows")
        try:
            defined = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
            names.append(defined["group"] if "group" in defined else defined["task"])
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"--lm-eval {task}: is not a task of the harness (no `task:` in it)") from error
        folders.append(str(file.parent.resolve()))
    # The harness's own tasks are thousands of files, so they are read only if a task is not given as a YAML file.
    manager = TaskManager(include_path=list(dict.fromkeys(folders)) or None, include_defaults=len(folders) < len(given))
    known = set(manager.all_tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        raise ConfigError(
            f"--lm-eval {unknown[0]}: the harness knows no such task"
            f"{f'; did you mean {close[0]!r}?' if close else ''} (list them: lm_eval ls tasks)"
        )
    return manager, names


def _paired_error(base: Mapping[str, Any] | None, edited: Mapping[str, Any], task: str, metric: str, chosen: str) -> float | None:
    """Standard error of the mean difference over the same documents; None where a metric is not a mean over documents."""
    if base is None:
        return None
    sides = []
    for result in (base, edited):
        samples = (result.get("samples") or {}).get(task) or []
        values = {row["doc_id"]: row.get(metric) for row in samples if row.get("filter", "none") == chosen}
        if len(values) < 2 or not all(isinstance(value, int | float) for value in values.values()):
            return None
        sides.append(values)
    if sides[0].keys() != sides[1].keys():
        return None
    shifts = [float(sides[1][key]) - float(sides[0][key]) for key in sides[0]]
    mean = sum(shifts) / len(shifts)
    return math.sqrt(sum((shift - mean) ** 2 for shift in shifts) / (len(shifts) - 1) / len(shifts))


def _error(result: Mapping[str, Any] | None, task: str, metric: str, chosen: str) -> float | None:
    scores = (result["results"].get(task) or result["groups"].get(task, {})) if result else {}
    return _finite(scores.get(f"{metric}_stderr,{chosen}"))


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _root(one: float | None, other: float | None) -> float | None:
    return math.hypot(one, other) if one is not None and other is not None else None
