"""The function behind `sku eval`: read the rows, load the model, measure it and its base, write the output directory."""

from pathlib import Path

from sku_vllm.checkpoint.reader import base_identity
from sku_vllm.data import PromptTemplate
from sku_vllm.data.rows import rows_digest
from sku_vllm.evaluate.answer_bar import Bar, no_bar
from sku_vllm.evaluate.answers import KEPT_ANSWERS
from sku_vllm.evaluate.judging import KEPT_VERDICTS
from sku_vllm.evaluate.lm_eval import check_tasks, run_tasks
from sku_vllm.evaluate.measure_request import EvalRequest
from sku_vllm.evaluate.measurement import EvalReport, measure
from sku_vllm.evaluate.opened import opened
from sku_vllm.evaluate.resume import with_dtype, working_directory
from sku_vllm.evaluate.work import Work


def evaluate_model(request: EvalRequest, progress: Bar = no_bar) -> EvalReport:
    """Measure a model, or base − scale·delta of an adapter, against its base. With an output, write sku_eval.json and rows.jsonl there.

    Args:
        progress: a progress display; `answer_bar` shows it on stderr.

    Raises:
        InputError: a file, judge, model or adapter that cannot be used; the output is not empty; see `EvalRequest.questions`.
        JudgeError: the judge failed; the answers so far are in OUTPUT.partial/ for `resume`.
    """
    questions = request.questions()
    if request.tasks:
        check_tasks(request.tasks)
    request = with_dtype(request)
    config, settings, rows = request.config, request.to_json(), rows_digest(*questions.sets.values())
    with working_directory(settings, rows, resume=request.resume, leftovers=(KEPT_ANSWERS, KEPT_VERDICTS)) as directory:
        with opened(request) as model:
            reference = model.reference()
            work = Work.of(PromptTemplate.of(model.tokenizer, config.template), questions, config, compared=reference is not None)
            with progress(work.total, Path(request.output).name if request.output else "measuring") as done:
                report = measure(
                    model.backend(),
                    model.tokenizer,
                    questions,
                    reference=reference,
                    config=config,
                    kept=directory,
                    progress=done,
                    quality=True,
                )
        del model, reference  # from memory: lm-eval loads the model by itself
        report.skipped_rows, report.warnings = questions.skipped, questions.warnings
        report.row_digests = questions.digests
        if request.tasks:
            report.lm_eval = run_tasks(request.model, request.tasks, backend=request.backend, limit=request.lm_eval_limit)
        if directory:
            # The identity of the weights lets `sku report` check that the judged checkpoint is the served one.
            path = request.model.model
            made = {"model_identity": base_identity(path) if Path(path).is_dir() else None, "prompt_template": report.prompt_template}
            report.write(directory, settings | made)
    return report
