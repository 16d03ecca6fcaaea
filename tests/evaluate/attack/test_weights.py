"""Attacks of someone with the weights: projection of every write, directions, shares of base − edited, searches, real quantisers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sku_vllm.data import read_rows
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.attack.abliterate import ONE, SEVERAL, candidates
from sku_vllm.evaluate.attack.attack import AttackCase
from sku_vllm.evaluate.attack.attack_config import AttackConfig
from sku_vllm.evaluate.attack.attack_model import attack_model, load_attack
from sku_vllm.evaluate.attack.attack_request import AttackRequest
from sku_vllm.evaluate.attack.attenuate import LEADING, WHOLE, add_share, difference, leading
from sku_vllm.evaluate.attack.attenuate_abliterate import BOTH
from sku_vllm.evaluate.attack.directions import directions, hidden_states, span
from sku_vllm.evaluate.attack.kinds import KINDS, NEED_BASE
from sku_vllm.evaluate.attack.residual import project_out, writes
from sku_vllm.evaluate.attack.target import Restored
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.model import load_model, load_tokenizer
from sku_vllm.model_spec import ModelSpec

PROMPTS = [[1, 5, 9, 200, 40], [1, 77, 8], [1, 30, 31, 32, 33, 34, 35]]


def asked(lab: Path, spec: ModelSpec, kinds: list[str], **settings: object) -> AttackRequest:
    rows = read_rows(lab / "forget/unseen.jsonl")[:4]
    return AttackRequest(
        spec,
        kinds=kinds,
        forget={"f": rows},
        retain=read_rows(lab / "retain/test.jsonl")[:4],
        relearn=read_rows(lab / "forget/train.jsonl")[:12],
        judge=f"lexicon:{lab / 'lexicon.json'}",
        config=EvalConfig(samples=0, max_new_tokens=16),
        settings=AttackConfig(**settings),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def other(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's Llama with other weights in every layer, as the base of an edit."""
    model = load_model(ModelSpec(lab / "llama", dtype="float32"))
    noise = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.01 * torch.randn(weight.shape, generator=noise)
    path = tmp_path_factory.mktemp("other")
    model.save_pretrained(path)
    load_tokenizer(lab / "llama").save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_no_write_is_forgotten(lab: Path, name: str) -> None:
    """After it the stream has no part along the directions (the last states are behind a norm). OPT writes positions and biases too."""
    model = load_model(ModelSpec(lab / name, dtype="float32"))
    basis = torch.linalg.qr(torch.randn(128, 2, generator=torch.Generator().manual_seed(0)))[0].T
    before = hidden_states(model, PROMPTS)[:, :-1]
    assert before.shape == (3, 2, 3, 128) and float((before @ basis.T).abs().max()) > 0.1
    with Restored(model) as weights:
        project_out(model, basis)
        after = hidden_states(model, PROMPTS)[:, :-1]
        assert float((after @ basis.T).abs().max()) < 1e-4 and float(after.abs().max()) > 0.1
        weights.put_back()
        project_out(model, {0: basis[:1], 1: basis[1:], 2: basis[:1]}, strength=2.0)
        assert float((hidden_states(model, PROMPTS)[:, :-1] @ basis.T).abs().max()) > 0.01
    assert torch.equal(hidden_states(model, PROMPTS)[:, :-1], before)


def test_hidden_states_do_not_depend_on_padding(lab: Path) -> None:
    model = load_model(ModelSpec(lab / "llama", dtype="float32"))
    together = hidden_states(model, PROMPTS, positions=2)
    alone = torch.cat([hidden_states(model, [prompt], positions=2) for prompt in PROMPTS])
    assert torch.allclose(together, alone, atol=1e-4)


def test_an_architecture_whose_writes_are_not_found_is_refused(lab: Path) -> None:
    model = load_model(ModelSpec(lab / "llama", dtype="float32"))
    layer = model.model.layers[1]
    layer.other, layer.mlp.other = layer.mlp, layer.mlp.down_proj
    del layer.mlp.down_proj
    with pytest.raises(ConfigError, match="LlamaForCausalLM, layer 1: attention and MLP output are not found"):
        writes(model)


def test_the_direction_that_parts_prompts_is_first_and_candidates_keep_within_their_number() -> None:
    noise, planted = torch.Generator().manual_seed(0), torch.nn.functional.one_hot(torch.tensor(3), 16).float()
    harmful, benign = (torch.randn(20, 3, 2, 16, generator=noise) for _ in range(2))
    harmful[:, 1, 1] += 6 * planted
    found = directions(harmful, benign)
    assert (found[0].layer, found[0].position) == (2, -1) and float(found[0].unit @ planted) > 0.9 and len(found) == 6
    basis = span(found, 3)
    assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-5)
    for most in (1, 2, 7, 24):
        edits = candidates(found, 3, most)
        assert len(edits) <= max(most, 1) and edits[0].family == ONE
        assert most < 2 or any(edit.family == SEVERAL for edit in edits)


def test_all_of_the_difference_is_the_base_and_its_leading_vectors_are_the_adapter(lab: Path, tiny: Path) -> None:
    request = asked(lab, ModelSpec(tiny / "base", adapter=tiny / "adapter", dtype="float32"), ["attenuate"])
    case = AttackCase(request, print)
    try:
        whole, base = difference(case), dict(case.target.base.named_parameters())
        assert len(whole) == 14  # all linear layers of two layers
        for added in (whole, leading(whole, 8)):  # the adapter has rank 8
            with case.target.changed():
                add_share(added, 1.0, case.target.model)
                own = dict(case.target.model.named_parameters())
                assert all(torch.allclose(own[name], base[name], atol=1e-4) for name in own)
        assert not torch.allclose(
            leading(whole, 1)["model.layers.0.mlp.up_proj.weight"], whole["model.layers.0.mlp.up_proj.weight"], atol=1e-3
        )
    finally:
        case.close()


@pytest.mark.parametrize(
    ("kind", "families"), [("abliterate", [ONE, SEVERAL]), ("attenuate", [WHOLE, LEADING]), ("attenuate-abliterate", [BOTH])]
)
def test_searches_measure_the_best_of_each_family_and_restore_the_weights(lab: Path, other: Path, kind: str, families: list[str]) -> None:
    case = AttackCase(asked(lab, ModelSpec(lab / "llama", base=other, dtype="float32"), [kind], candidates=3), print)
    try:
        before = {name: tensor.clone() for name, tensor in case.target.model.state_dict().items()}
        found = list(load_attack(kind).run(case))
        assert all(torch.equal(tensor, before[name]) for name, tensor in case.target.model.state_dict().items())
    finally:
        case.close()
    assert [finding.attack.split(": ")[0] for finding in found] == families
    assert sum(len(finding.details["searched"]) for finding in found) == 3
    for finding in found:
        searched = finding.details["searched"]
        chosen = next(tried for tried in searched if finding.attack.endswith(f": {tried['candidate']}"))
        assert chosen["harmful"] + chosen["knowledge"] == max(tried["harmful"] + tried["knowledge"] for tried in searched)
        assert finding.details["candidates"] == 3 and finding.details["cost_tokens"] > 300


def test_what_needs_a_base_says_so_and_all_leaves_it_out(lab: Path) -> None:
    with pytest.raises(ConfigError, match="attack attenuate: adds base − edited back; name the base with --base"):
        attack_model(asked(lab, ModelSpec(lab / "llama"), ["attenuate"]))
    assert asked(lab, ModelSpec(lab / "llama"), ["all"]).kinds == tuple(kind for kind in KINDS if kind not in NEED_BASE)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("gptq", "gptqmodel", "gptq"), ("awq", "llmcompressor", "awq"), ("nf4", "bitsandbytes", "nf4")]
)
def test_a_real_quantiser_that_is_not_installed_names_its_extra(lab: Path, name: str, package: str, extra: str) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=rf"--quantizer {name}: needs {package}; install it with: pip install 'sku-vllm\[{extra}\]'"):
        attack_model(asked(lab, ModelSpec(lab / "llama"), ["quantize"], quantizers=("int8", name)))
    with pytest.raises(ConfigError, match="--quantizer int3: unknown; choose from int4, int8, fp8, nf4, .*gguf:Q4_K_M, gptq, awq"):
        AttackConfig(quantizers=("int3",))
