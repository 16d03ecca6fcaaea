"""lm-evaluation-harness through `sku eval`: the same numbers as the harness run directly, offline, on a local task."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sku_vllm.errors import ConfigError
from sku_vllm.evaluate import lm_eval as bridge
from sku_vllm.model_spec import ModelSpec

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def task(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice task out of the lab's own questions: which of two answers is likelier?"""
    folder = tmp_path_factory.mktemp("task")
    rows = [json.loads(line) for line in (lab / "retain/test.jsonl").read_text().splitlines()]
    asked = [row for row in rows if row.get("must_contain")][:12]
    documents = [
        {"question": row["prompt"], "choices": [row["response"], asked[i - 1]["response"]], "answer": 0} for i, row in enumerate(asked)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "lab_facts.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "lab_facts",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}\n",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "metric_list": [
                    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                    {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
                ],
            }
        )
    )
    return folder / "lab_facts.yaml"


@pytest.fixture(scope="module")
def broken(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's Llama with noise on its weights: an edited model that is clearly worse."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("broken") / "model"
    model = AutoModelForCausalLM.from_pretrained(lab / "llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.5 * parameter.std() * torch.randn_like(parameter) if parameter.dim() == 2 else 0.0
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(lab / "llama").save_pretrained(path)
    return path


def test_same_numbers_as_the_harness_itself(lab: Path, broken: Path, task: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    ours = {row["metric"]: row for row in bridge.run_tasks(ModelSpec(broken, base=lab / "llama"), [str(task)])}
    for side, model in (("edited", broken), ("base", lab / "llama")):
        direct = lm_eval.simple_evaluate(
            "hf",
            model_args={"pretrained": str(model), "device": "cpu"},
            tasks=["lab_facts"],
            batch_size=8,
            task_manager=TaskManager(include_path=str(task.parent), include_defaults=False),
        )
        for metric in ("acc", "acc_norm"):
            assert ours[metric][side] == direct["results"]["lab_facts"][f"{metric},none"]
            assert ours[metric][f"{side}_stderr"] == pytest.approx(direct["results"]["lab_facts"][f"{metric}_stderr,none"])
    assert ours["acc"]["base"] > 0.8 and ours["acc"]["difference"] == ours["acc"]["edited"] - ours["acc"]["base"]
    # Paired over documents, not the root of both variances.
    assert 0 < ours["acc"]["stderr"] < 0.2


@pytest.mark.slow
def test_same_numbers_as_the_harness_itself_on_vllm(lab: Path, broken: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines one after the other, then the harness's own."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    edited = ModelSpec(broken, base=lab / "llama", dtype="float32")
    ours = {row["metric"]: row for row in bridge.run_tasks(edited, [str(task)], backend="vllm")}
    manager = TaskManager(include_path=str(task.parent), include_defaults=False)
    arguments = {"pretrained": str(broken), "dtype": "float32", "gpu_memory_utilization": 0.8}
    direct = lm_eval.simple_evaluate("vllm", model_args=arguments, tasks=["lab_facts"], task_manager=manager)["results"]["lab_facts"]
    for metric in ("acc", "acc_norm"):
        assert ours[metric]["edited"] == direct[f"{metric},none"]
        assert ours[metric]["edited_stderr"] == pytest.approx(direct[f"{metric}_stderr,none"])
    assert ours["acc"]["base"] > 0.8 and ours["acc"]["difference"] < 0 and 0 < ours["acc"]["stderr"] < 0.2


def test_through_the_command_and_into_the_report(lab: Path, broken: Path, task: Path, tmp_path: Path, run_sku: Callable) -> None:
    for name in ("forget/unseen", "retain/validation"):
        (tmp_path / f"{name.split('/')[0]}.jsonl").write_text("".join((lab / f"{name}.jsonl").read_text().splitlines(keepends=True)[:8]))
    arguments = [
        "eval",
        "--model",
        broken,
        "--base",
        lab / "llama",
        "--forget",
        f"unseen={tmp_path}/forget.jsonl",
        "--retain",
        tmp_path / "retain.jsonl",
        "--judge",
        f"lexicon:{lab}/lexicon.json",
        "--samples",
        0,
        "--max-new-tokens",
        4,
    ]
    done = run_sku(*arguments, "--lm-eval", task, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["lm_eval"]
    assert {row["metric"] for row in rows} == {"acc", "acc_norm"} and all(row["task"] == "lab_facts" for row in rows)
    assert run_sku("report", tmp_path / "out", "--output", tmp_path / "r.html").returncode == 0
    assert "lab_facts" in (tmp_path / "r.html").read_text()


def test_adapter_is_subtracted(lab: Path, task: Path, tmp_path: Path) -> None:
    """An adapter at scale 0 is the base; at a large scale it is not."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(lab / "llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    torch.manual_seed(0)
    model.save_pretrained(tmp_path / "adapter")
    for scale, same in ((0.0, True), (50.0, False)):
        edited = ModelSpec(lab / "llama", adapter=tmp_path / "adapter", scale=scale, any_base=True)
        rows = bridge.run_tasks(edited, [str(task)])
        assert (rows[0]["difference"] == 0) is same


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.yaml", "no such file"),
        ("no_task.yaml", "not a task"),
        ("not_text.yaml", "not a task"),
        pytest.param("hellaswagg", "did you mean 'hellaswag'", marks=pytest.mark.slow),
    ],
)
def test_unknown_tasks(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "no_task.yaml").write_text("dataset_path: json\n")
    (tmp_path / "not_text.yaml").write_bytes(b"task: \xff\n")
    with pytest.raises(ConfigError, match=message):
        bridge.run_tasks(ModelSpec("unused"), [str(tmp_path / name) if name.endswith(".yaml") else name])
