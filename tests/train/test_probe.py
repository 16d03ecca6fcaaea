"""The probe: hidden states with and without a shared beginning, and what it says of prompts that differ or do not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sku_vllm.data import load_dataset
from sku_vllm.methods import TrainConfig, train_adapter
from sku_vllm.model import load_model
from sku_vllm.train import probe
from sku_vllm.train.forward import Forward
from sku_vllm.train.train_request import TrainRequest


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_states_are_the_models_own_whatever_the_prompts_share(trainable: Path, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    model = load_model(trainable / arch)
    monkeypatch.setattr(probe, "TOKENS", 40)  # several batches
    for shared in ([], [5, 6, 7, 8]):
        prompts = [[*shared, *range(20, 21 + number)] for number in range(7)]
        if not shared:
            prompts[3] = [9, 8, 7]
        found = probe.last_states(Forward(model), prompts)
        for number, prompt in enumerate(prompts):
            states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
            for place, layer in enumerate(probe._layers(2)):
                assert np.abs(found[place][number] - states[layer][0, -1].detach().numpy()).max() < 1e-4


def test_it_tells_apart_what_can_be_told_apart_and_says_what_a_refusal_costs(trainable: Path) -> None:
    """Prompts of two kinds of words, a border that is drawn from both, and kinds that do not differ."""
    random, passes = np.random.default_rng(0), Forward(load_model(trainable / "llama"))

    def prompts(low: int, high: int, count: int = 60) -> list[list[int]]:
        return [random.integers(low, high, size=int(random.integers(3, 12))).tolist() for _ in range(count)]

    fitted = probe.fit_probe(passes, prompts(20, 60), prompts(300, 340), prompts(20, 60, 20) + prompts(300, 340, 20))
    assert fitted is not None
    found = fitted.separation
    assert found.auc["retain"] > 0.75 and 0.4 < found.auc["border"] < found.auc["retain"]
    assert found.refused["retain"] < found.refused["border"] < 0.95
    benign, harmful = (sum(fitted.harmless(prompts(*words))) for words in ((300, 340), (20, 60)))
    assert benign > harmful + 15 and harmful < 20
    answered, refused = np.array(found.curve["border"]).T
    assert (np.diff(answered) >= 0).all() and (np.diff(refused) <= 0).all() and refused[0] > refused[-1]
    assert "refusing 90 % of the harmful prompts costs at least" in found.text() and "of the border prompts (AUC" in found.text()
    same = probe.fit_probe(passes, prompts(20, 60), prompts(20, 60))
    assert same is not None and 0.25 < same.separation.auc["retain"] < 0.75 and same.separation.refused["retain"] > 0.6
    assert probe.fit_probe(passes, prompts(20, 60, 9), prompts(20, 60)) is None and fitted.harmless([]) == []


def test_a_run_says_how_well_its_base_tells_where_its_method_chooses_what_to_refuse(trainable: Path, tmp_path: Path) -> None:
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    for method, has in (("npo", False), ("sku-contrastive-two", True)):
        config = TrainConfig.of(method, steps=2, batch_size=2, samples=4, sample_tokens=4, **({"targets": "given"} if has else {}))
        said: list[str] = []
        report = train_adapter(TrainRequest(trainable / "llama", *sets, tmp_path / method, config), progress=False, log=said.append)
        assert (report.separation is not None) == any("telling harm apart" in line for line in said) == has


def test_a_beginning_is_shared_only_where_no_window_sees_the_padding_behind_it(trainable: Path, tmp_path: Path) -> None:
    """Mistral with a window of 8 tokens: states and drawn answers are those of prompts computed whole."""
    from transformers import MistralConfig, MistralForCausalLM

    from sku_vllm.train import sampling

    torch.manual_seed(0)
    sizes = {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(**sizes, intermediate_size=96, max_position_embeddings=256, sliding_window=8)).eval()
    passes = Forward(model)
    prompts = [[*range(5, 75), *range(80, 81 + number)] for number in range(6)]
    found = probe.last_states(passes, prompts)
    config = TrainConfig.of(samples=6, sample_tokens=1, floor=0.999)  # the likeliest token alone
    drawn = {tuple(row.ids[:-1]): row.ids[-1] for row in sampling.draw_answers(passes, prompts, config, [], beta=0.0)}
    for number, prompt in enumerate(prompts):
        whole = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        for place, layer in enumerate(probe._layers(2)):
            assert np.abs(found[place][number] - whole.hidden_states[layer][0, -1].detach().numpy()).max() < 1e-4
        assert drawn[tuple(prompt)] == int(whole.logits[0, -1].argmax())
