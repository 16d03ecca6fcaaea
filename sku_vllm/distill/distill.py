"""Distil an unlearned model into a damaged copy of itself and write it as a checkpoint: the one function behind `sku distill`.

Open this file to see the order of the work; each step has a file of its own beside it.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sku_vllm.checkpoint.manifest import file_digests, write_manifest
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.data import PromptTemplate
from sku_vllm.distill.distill_report import DistillReport, build_manifest, compute_of, made_from, share_of, write_card
from sku_vllm.distill.distill_request import DistillRequest
from sku_vllm.distill.distillation import Distillation
from sku_vllm.distill.lessons import Lessons, draw_lessons
from sku_vllm.distill.save_student import save_student
from sku_vllm.distill.student import make_student
from sku_vllm.errors import ConfigError
from sku_vllm.model import load_model, load_tokenizer, resolve_model
from sku_vllm.model_spec import ModelSpec
from sku_vllm.output import check_output, record, write_json
from sku_vllm.train.checkpointing import FOLDER, TrainingState
from sku_vllm.train.lora_model import no_dropout
from sku_vllm.train.memory import peak_memory
from sku_vllm.train.processes import SharedDirectory, main_process_says, start_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

BEGUN = "distill_config.json"  # in OUTPUT.partial/: what a resumed run has to be given again
Progress = Callable[[str, int, int, float | None], None]
"""Called with what is being done ("drawing answers" or "distilling"), steps done, steps in all, and the last loss."""


def distill_checkpoint(request: DistillRequest, progress: Progress = lambda what, done, total, loss: None) -> DistillReport:
    """Distil the teacher into a damaged copy of itself, and write that to `request.output`, complete or not at all.

    Unfinished work stays in `OUTPUT.partial/`, from which a request with `resume` continues, with bit for bit the result of an
    uninterrupted run.

    Returns:
        What `sku distill --json` prints.
    Raises:
        InputError: teacher, data or settings cannot be used; nothing is written.
        DivergenceError: the loss stopped being finite.
    """
    if request.resume and (request.directory / "sku_distill.json").is_file():
        return DistillReport.read_finished(request.directory)
    output = check_output(request.directory)
    path = resolve_model(request.teacher, request.revision)
    accelerator = start_accelerator(None, output)
    if accelerator.is_fsdp2:
        raise ConfigError("accelerate launch --use_fsdp: sku distill keeps whole models on every process; use DDP (--multi_gpu)")
    reader = CheckpointReader(path)
    settings = json.loads(json.dumps({**request.to_json(), "teacher": reader.identity()}))
    with SharedDirectory(output, request.resume, accelerator) as partial:
        state = begun_before(partial, settings) if request.resume else None
        if accelerator.is_main_process:
            write_json(partial / BEGUN, settings)
        try:
            run = prepare(request, path, accelerator, state, progress)
            _take_steps(run, partial, request.save_seconds, progress)
        except BaseException:
            # Ctrl-C or a crash: keep the partial directory if it has a checkpoint to resume from.
            if accelerator.is_main_process and TrainingState.read(partial) is None:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        report = _report(run, request, reader, output, state)
        if accelerator.is_main_process:
            _write(run, request, reader, partial, report)
        accelerator.wait_for_everyone()
    return report


def begun_before(partial: Path, settings: dict[str, Any]) -> TrainingState | None:
    """The checkpoint that an unfinished run left in `partial`, or None. Raises ConfigError if it was begun with other settings."""
    file = partial / BEGUN
    if not file.is_file():
        return None
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(key for key in settings if settings[key] != theirs.get(key))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"--resume: {file} cannot be read ({error}); leave out --resume to start over") from error
    if changed:
        key = changed[0]
        raise ConfigError(
            f"--resume: the unfinished run in {partial} has {key} = {theirs.get(key)!r}, not {settings[key]!r}; give the same settings, "
            "or leave out --resume to start over"
        )
    return TrainingState.read(partial)


def prepare(
    request: DistillRequest,
    path: Path,
    accelerator: "Accelerator",
    state: TrainingState | None = None,
    progress: Progress = lambda what, done, total, loss: None,
    lessons: Lessons | None = None,
) -> Distillation:
    """Load the teacher, draw the lessons unless `state` or `lessons` has them, and make the student, or restore it from `state`."""
    config = request.config
    teacher = load_model(ModelSpec(path, dtype=config.computed_in), device=accelerator.device, **no_dropout(path))
    if state is not None:
        lessons = Lessons.from_json(state.progress["lessons"])
    elif lessons is None:
        template = PromptTemplate.of(load_tokenizer(path), config.template)
        lessons = draw_lessons(teacher, template, request, lambda done, wanted: progress("drawing answers", int(done), wanted, None))
    run = Distillation(config, lessons, teacher, make_student(teacher, config), accelerator)
    if state is not None:
        run.restore(state)
    return run


def _take_steps(run: Distillation, partial: Path, save_seconds: float, progress: Progress) -> None:
    saved = time.monotonic() if run.at else -math.inf  # what was drawn, which can take longer than many steps, is kept at once
    while not run.done:
        progress("distilling", run.at + 1, run.config.steps, run.step())
        due = time.monotonic() - saved > save_seconds
        if main_process_says(run.accelerator, due) and not run.done:
            if run.accelerator.is_main_process:
                run.state().write(partial)
            saved = time.monotonic()


def _report(
    run: Distillation, request: DistillRequest, reader: CheckpointReader, output: Path, state: TrainingState | None
) -> DistillReport:
    compute = compute_of(run.tokens, run.lessons.drawn_tokens)
    return DistillReport(
        output=str(output),
        teacher=str(request.teacher),
        teacher_identity=reader.identity(),
        base_identity=made_from(reader.path, reader.identity())["base_identity"],
        alpha=None if request.config.fresh else request.config.alpha,
        steps=run.at,
        parameters=sum(parameter.numel() for parameter in run.names),
        rows=run.lessons.counts,
        left_out=run.lessons.left_out,
        skipped_rows=run.lessons.skipped,
        trained_tokens=run.tokens,
        teacher_tokens=run.tokens,
        drawn_tokens=run.lessons.drawn_tokens,
        compute=compute,
        pretraining_share=share_of(compute, request.pretraining_tokens),
        first_loss=run.losses[0],
        loss=fmean(run.losses[-max(1, run.at // 10) :]),
        seconds=round(run.seconds, 3),
        peak_memory_bytes=peak_memory(run.accelerator.device),
        resumed_from=None if state is None else state.progress["at"],
    )


def _write(run: Distillation, request: DistillRequest, reader: CheckpointReader, partial: Path, report: DistillReport) -> None:
    """Write checkpoint, card, manifest and record, and remove what only a resumed run needs."""
    for leftover in (FOLDER, f"{FOLDER}.old", f"{FOLDER}.new"):
        shutil.rmtree(partial / leftover, ignore_errors=True)
    (partial / BEGUN).unlink(missing_ok=True)
    dtype = save_student(run.student, reader, partial)
    write_card(partial, report)
    manifest = build_manifest(report, request, made_from(reader.path, reader.identity()), dtype)
    manifest["files"] = file_digests(partial, {})
    write_manifest(partial, manifest)
    record(partial, "distill", report.to_json(), request.to_json())
