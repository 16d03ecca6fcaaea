"""The training loop of every method, on one process or many, from the start or from a checkpoint.

Open this file to follow `train_adapter` from its request to the directory that it writes.
"""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sku_vllm.checkpoint.reader import base_identity
from sku_vllm.data import PromptTemplate
from sku_vllm.data.long_rows import LongRows
from sku_vllm.errors import ConfigError, DivergenceError
from sku_vllm.methods.registry import METHODS
from sku_vllm.methods.train_config import TrainConfig
from sku_vllm.model import context_length, load_config, load_tokenizer, resolve_model, settle_dtype
from sku_vllm.model_spec import ModelSpec
from sku_vllm.output import check_output, record
from sku_vllm.train.batches import Batches
from sku_vllm.train.checkpointing import FOLDER, TrainingState
from sku_vllm.train.memory import keep_few_kernels, peak_memory
from sku_vllm.train.processes import SharedDirectory, main_process_says, start_accelerator
from sku_vllm.train.progress import Progress
from sku_vllm.train.resume import BEGUN, as_begun, continue_run
from sku_vllm.train.run import Run
from sku_vllm.train.run_state import save_checkpoint, write_adapter
from sku_vllm.train.saving import run_record
from sku_vllm.train.targets import Look, NoRefusals, rungs
from sku_vllm.train.train_report import TrainReport
from sku_vllm.train.train_request import TrainRequest

LAST_GOOD = "last-good"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def train_adapter(request: TrainRequest, *, progress: bool = True, log: Callable[[str], None] = _to_stderr) -> TrainReport:
    """Train an adapter and write it to `request.output` (mode 0700), complete or not at all.

    Unfinished work stays in `OUTPUT.partial/`, from which a request with `resume` continues, with bit for bit the result of an
    uninterrupted run. Contrastive methods choose a source of refusals that works on this base (train/targets.py) unless the request names
    one; a resumed run keeps its source.

    Args:
        progress: show a bar on a terminal, and lines in a log.
        log: called with a line on each choice, on how well the base tells harmful prompts apart, and at the end for sets that lost rows
            to the length limit.

    Raises:
        InputError: model, data or settings cannot be used; nothing is written.
        DivergenceError: a loss or gradient stopped being finite; the last good adapter is in OUTPUT.partial/last-good/ (`full` has none).
    """
    request = as_begun(request)
    if request.resume and (request.directory / "sku_train.json").is_file():
        return TrainReport.read_finished(request.directory)
    looks: list[Look] = []
    sources = rungs(request.config, request.refusals)
    for source, after in zip_longest(sources, sources[1:]):
        try:
            return _train_with(replace(request, config=request.config.with_targets(source)), progress, looks, log)
        except NoRefusals as error:
            if after is None:
                raise
            log(f"{error}; next: --targets {after}")
            looks.append(error.look)
            request = replace(request, resume=False)
    raise AssertionError("the last source either trains or raises")


def _train_with(request: TrainRequest, progress: bool, looks: list[Look], log: Callable[[str], None]) -> TrainReport:
    """`train_adapter` with one source of refusals; `looks` are those at the sources before it. Raises NoRefusals if it gives too few."""
    output = request.directory
    check_output(output)
    path = resolve_model(request.model, request.revision)
    accelerator = start_accelerator(request.tracker, output)
    batches = prepare(path, request)
    config = batches.config
    kind = "dense" if config.full else "lora"
    run_json = run_record(config.method, str(request.model), base_identity(path), kind, config.to_json())
    run = Run(path, config, batches, accelerator, batches.template.tokenizer)
    with SharedDirectory(output, request.resume, accelerator) as partial:
        run.drawn.looks = [*looks]
        resumed = continue_run(run, run_json["base_identity"], partial, request.resume)
        if any(phase.sample_at is not None for phase in run.phases):
            run.drawn.fit_probe(run.bare.gathered)
            if run.drawn.probe:
                log(run.drawn.probe.separation.text())
        shown = Progress(run, partial, enabled=progress and accelerator.is_main_process)
        _train(run, partial, shown, run_json, request)
        report = _finish(run, partial, output, run_json, shown, resumed)
    accelerator.end_training()
    for line in batches.long.warnings if accelerator.is_main_process else ():
        log(f"warning: {line}")
    return report


def prepare(path: Path, request: TrainRequest) -> Batches:
    """The rows of every step, checked, for the base in directory `path`.

    `Batches.config` is the request's with three changes: `stop_id` is the token that ends an answer, `max_length` is at most the model's
    context, and `computed_in` is what `dtype` comes to here.

    Raises:
        ConfigError: no term of the method is left. DataError: see `Batches.check` and `LongRows.fitting`.
    """
    keep_few_kernels()  # before `--dtype auto` is timed
    config = request.config
    template = PromptTemplate.of(load_tokenizer(path), config.template)
    longest = context_length(load_config(path)) or config.max_length
    computed = _computed_in(path, config)
    config = replace(config, stop_id=template.stop_ids[-1], max_length=min(config.max_length, longest), computed_in=computed)
    phases = METHODS[config.method].phases(config)
    if not all(phase.terms for phase in phases):
        raise ConfigError(f"--method {config.method}: every loss of it is left out or weighs 0, so there is nothing to train; keep one")
    forget, retain, refusals, border = request.forget, request.retain, request.refusals, request.border
    long = LongRows(template, config.max_length, "--max-length")
    if config.on_long == "skip":
        forget = replace(forget, rows=long.fitting("forget", forget.rows))
        retain = replace(retain, rows=long.fitting("retain", retain.rows)) if retain else None
        refusals = long.fitting("refusals", refusals) if refusals else ()
        border = long.fitting("border", border) if border else ()
    batches = Batches(config, template, forget, retain, refusals, border)
    batches.long = long
    batches.check({term.rows for phase in phases for term in phase.terms})
    return batches


def _computed_in(path: Path, config: TrainConfig) -> str | None:
    """What `--dtype` comes to, the same on every process: what one measures may differ from what another does."""
    if config.quantize:
        return None
    if config.computed_in or (config.full and config.dtype == "auto"):
        return config.computed_in or "float32"
    from accelerate.utils import broadcast_object_list

    found = [settle_dtype(ModelSpec(path, dtype=config.dtype)).computed_in]
    return str(broadcast_object_list(found)[0])


def _train(run: Run, partial: Path, shown: Progress, run_json: Mapping[str, Any], request: TrainRequest) -> None:
    """Take every step that is left, and write checkpoints on the way."""
    saved = time.monotonic()
    try:
        while not run.done:
            shown.step(run.step())
            due = run.drawn.unsaved or time.monotonic() - saved > request.save_seconds
            if main_process_says(run.accelerator, due) and not run.done:
                save_checkpoint(run, partial)
                saved, run.drawn.unsaved = time.monotonic(), False
    except DivergenceError as error:
        if run.config.full:  # a copy of the last good weights would need as much memory as the weights
            kept = f"--full keeps no copy of the weights but the last checkpoint in {partial / FOLDER}, if one was due"
            raise DivergenceError(f"{error}; {kept}; lower --lr or the weights") from error
        run.restore_good()
        write_adapter(run, partial / LAST_GOOD, {**run_json, "diverged_at_step": run.at}, request.directory.name)
        raise DivergenceError(f"{error}; the last good adapter is in {partial / LAST_GOOD}; lower --lr or the weights") from error
    except BaseException:
        # Ctrl-C or a crash: keep the partial directory if it has a checkpoint to resume from.
        if run.accelerator.is_main_process and TrainingState.read(partial) is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        shown.close()


def _finish(run: Run, partial: Path, output: Path, run_json: Mapping[str, Any], shown: Progress, resumed: int | None) -> TrainReport:
    """Write adapter and record, and remove checkpoints."""
    error, rank = write_adapter(run, partial, run_json, output.name)
    report = TrainReport(
        output=str(output),
        method=run.config.method,
        base=run_json["base"],
        adapter_kind=run_json["adapter_kind"],
        rank=rank,
        steps=run.at,
        parameters=run.parameters,
        trainable=run.trainable,
        examples=run.examples,
        tokens=run.tokens,
        seconds=round(run.seconds, 3),
        peak_memory_bytes=peak_memory(run.accelerator.device),
        packed=run.passes.packed,
        losses=shown.last_losses(),
        fold_error=error,
        cut_answers=run.batches.cut,
        skipped_rows=run.batches.long.counts,
        refusal_share=run.drawn.refusal_share,
        targets=run.config.targets if run.batches.samples else None,
        looks=[look.to_json() for look in run.drawn.looks],
        separation=run.drawn.probe.separation.to_json() if run.drawn.probe else None,
        risen=shown.risen(),
        resumed_from=resumed,
    )
    if run.accelerator.is_main_process:
        for leftover in (FOLDER, f"{FOLDER}.old", f"{FOLDER}.new", LAST_GOOD):
            shutil.rmtree(partial / leftover, ignore_errors=True)
        (partial / BEGUN).unlink(missing_ok=True)
        record(partial, "train", report.to_json(), run_json["config"])
    run.accelerator.wait_for_everyone()
    return report
