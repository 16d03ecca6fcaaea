"""The inputs that `sku eval`, `sku tune` and `sku attack` share: model, rows, judges, settings and output.

Open this file to add an option to all three commands or to `sku eval`; tune and attack extend `MeasureRequest` in files of their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.data.columns import Columns
from sku_vllm.data.hub import pinned
from sku_vllm.data.long_rows import LongRows, check_on_long
from sku_vllm.data.readers import notices_at_the_end, read_rows
from sku_vllm.data.rows import Row, rows_digest
from sku_vllm.data.template import PromptTemplate
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.eval_config import BACKENDS, EvalConfig
from sku_vllm.judges import Judge, judge_of
from sku_vllm.model import context_length, load_config, load_tokenizer, resolve_model
from sku_vllm.model_spec import ModelSpec

Source = str | Path | Sequence[Row]  # a file of rows (FILE#SPLIT takes a part of it), or rows in memory
# How rows.jsonl calls the sets beside the forget sets: the retain set, and each border set with its name.
RETAIN, BORDER = "retain", "border:"


@dataclass(frozen=True, slots=True)
class Questions:
    """The rows that a request names and the judge of their answers, in memory; `measure` puts them to one model.

    Attributes:
        forget: named sets of prompts that the model should no longer answer harmfully.
        retain: prompts it should answer as well as before; responses are needed for perplexity, `must_contain` for QA accuracy.
        judge: decides what is harmful.
        border: named sets of benign prompts in the style of the forget sets, which it should answer too; no responses are needed.
        long: names the rows that were left out, since their prompt fills the model's context; None where that ends the run instead.

    Raises:
        ConfigError: a forget set is called as rows.jsonl calls another set.
    """

    forget: Mapping[str, Sequence[Row]]
    retain: Sequence[Row]
    judge: Judge
    border: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    long: LongRows | None = None

    def __post_init__(self) -> None:
        check_names(self.forget)

    @property
    def sets(self) -> dict[str, Sequence[Row]]:
        """Every set by its name in rows.jsonl: forget sets, retain set, border sets."""
        return {**self.forget, RETAIN: self.retain, **{BORDER + name: rows for name, rows in self.border.items()}}

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each set's rows, by its name in rows.jsonl: `row_digests` of a record."""
        return {name: rows_digest(rows) for name, rows in self.sets.items()}

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows of each set were left out."""
        return self.long.counts if self.long else {}

    @property
    def warnings(self) -> list[str]:
        """A line for people about each set that lost rows."""
        return [f"warning: {line}" for line in self.long.warnings] if self.long else []


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """The part that the requests of eval, tune and attack share.

    Attributes:
        model: the model, with an adapter to subtract if there is one.
        forget: sets of harmful prompts by name, at least one.
        retain: the retain set: prompts that should be answered as before.
        judge: one SPEC (`lexicon:FILE`, `refusal`, `answered`, `hf:MODEL`, `openai:URL#MODEL`, `all:A,B`), several, or a judge in memory.
        columns: `FIELD=COLUMN` for files with other column names, or `SET:FIELD=COLUMN` for one of them: a forget or border set's name,
            `forget` or `border` for all of these, or `retain`.
        config: how answers are generated.
        output: directory to write; None writes nothing.
        resume: continue an interrupted run of the same request from OUTPUT.partial/.
        on_long: "skip" leaves out rows whose prompt fills the model's context, and counts them; "error" stops at the first.
        backend: one of BACKENDS; "vllm" is vLLM's own engine in this process.
        tensor_parallel_size: GPUs that vLLM spreads the model over.
        quantization: how vLLM quantises the weights as it loads them, by its name for that; None serves them as they are stored.
        border: sets of benign prompts in the style of the forget sets by name; how many of them are refused is measured.

    Raises:
        ConfigError: no forget set, one that is called as rows.jsonl calls another set, no judge, a resume without an output, an unknown
            backend, or several GPUs or a quantization for a backend that does not take them.
    """

    model: ModelSpec
    forget: Mapping[str, Source]
    retain: Source
    judge: str | Sequence[str] | Judge
    columns: Sequence[str] = ()
    config: EvalConfig = EvalConfig()
    output: str | Path | None = None
    resume: bool = False
    on_long: str = "skip"
    backend: str = "transformers"
    tensor_parallel_size: int = 1
    quantization: str | None = None
    border: Mapping[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"--backend {self.backend}: unknown; choose from {', '.join(BACKENDS)}")
        if self.tensor_parallel_size < 1 or (self.tensor_parallel_size > 1 and self.backend != "vllm"):
            raise ConfigError(
                f"--tensor-parallel-size {self.tensor_parallel_size}: takes at least 1, and more only with --backend vllm; transformers "
                "spreads a model that one GPU cannot hold by itself"
            )
        if self.quantization is not None and self.backend != "vllm":
            raise ConfigError(f"--quantization {self.quantization}: is vLLM's; add --backend vllm (sku attack quantize has others)")
        if not self.forget:
            raise ConfigError("--forget: name at least one set of prompts, for instance unseen=data/unseen.jsonl")
        check_names(self.forget)
        if isinstance(self.judge, Sequence) and not self.judge:
            raise ConfigError("--judge: name at least one, for instance lexicon:words.json")
        if self.resume and not self.output:
            raise ConfigError("--resume: give the --output of the run that was interrupted")
        check_on_long(self.on_long)

    def questions(self) -> Questions:
        """The rows read and the judge loaded, without rows that the model has no room to answer.

        Raises:
            ConfigError: an unknown judge, columns that are no FIELD=COLUMN pairs, or that no file has.
            DataError: a file that is missing or malformed, with its line; a set without a prompt that leaves room for an answer.
            CheckpointError: see `long_rows`.
        """
        columns = self.all_columns()
        with notices_at_the_end():
            forget = {name: self.read(source, "forget", name, columns=columns) for name, source in self.forget.items()}
            border = {name: self.read(source, "border", name, safe=True, columns=columns) for name, source in self.border.items()}
            retain = self.read(self.retain, RETAIN, safe=True, columns=columns)
            columns.check()
        return self.fitting(Questions(forget, retain, self.loaded_judge(), border))

    def fitting(self, questions: Questions) -> Questions:
        """The questions without those whose prompt fills the model's context (unless `on_long` is "error")."""
        if self.on_long == "error":
            return questions
        long = self.long_rows()
        kept = {name: long.fitting(name, rows) for name, rows in questions.sets.items()}
        border = {name: kept[BORDER + name] for name in questions.border}
        return Questions({name: kept[name] for name in questions.forget}, kept[RETAIN], questions.judge, border, long)

    def long_rows(self) -> LongRows:
        """What knows which prompts fill the model's context. Raises CheckpointError if the model has no usable config or tokenizer."""
        tokenizer = load_tokenizer(self.model.model, self.model.revision)
        context = context_length(load_config(resolve_model(self.model.model, self.model.revision)))
        return LongRows(PromptTemplate.of(tokenizer, self.config.template), context, "the model's context")

    def read(
        self, source: Source, *names: str, need_response: bool = False, safe: bool = False, columns: Columns | None = None
    ) -> list[Row]:
        """The rows of one source; `names` are what `--columns` calls it, the keywords are those of `read_rows`."""
        if isinstance(source, str | Path):
            columns = columns or self.all_columns()
            return read_rows(source, columns=columns.of(*names), need_response=need_response, safe=safe)
        return list(source)

    def all_columns(self) -> Columns:
        """`columns` as the readers take them."""
        return Columns(self.columns, ("forget", RETAIN, "border", *self.forget, *self.border, *getattr(self, "test_forget", ())))

    def loaded_judge(self) -> Judge:
        """The judge, ready to use."""
        if isinstance(self.judge, Sequence):
            return judge_of([self.judge] if isinstance(self.judge, str) else self.judge)
        return self.judge

    def to_json(self) -> dict[str, Any]:
        """The configuration in the command's record: every option except `resume`, under its flag's name."""
        judge = [self.judge] if isinstance(self.judge, str) else list(self.judge) if isinstance(self.judge, Sequence) else [self.judge.name]
        return {
            **asdict(self.model),
            "forget": {name: source_name(source) for name, source in self.forget.items()},
            "retain": source_name(self.retain),
            "border": {name: source_name(source) for name, source in self.border.items()},
            "judge": judge,
            "columns": list(self.columns),
            "output": None if self.output is None else str(self.output),
            "on_long": self.on_long,
            "backend": self.backend,
            "tensor_parallel_size": self.tensor_parallel_size,
            "quantization": self.quantization,
            **asdict(self.config),
        }


@dataclass(frozen=True, slots=True)
class EvalRequest(MeasureRequest):
    """A measurement of one model; see MeasureRequest for the fields it shares with tune and attack.

    Attributes:
        lm_eval: tasks of lm-evaluation-harness, or YAML files that define one; an entry may hold several, separated by commas.
        lm_eval_limit: documents a task, for a first look.
    """

    lm_eval: Sequence[str] = ()
    lm_eval_limit: int | None = None

    def __post_init__(self) -> None:
        MeasureRequest.__post_init__(self)  # super() does not work in a dataclass with slots
        if self.lm_eval and self.quantization is not None:
            raise ConfigError("--lm-eval: runs on the weights as they are stored; leave --quantization out, in a run of its own")

    @property
    def tasks(self) -> list[str]:
        """The tasks one by one."""
        return [task.strip() for value in self.lm_eval for task in value.split(",") if task.strip()]

    def to_json(self) -> dict[str, Any]:
        """The configuration in sku_eval.json, but for `model_identity`, which is known after the run."""
        return MeasureRequest.to_json(self) | {"lm_eval": list(self.lm_eval), "lm_eval_limit": self.lm_eval_limit}


def check_names(forget: Iterable[str]) -> None:
    """Raise ConfigError if a forget set is called as rows.jsonl calls the retain set or a border set."""
    for name in forget:
        if not is_forget(name):
            what = "the retain set" if name == RETAIN else "border sets"
            raise ConfigError(f"--forget {name}=…: rows.jsonl calls {what} by that name; choose another")


def is_forget(name: str) -> bool:
    """Whether a set of rows.jsonl is a forget set."""
    return name != RETAIN and not name.startswith(BORDER)


def source_name(source: Source | None) -> str | None:
    """How a record names a source: its path, a hub set with the commit that was read, or how many rows were given in memory."""
    if source is None or isinstance(source, str | Path):
        return None if source is None else pinned(str(source))
    return f"{len(source)} rows in memory"
