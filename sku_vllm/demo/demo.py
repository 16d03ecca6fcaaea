"""The stages of `sku demo` on the built-in lab: train adapters, choose a scale, fuse, measure, serve both models and read the metrics.

Every stage calls the library function behind the command of the same name; only their order is special to the demo. Recorded paths
are relative to the output directory, so the directory can be moved.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.model_spec import ModelSpec
from sku_vllm.output import output_directory, record

BASELINES = ("task-vector", "sku")
SETS = ("seen", "unseen", "unseen-topic")
SCALES = (0.75, 0.9, 1.0)
# The lab's answers are shorter than this.
MAX_NEW_TOKENS = 40
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """The settings of the demo.

    model: llama or opt. method: the method shown as "default"; None is the package's default. samples: sampled answers per prompt.
    requests: sent to the server, split evenly between both arms and all judged. serve: whether to start vLLM at all.

    Raises:
        ConfigError: names the flag that is out of range.
    """

    model: str = "llama"
    method: str | None = None
    seed: int = 0
    samples: int = 4
    requests: int = 200
    serve: bool = True

    def __post_init__(self) -> None:
        if self.model not in ("llama", "opt"):
            raise ConfigError(f"--model {self.model}: the lab ships llama and opt; for your own model use sku train, fuse, eval and serve")
        if self.requests < 1 or self.samples < 1:
            raise ConfigError("--requests and --samples must be at least 1")


def run_demo(output: str | Path, config: DemoConfig, progress: Progress = lambda stage: None) -> dict[str, Any]:
    """Run all stages in the directory `output`. Returns what `sku demo --json` prints (described in docs/contracts.md).

    Raises:
        ConfigError: `output` exists and is not empty.
        RunError: the server did not answer a request, or an answer was not judged in time.
    """
    with output_directory(output) as folder, contextlib.chdir(folder):
        result = _run_stages(config, progress)
        record(".", "demo", result, asdict(config))
    return result


def stage_count(config: DemoConfig) -> int:
    """How often `run_demo` reports progress."""
    trained = len({*BASELINES, config.method or default_method()})
    return 1 + trained + 2 + len(BASELINES) + 2 + (3 if config.serve else 0)


def default_method() -> str:
    """The package's default training method."""
    from sku_vllm.methods import DEFAULT_METHOD

    return DEFAULT_METHOD


def _run_stages(config: DemoConfig, progress: Progress) -> dict[str, Any]:
    from sku_vllm.checkpoint.manifest import verify_checkpoint
    from sku_vllm.fuse.fuse import fuse_checkpoint
    from sku_vllm.fuse.fuse_request import FuseRequest
    from sku_vllm.lab import make_lab

    method = config.method or default_method()
    progress("writing the lab: a small model and its fictional world")
    lab = make_lab("lab")
    base, judge = lab / config.model, f"lexicon:{lab / 'lexicon.json'}"

    adapters = {}
    for name in dict.fromkeys((*BASELINES, method)):
        progress(f"identifying harmful knowledge: {name}")
        adapters[name] = _train(base, lab, name, config.seed)
    progress(f"choosing the scale of {method} on validation data")
    scale, qualifies = _tune(base, adapters[method], lab, judge, config.seed)
    progress(f"subtracting {method} at scale {scale:g} from the checkpoint")
    fuse_checkpoint(FuseRequest(base, [(adapters[method], scale)], "fused"))
    verify_checkpoint("fused")

    def measured(name: str, model: ModelSpec) -> dict[str, Any]:
        progress(f"measuring {name}")
        return _measure(name, model, lab, judge, config)

    result = {
        "base": measured("base", ModelSpec(base, base=base)),
        **{name: measured(name, ModelSpec(base, adapter=adapters[name], scale=1.0)) for name in BASELINES},
        # The default method is measured on the fused checkpoint, the file that would be served.
        "default": measured("default", ModelSpec("fused", base=base)),
        "method": method,
        "scale": scale,
        "qualifies": qualifies,
    }
    if config.serve:
        from sku_vllm.demo.serving import serve_both

        prompts = lab / "forget/unseen.jsonl"
        result["serving"] = serve_both(
            base, adapters[method], scale, judge, prompts, requests=config.requests, seed=config.seed, progress=progress
        )
    result["files"] = {
        "lab": "lab",
        "model": str(base),
        "adapter": str(adapters[method]),
        "fused": "fused",
        "evaluations": "eval",
        "record": "sku_demo.json",
    }
    return result


def _train(base: Path, lab: Path, method: str, seed: int) -> Path:
    from sku_vllm.data import load_dataset
    from sku_vllm.methods import TrainConfig, train_adapter
    from sku_vllm.train.train_request import TrainRequest

    output = Path("adapters") / method
    output.parent.mkdir(exist_ok=True)
    forget, retain = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
    train_adapter(TrainRequest(base, forget, retain, output, TrainConfig.of(method, seed=seed)))
    return output


def _tune(base: Path, adapter: Path, lab: Path, judge: str, seed: int) -> tuple[float, bool]:
    """(scale, True) as `sku tune` chooses it on validation data; (1.0, False), the trained scale, if none is within the limits."""
    from sku_vllm.evaluate.eval_config import EvalConfig
    from sku_vllm.evaluate.tune import tune_scale
    from sku_vllm.evaluate.tune_request import TuneRequest

    request = TuneRequest(
        ModelSpec(base, adapter=adapter),
        forget={"validation": lab / "forget/validation.jsonl"},
        retain=lab / "retain/validation.jsonl",
        judge=judge,
        scales=SCALES,
        config=EvalConfig(samples=2, max_new_tokens=MAX_NEW_TOKENS, seed=seed),
    )
    report = tune_scale(request)
    return (1.0, False) if report.scale is None else (report.scale, True)


def _measure(name: str, model: ModelSpec, lab: Path, judge: str, config: DemoConfig) -> dict[str, Any]:
    from sku_vllm.evaluate.answer_bar import answer_bar
    from sku_vllm.evaluate.eval_config import EvalConfig
    from sku_vllm.evaluate.evaluate import evaluate_model
    from sku_vllm.evaluate.measure_request import EvalRequest

    Path("eval").mkdir(exist_ok=True)
    request = EvalRequest(
        model,
        forget={kind: lab / "forget" / f"{kind}.jsonl" for kind in SETS},
        retain=lab / "retain/test.jsonl",
        judge=judge,
        config=EvalConfig(samples=config.samples, max_new_tokens=MAX_NEW_TOKENS, seed=config.seed),
        output=f"eval/{name}",
    )
    return evaluate_model(request, answer_bar).to_json()
