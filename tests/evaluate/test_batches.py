"""How answers and scores are batched: by tokens, halved where memory runs out, and kept batch by batch for --resume."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sku_vllm.data import Row
from sku_vllm.decoding.grouped_attention import grouped
from sku_vllm.decoding.prefix import shared_length
from sku_vllm.decoding.roomy_cache import RoomyLayer
from sku_vllm.evaluate.batches import cut_batches, run_batches
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.evaluate import evaluate_model
from sku_vllm.evaluate.measure_request import EvalRequest
from sku_vllm.evaluate.transformers_backend import TransformersBackend
from sku_vllm.model import load_model
from sku_vllm.model_spec import ModelSpec

FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


def test_one_long_item_does_not_pad_all() -> None:
    sizes = [0.9, *[0.1] * 20]
    batches = list(cut_batches(range(21), sizes, rows=8))
    assert batches[0] == [0] and [len(batch) for batch in batches[1:]] == [8, 8, 4]
    assert list(cut_batches([0], [7.0], rows=8)) == [[0]]  # what does not fit is tried alone


@pytest.mark.parametrize("full", [FULL, torch.OutOfMemoryError("CUDA out of memory.")])
def test_batches_are_halved_where_memory_runs_out(full: RuntimeError, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    tried: list[int] = []

    def run(batch: Sequence[int]) -> None:
        tried.append(len(batch))
        if len(batch) > 3:
            raise full
        done.extend(batch)

    run_batches([list(range(10)), list(range(10, 20))], run)
    assert done == list(range(20))
    assert tried == [10, 5, 3, 3, 3, 1, 3, 3, 3, 1]  # the second batch is not tried whole
    assert capsys.readouterr().err.count("memory does not suffice") == 2

    def alone(batch: Sequence[int]) -> None:
        raise full

    with pytest.raises(RuntimeError, match="memory"):
        run_batches([[0]], alone)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def run(batch: Sequence[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_batches([[0, 1, 2]], run)


def test_what_prompts_begin_with() -> None:
    assert shared_length([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert shared_length([[1, 2, 3], [1, 2, 3, 4]]) == 2  # a token of each is left to compute
    assert shared_length([[1], [1]]) == shared_length([[1, 2], [3, 4]]) == 0


def prompts_of(count: int) -> list[list[int]]:
    """Prompts of 7 to 29 tokens, the first five the same in all."""
    draw = np.random.default_rng(0)
    return [[9, 8, 7, 6, 5, *draw.integers(4, 500, int(length)).tolist()] for length in draw.integers(2, 25, count)]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    """A Llama in which two query heads share a key-value head."""
    return load_model(ModelSpec(tiny / "base", dtype="float32"))


def test_grouped_heads_answer_as_transformers_does(model: Any) -> None:
    prompts = prompts_of(9)
    ours = TransformersBackend(model, batch_tokens=300).generate(prompts, (0.0,), max_new_tokens=12, stop_ids=[2])
    for prompt, (answer,) in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=2)
        assert answer.ids == [token for token in theirs[0, len(prompt) :].tolist() if token != 2]
    assert model.config._attn_implementation == "sdpa"  # as it was


def test_keys_and_values_are_not_copied_for_every_head_and_step(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *_: pytest.fail("copied for every head"))
    grown: list[int] = []
    update = RoomyLayer.update

    def watched(layer: RoomyLayer, *states: Any) -> Any:
        before = layer._buffers[0].data_ptr()
        found = update(layer, *states)
        grown.append(before != layer._buffers[0].data_ptr() or found[0].data_ptr() != before)
        return found

    monkeypatch.setattr(RoomyLayer, "update", watched)
    TransformersBackend(model).generate(prompts_of(4), (0.0, 1.0), max_new_tokens=5, stop_ids=[2], ban_stop=True)
    assert len(grown) > 8 and not any(grown)


def test_answers_to_one_prompt_are_scored_as_each_alone(model: Any) -> None:
    prompts, draw = prompts_of(4), np.random.default_rng(1)
    asked = []
    for number in range(11):
        prompt = prompts[number % 4]
        asked.append(([*prompt, *draw.integers(4, 500, (0, 1, 6, 9)[number % 4 if number else 0]).tolist()], len(prompt)))
    counted: list[float] = []
    for size in (256, 2):
        found = TransformersBackend(model, batch_size=size).log_probs(asked, counted.append)
        for (ids, start), values in zip(asked, found, strict=True):
            with torch.inference_mode(), grouped(model):
                wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert values == pytest.approx([wanted[at - 1, ids[at]].item() for at in range(start, len(ids))], abs=1e-4)
    assert sum(counted) == 2 * sum(len(ids) for ids, start in asked if len(ids) > start)


def test_an_answer_may_use_the_context_that_its_own_prompt_leaves(model: Any) -> None:
    long, short = [5] * 1020, [6, 7, 8]
    backend = TransformersBackend(model)
    (first,), (second,) = backend.generate([long, short], (0.0,), max_new_tokens=9, stop_ids=[2], ban_stop=True)
    assert (len(first.ids), len(second.ids)) == (4, 9) and not first.ended and not second.ended


def test_a_run_that_is_killed_loses_one_batch_and_ends_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row.ask(" ".join(f"w{(7 * number + word) % 500}" for word in range(3 + number % 11))) for number in range(30)]
    decode, decoded = TransformersBackend._decode, []

    def killed(backend: Any, *given: Any) -> Any:
        if len(decoded) == 4:
            raise KeyboardInterrupt
        decoded.append(1)
        return decode(backend, *given)

    def run(output: str, resume: bool = False) -> Any:
        return evaluate_model(
            EvalRequest(
                ModelSpec(tiny / "base", adapter=tiny / "adapter", any_base=True),
                forget={"a": rows[:20], "b": rows[20:]},
                retain=rows[:9],
                judge=f"lexicon:{tiny / 'lexicon.json'}",
                config=EvalConfig(samples=2, max_new_tokens=8, batch_size=12),
                output=tmp_path / output,
                resume=resume,
            )
        )

    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TransformersBackend, "_decode", killed)
        run("killed")
    kept = tmp_path / "killed.partial/answers.jsonl"
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 4 and kept.stat().st_mode & 0o777 == 0o600
    with kept.open("a", encoding="utf-8") as file:
        file.write('{"set": "a", "answers": [[19, [[[4, 5')  # the line that a power cut tore
    again: list[int] = []

    def counted(backend: Any, *given: Any) -> Any:
        again.append(1)
        return decode(backend, *given)

    monkeypatch.setattr(TransformersBackend, "_decode", counted)
    resumed = run("killed", resume=True)
    assert len(again) == 5 + 3 + 1 - 4  # batches of 4 prompts in a and b, of 12 in retain
    assert resumed == whole
    for name in ("rows.jsonl", "sku_eval.json"):
        one, other = ((tmp_path / place / name).read_text(encoding="utf-8") for place in ("whole", "killed"))
        assert one == other.replace('/killed"', '/whole"')
    assert json.loads((tmp_path / "whole/sku_eval.json").read_text())["config"]["computed_in"] == "float32"
