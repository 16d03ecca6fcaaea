"""The one loop: every method, every size, one process or many, from the start or from where it stopped."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.checkpoint import base_identity
from sku_vllm.data import ForgetSet, PromptTemplate, RetainSet, Row
from sku_vllm.errors import ConfigError, DivergenceError, SkuError
from sku_vllm.methods import METHODS, sharding
from sku_vllm.methods.batches import Batches
from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.progress import Progress
from sku_vllm.methods.run import Run
from sku_vllm.methods.saving import PRIVATE, run_record
from sku_vllm.methods.training_state import FOLDER, TrainingState
from sku_vllm.model import context_length, load_config, load_tokenizer, resolve_model
from sku_vllm.output import check_output, output_directory, partial_path, record, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

LAST_GOOD = "last-good"
BEGUN = "train_config.json"  # what a resumed run has to be given again
SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run did; `sku_train.json` and `--json` print it.

    Attributes:
        output: the adapter directory. resumed_from: step a resumed run continued at, or None. finished_before: nothing was left to do.
        losses: each term's unweighted mean over the last tenth of the steps that had it. risen: by how many nats that is above where
            the term's last phase began, for terms that training made worse by more than one.
        tokens: forward tokens, adapter-off passes included. seconds: of training alone. peak_memory_bytes: of the process, or of the GPU.
        fold_error: relative error of recompressing the rounds' ranks; 0 when nothing had to be.
        cut_answers: answers whose end the length limit took. refusal_share: of contrastive samples, else None.
    """

    output: str
    method: str
    base: str
    adapter_kind: str
    rank: int
    steps: int
    parameters: int
    trainable: int
    examples: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    packed: bool
    losses: dict[str, float]
    fold_error: float
    cut_answers: int
    refusal_share: float | None = None
    risen: dict[str, float] | None = None
    resumed_from: int | None = None
    finished_before: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train_adapter(
    model: str | Path,
    forget: ForgetSet,
    retain: RetainSet | None,
    output: str | Path,
    config: TrainConfig,
    *,
    refusals: Sequence[Row] = (),
    revision: str | None = None,
    resume: bool = False,
    progress: bool = True,
    tracker: str | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> TrainReport:
    """Train an adapter for `config.method` and write it to `output` (mode 0700), complete or not at all.

    Unfinished work stays in `OUTPUT.partial/`, from which `resume=True` continues to the bits of an uninterrupted run.

    Args:
        refusals: rows whose responses refuse, for refusal-tune.
        tracker: tensorboard or wandb, logging to OUTPUT.logs/, or mlflow, logging to where MLFLOW_TRACKING_URI says.
        save_seconds: time between checkpoints.

    Raises:
        InputError: model, data or settings cannot be used; nothing is written.
        DivergenceError: a loss or gradient stopped being finite; the last good adapter is in OUTPUT.partial/last-good/ (`full` has none).
    """
    if resume and (Path(output) / "sku_train.json").is_file():
        return _finished(Path(output))
    check_output(output)
    path = resolve_model(model, revision)
    accelerator = _accelerator(tracker, Path(output))
    batches = prepare(path, config, forget, retain, refusals)
    config = batches.config
    record_ = run_record(config.method, str(model), base_identity(path), "dense" if config.full else "lora", config.to_json())
    run = Run(path, config, batches, accelerator, batches.template.tokenizer)
    with _partial(Path(output), resume, accelerator) as partial:
        resumed = _begin(run, record_["base_identity"], partial, resume, accelerator)
        shown = Progress(run, partial, enabled=progress and accelerator.is_main_process)
        _train(run, partial, shown, record_, save_seconds, Path(output).name)
        report = _finish(run, partial, Path(output), record_, shown, resumed)
    accelerator.end_training()
    return report


def begun_method(output: str | Path) -> str | None:
    """The method of the unfinished run that `resume` would continue; None where there is none."""
    return (_begun(partial_path(output)) or {}).get("method")


def prepare(path: Path, config: TrainConfig, forget: ForgetSet, retain: RetainSet | None, refusals: Sequence[Row]) -> Batches:
    """The rows of every step, checked; `config` in them also knows the token that ends an answer, which the contrastive methods train,
    and no rows longer than the model's context.

    Raises:
        ConfigError: no term of the method is left. DataError: see `Batches.check`.
    """
    template = PromptTemplate.of(load_tokenizer(path), config.template)
    longest = context_length(load_config(path)) or config.max_length
    config = replace(config, stop_id=template.stop_ids[-1], max_length=min(config.max_length, longest))
    phases = METHODS[config.method].phases(config)
    if not all(phase.terms for phase in phases):
        raise ConfigError(f"--method {config.method}: every loss of it is left out or weighs 0, so there is nothing to train; keep one")
    batches = Batches(config, template, forget, retain, refusals)
    batches.check({term.rows for phase in phases for term in phase.terms})
    return batches


def _train(run: Run, partial: Path, shown: Progress, run_json: Mapping[str, Any], save_seconds: float, name: str) -> None:
    saved = time.monotonic()
    try:
        while not run.done:
            shown.step(run.step())
            due = time.monotonic() - saved > save_seconds
            if run.agree(due) and not run.done:
                run.save(partial)
                saved = time.monotonic()
    except DivergenceError as error:
        if run.config.full:  # a good copy would be the memory of the weights once more
            kept = f"--full keeps no copy of the weights but the last checkpoint in {partial / FOLDER}, if one was due"
            raise DivergenceError(f"{error}; {kept}; lower --lr or the weights") from error
        run.restore_good()
        run.write_adapter(partial / LAST_GOOD, {**run_json, "diverged_at_step": run.at}, name)
        raise DivergenceError(f"{error}; the last good adapter is in {partial / LAST_GOOD}; lower --lr or the weights") from error
    except BaseException:
        # Ctrl-C or a crash between checkpoints: keep what there is, unless nothing was saved yet.
        if run.accelerator.is_main_process and TrainingState.read(partial) is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        shown.close()


def _finish(run: Run, partial: Path, output: Path, run_json: Mapping[str, Any], shown: Progress, resumed: int | None) -> TrainReport:
    error, rank = run.write_adapter(partial, run_json, output.name)
    report = TrainReport(
        output=str(output), method=run.config.method, base=run_json["base"], adapter_kind=run_json["adapter_kind"], rank=rank,
        steps=run.at, parameters=run.parameters, trainable=run.trainable, examples=run.examples, tokens=run.tokens,
        seconds=round(run.seconds, 3), peak_memory_bytes=run.peak_memory(), packed=run.passes.packed, losses=shown.last_losses(),
        fold_error=error, cut_answers=run.batches.cut, refusal_share=run.refusal_share, risen=shown.risen(), resumed_from=resumed,
    )
    if run.accelerator.is_main_process:
        for leftover in (FOLDER, f"{FOLDER}.old", f"{FOLDER}.new", LAST_GOOD):
            shutil.rmtree(partial / leftover, ignore_errors=True)
        (partial / "config.json").unlink(missing_ok=True)
        record(partial, "train", report.to_json(), run_json["config"])
    run.accelerator.wait_for_everyone()
    return report


def _begin(run: Run, base: str, partial: Path, resume: bool, accelerator: "Accelerator") -> int | None:
    """Load the checkpoint if there is one to resume; returns its step.

    Raises:
        ConfigError: it was begun with other settings, another base or other rows.
    """
    mine = json.loads(json.dumps({**run.config.to_json(), "base_identity": base, "rows": run.batches.digest}))
    theirs = _begun(partial) if resume else None
    if theirs is None:
        if accelerator.is_main_process:
            write_json(partial / BEGUN, mine)
        return None
    changed = sorted(key for key in mine if mine[key] != theirs.get(key))
    if changed:
        key = "method" if "method" in changed else changed[0]  # whose defaults the other keys follow
        raise ConfigError(
            f"--resume: the unfinished run in {partial} has {key} = {theirs.get(key)!r}, not {mine[key]!r}; give the same settings, "
            "or leave out --resume to start over"
        )
    state = TrainingState.read(partial)
    if state is None:
        return None
    run.load(state)
    return run.at


def _begun(partial: Path) -> dict[str, Any] | None:
    """What the run in `partial` was given, None where none was begun."""
    path = partial / BEGUN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class _partial:
    """`output_directory` on the main process; the others wait for its partial directory and its rename."""

    def __init__(self, output: Path, resume: bool, accelerator: "Accelerator") -> None:
        self.output, self.accelerator = output, accelerator
        self.partial = partial_path(output)
        self.directory = output_directory(output, resume=resume, keep=True, mode=PRIVATE) if accelerator.is_main_process else None

    def __enter__(self) -> Path:
        if self.directory:
            self.directory.__enter__()
        self.accelerator.wait_for_everyone()
        return self.partial

    def __exit__(self, *error: Any) -> None:
        if self.directory:
            self.directory.__exit__(*error)
        if error[0] is None:
            self.accelerator.wait_for_everyone()


def _accelerator(tracker: str | None, output: Path) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    sharding.check_launch()
    places = ProjectConfiguration(project_dir=str(output.parent), logging_dir=str(output.parent / f"{output.name}.logs"))
    try:
        accelerator = Accelerator(log_with=tracker, project_config=places)
    except ValueError as error:
        raise ConfigError(f"--tracker {tracker}: {error}") from error
    if tracker:
        _start(accelerator, tracker)
    sharding.shard_on_cpu(accelerator)
    return accelerator


def _start(accelerator: "Accelerator", tracker: str) -> None:
    if not accelerator.log_with:
        raise ConfigError(f"--tracker {tracker}: not installed; pip install {tracker}")
    logs = Path(accelerator.logging_dir)
    logs.mkdir(parents=True, exist_ok=True)  # where there is no such directory, wandb quietly takes another
    try:
        accelerator.init_trackers("sku", init_kwargs={"wandb": {"dir": str(logs)}})
    except Exception as error:  # every tracker has its own for no login or no server
        raise ConfigError(f"--tracker {tracker}: cannot be started ({(str(error) or type(error).__name__).splitlines()[0]})") from error


def _finished(output: Path) -> TrainReport:
    try:
        stored = json.loads((output / "sku_train.json").read_text(encoding="utf-8"))
        return TrainReport(**{name: stored.get(name) for name in TrainReport.__slots__} | {"finished_before": True})
    except (OSError, ValueError, TypeError) as error:
        raise SkuError(f"{output / 'sku_train.json'}: not readable ({error})") from error
