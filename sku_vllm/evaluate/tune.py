"""The function behind `sku tune`: measure base − scale·delta at every scale, choose one, write the output directory.

Every scale is measured, since harm and cost need not rise or fall steadily with it. The limits and the rule are in `limits.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.data import PromptTemplate
from sku_vllm.data.rows import rows_digest
from sku_vllm.evaluate.answer_bar import Bar, Say, no_bar, silent
from sku_vllm.evaluate.backend import Progress
from sku_vllm.evaluate.curve import curve_svg
from sku_vllm.evaluate.limits import choose, clearly_less_harm
from sku_vllm.evaluate.measure_request import Questions
from sku_vllm.evaluate.measurement import measure
from sku_vllm.evaluate.opened import Opened, opened
from sku_vllm.evaluate.per_layer import FACTORS, GROUPS, layer_groups, write_scaled
from sku_vllm.evaluate.resume import measurement_directory, with_dtype, working_directory
from sku_vllm.evaluate.shares import check_opinion
from sku_vllm.evaluate.tune_request import TuneRequest, check_scales
from sku_vllm.evaluate.work import Work
from sku_vllm.output import record, remove, write_text
from sku_vllm.records.tuned import NOTE, SCALED, note_tuned


@dataclass(slots=True)
class TuneReport:
    """The result of a search for the best scale.

    Attributes:
        scale: the chosen scale; None when no scale stays within the limits.
        curve: one eval object per scale, with `scale` and `excess`: the exceeded limits, {name: (measured, limit)}.
        base: the eval object of the unedited model.
        test: eval objects of base and chosen scale on the test data; None without test data.
        skipped_rows: how many rows of each set were left out, since their prompt fills the model's context; those of the test data are
            counted in `test`.
        layers: with `per_layer`, the factor by which `scale` is multiplied in each layer; `layer_trials` are all measured factors.
    """

    scale: float | None
    curve: list[dict[str, Any]]
    base: dict[str, Any]
    test: dict[str, Any] | None = None
    skipped_rows: Mapping[str, int] = field(default_factory=dict)
    layers: dict[str, float] | None = None
    layer_trials: list[dict[str, Any]] = field(default_factory=list)

    @property
    def qualifies(self) -> bool:
        """Whether a scale was chosen."""
        return self.scale is not None

    def to_json(self) -> dict[str, Any]:
        """What `sku tune --json` prints."""
        document: dict[str, Any] = {"scale": self.scale, "qualifies": self.qualifies, "curve": self.curve, "base": self.base}
        document["skipped_rows"] = dict(self.skipped_rows)
        if self.layers is not None:
            document |= {"layers": self.layers, "layer_trials": self.layer_trials}
        return document | ({"test": self.test} if self.test else {})


def tune_scale(request: TuneRequest, progress: Say = silent, bar: Bar = no_bar) -> TuneReport:
    """Measure every scale and choose one. With an output, write sku_tune.json and curve.svg there.

    The adapter's directory then gets a small file that names the output, which `lora:ADAPTER@tuned` reads.

    Args:
        progress: called with one line before each measurement. bar: shows how far all measurements are.

    Raises:
        InputError: a file, judge, model or adapter that cannot be used; a judge that does not decide harm; an output that is not empty.
        JudgeError: the judge failed; the answers so far are in OUTPUT.partial/ for `resume`.
    """
    questions = request.questions()
    test = request.test_questions(questions.judge)
    sets = [rows for asked in (questions, test) if asked for rows in asked.sets.values()]
    request = with_dtype(request)
    settings = request.to_json()
    with working_directory(settings, rows_digest(*sets), resume=request.resume) as directory:
        with opened(request) as model:
            search = _Search(request, directory, progress, model)
            with bar(search.work(questions, test), "tuning") as search.advance:
                report = search.run(questions, test)
        report.skipped_rows = questions.skipped
        if directory:
            tested = {f"test:{name}": digest for name, digest in (test.digests if test else {}).items()}
            _write(directory, report, str(request.model.adapter), settings, questions.digests | tested)
    for line in [*questions.warnings, *(test.warnings if test else [])]:
        progress(line)
    if report.qualifies and request.output and note_tuned(str(request.model.adapter), request.output):
        progress(f"{request.model.adapter}: {NOTE} names this choice, for --arm NAME=lora:{request.model.adapter}@tuned")
    return report


class _Search:
    """Measures one model at many scales and stores every measurement for `resume`."""

    def __init__(self, request: TuneRequest, directory: Path | None, progress: Say, model: Opened) -> None:
        self.request, self.directory, self.progress, self.model = request, directory, progress, model
        self.advance: Progress = lambda work: None

    def work(self, questions: Questions, test: Questions | None) -> float:
        """Of all measurements, if a scale qualifies."""
        template = PromptTemplate.of(self.model.tokenizer, self.request.config.template)
        tuned, tested = (
            Work.of(template, asked, self.request.config, compared=True).total if asked else 0.0 for asked in (questions, test)
        )
        trials = GROUPS * len(FACTORS) if self.request.per_layer else 0
        return tuned * (1 + len(check_scales(self.request.measured_scales)) + trials) + 2 * tested

    def run(self, questions: Questions, test: Questions | None) -> TuneReport:
        """Measure the base and every scale, choose one, search the layers if asked for, and measure the choice on test data."""
        self.progress("measuring the base")
        base = self.measured(questions, 0.0)
        check_opinion(base, questions.judge, "no scale is better than another")
        for key, field_name in (("perplexity_ratio", "response"), ("qa_accuracy", "must_contain")):
            if base["retain"][key] is None:
                what = key.replace("_", " ")
                self.progress(f"warning: no retain row has {field_name!r}, so nothing limits what a scale may cost in {what}")
        curve = []
        for scale in check_scales(self.request.measured_scales):
            self.progress(f"measuring scale {scale:g}")
            found = self.measured(questions, scale)
            curve.append({"scale": scale, **found, "excess": self.request.limits.excess(found, base)})
        best = choose(curve)
        if best is None:
            return TuneReport(None, curve, base)
        report = TuneReport(best["scale"], curve, base)
        if self.request.per_layer:
            self.search_layers(report, best, questions)
        if test:
            self.progress("measuring the choice on test data")
            base = self.measured(test, 0.0, test=True)
            chosen = self.measured(test, best["scale"], report.layers, test=True)
            report.test = {"base": base, **chosen, "skipped_rows": test.skipped}
        return report

    def search_layers(self, report: TuneReport, best: Mapping[str, Any], questions: Questions) -> None:
        """Try every factor on each group of layers, first to last; keep one if it is within the limits and clearly less harmful."""
        scale, groups = best["scale"], layer_groups(self.model.layers)
        layers = {layer: 1.0 for group in groups for layer in group}
        for group in groups:
            for factor in FACTORS:
                trial = {**layers, **dict.fromkeys(group, factor)}
                self.progress(f"measuring layers {group[0]}–{group[-1]} at {factor:g} of scale {scale:g}")
                found = self.measured(questions, scale, trial)
                excess = self.request.limits.excess(found, report.base)
                report.layer_trials.append({"layers": trial, **found, "excess": excess})
                if not excess and clearly_less_harm(found, best):
                    best, layers = found, trial
        report.layers = layers

    def measured(
        self, questions: Questions, scale: float, layers: Mapping[str, float] | None = None, *, test: bool = False
    ) -> dict[str, Any]:
        """The eval object at a scale. layers: factors by which the scale is multiplied in each layer; None for 1 everywhere."""
        backend = self.model.at(scale, layers)
        return measure(
            backend,
            self.model.tokenizer,
            questions,
            reference=self.model.reference(),
            config=self.request.config,
            kept=measurement_directory(self.directory, scale, layers, test),
            progress=self.advance,
        ).to_json()


def _write(directory: Path, report: TuneReport, adapter: str, settings: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    write_text(directory / "curve.svg", curve_svg(report.base, report.curve, report.scale))
    if report.layers is not None and report.scale is not None:
        remove(directory / SCALED)  # a run that was interrupted may have written it already
        write_scaled(adapter, directory / SCALED, report.scale, report.layers)
    record(directory, "tune", report.to_json() | {"row_digests": dict(digests)}, settings)
