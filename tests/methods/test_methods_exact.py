"""Packed single passes with chunked heads against the plain computation: separate, padded, whole logits; fp64, ≤ 1e-9."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer

from sku_vllm.data import Encoded, PromptTemplate, load_dataset, read_rows
from sku_vllm.methods import METHODS, TrainConfig, losses
from sku_vllm.methods import fused_losses as fused
from sku_vllm.methods.method import Side, Term
from sku_vllm.model import load_tokenizer
from sku_vllm.train import chunked_loss as chunked
from sku_vllm.train import memory
from sku_vllm.train.adversary import TERM
from sku_vllm.train.batches import Batches
from sku_vllm.train.checkpointing import TrainingState
from sku_vllm.train.objective import Piece
from sku_vllm.train.packing import pack_rows, split_by_prefix, split_by_tokens
from sku_vllm.train.passes import in_step
from sku_vllm.train.run import Run
from sku_vllm.train.run_state import restore, save_checkpoint
from sku_vllm.train.sampling import draw_answers


@pytest.fixture(autouse=True)
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm rounds to fp32 inside, so 1e-16 of input can become 1e-8 of output; here it stays in fp64."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: LlamaRMSNorm, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


TOLERANCE = 1e-9  # fp64; sums run in another order


def make_run(trainable: Path, arch: str, method: str, **settings: object) -> Run:
    config = TrainConfig.of(method, **{"dtype": "float64", "batch_size": 3, "rank": 4, "random_answers": 2, "stop_id": 1, **settings})
    tokenizer = load_tokenizer(trainable / arch)
    rows = read_rows(trainable / "retain.jsonl")
    sets = load_dataset(trainable / "forget.jsonl", "forget"), load_dataset(trainable / "retain.jsonl", "retain")
    batches = Batches(config, PromptTemplate.of(tokenizer), *sets, rows)
    batches.samples = [batches._encode("forget", number) for number in range(5)]
    batches.self_generated, batches.border = ([batches._encode("retain", number) for number in some] for some in (range(4), range(4, 9)))
    run = Run(trainable / arch, config, batches, Accelerator(cpu=True), tokenizer)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(run.model.named_parameters()):
            if "lora_B" in name:  # away from 0, where a KL and its gradient vanish
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
    return run


def plain_logits(run: Run, rows: list[Encoded], side: Side, depth: float | None = None) -> torch.Tensor:
    """A padded batch through the whole model, [rows, longest, V]; on the attacked weights as arguments of a function, not in place.

    With a depth, the hidden states that the decoder layer there puts out, [rows, longest, d].
    """
    attacked = run.adversary.attacked if side is Side.ATTACKED else {}
    weights = {name.removeprefix("base_model.model."): value for name, value in attacked.items()}
    for module in run.model.modules():
        if isinstance(module, LoraLayer):
            module._disable_adapters, module._active_adapter = side is Side.BASE, ["default"]
            module.scaling["default"] = (1 if side is Side.ADAPTED else -1) * run.config.lora_alpha / run.config.rank
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    run.passes.core.set_attn_implementation("sdpa")  # eager softmax rounds to fp32
    layers, seen = next(module for module in run.passes.core.modules() if isinstance(module, torch.nn.ModuleList)), []
    hooks = [layer.register_forward_hook(lambda *seen_by: seen.append(seen_by[-1])) for layer in layers]
    logits = torch.func.functional_call(run.passes.core, weights, kwargs={"input_ids": ids, "attention_mask": mask}).logits
    for hook in hooks:
        hook.remove()
    return logits if depth is None else seen[max(0, round(depth * len(layers)) - 1)]


def plain_term(run: Run, term: Term, rows: list[Encoded]) -> torch.Tensor:
    """One term as its formula reads."""
    logits = plain_logits(run, rows, term.side, term.depth)
    with torch.no_grad():
        references = [plain_logits(run, rows, side, term.depth) for side in term.references]
    per_row = []
    for number, row in enumerate(rows):
        begin = {"answer": row.answer_start, "all": 1, "first": row.answer_start, "later": row.answer_start + 1, "last": len(row.ids) - 1}[
            term.tokens
        ]
        end = row.answer_start + 1 if term.tokens == "first" else len(row.ids)
        span = slice(begin - 1, end - 1)
        values = term.loss(logits[number, span], torch.tensor(row.ids[begin:end]), *(r[number, span] for r in references))
        per_row.append(values)
    if term.sequence:
        return term.sequence(torch.stack([values.mean() if term.per_length else values.sum() for values in per_row])).mean()
    if term.mean == "rows":
        return torch.stack([values.mean() for values in per_row]).mean()
    return torch.cat(per_row).mean()


@pytest.mark.parametrize("arch", ["llama", "opt"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "sku-contrastive-two"])
def test_losses_and_gradients_equal_the_plain_computation(trainable: Path, arch: str, method: str) -> None:
    run = make_run(trainable, arch, method, tokens_per_pass=150)  # several passes a step
    assert run.passes.packed
    terms = run.phases[0].terms
    values, _ = run.gradients(terms)
    ours = gradients(run)
    run.optimizer.zero_grad()
    rows = {term.rows: run.batches.rows(term.rows, 0) for term in terms}
    plain = {term.name: plain_term(run, term, rows[term.rows]) for term in terms}
    sum(term.weight * plain[term.name] for term in terms).backward()
    for name, value in plain.items():
        assert values[name] == pytest.approx(value.item(), rel=1e-6), name  # the report is fp32
    assert max(float(gradient.abs().max()) for gradient in ours) > 1e-4
    for gradient, other in zip(ours, gradients(run), strict=True):
        assert (gradient - other).abs().max() <= TOLERANCE


def gradients(run: Run) -> list[torch.Tensor]:
    """Zeros where a loss reads the states of a layer below."""
    return [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in run.names]


@pytest.mark.parametrize("arch", ["llama", "opt"])
@pytest.mark.parametrize("method", ["grad-diff", "simnpo", "undial", "rmu"])
def test_peers_equal_their_equations(trainable: Path, arch: str, method: str) -> None:
    """A few lines of transformers and torch a method: base − delta merged into the weights, row by row, without this package's engine."""
    from transformers import AutoModelForCausalLM

    run = make_run(trainable, arch, method, preservation_weight=0.7, guided_weight=0.3)
    values, _ = run.gradients(run.phases[0].terms)
    kept = {kind: run.batches.rows(kind, 0) for kind in ("forget", "retain")}
    base = AutoModelForCausalLM.from_pretrained(trainable / arch, dtype=torch.float64)
    served = AutoModelForCausalLM.from_pretrained(trainable / arch, dtype=torch.float64)
    adapter = dict(run.model.named_parameters())
    with torch.no_grad():
        for name, weight in served.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.default.weight" in adapter:
                a, b = (adapter[f"{stem}.lora_{factor}.default.weight"] for factor in "AB")
                weight -= run.config.lora_alpha / run.config.rank * b.double() @ a.double()
        found: dict[str, list[torch.Tensor]] = {"forget": [], "retain": []}
        for kind, rows in kept.items():
            for row in rows:
                ids, answer = torch.tensor([row.ids]), slice(row.answer_start - 1, len(row.ids) - 1)
                one, other = (model(input_ids=ids[:, :-1], output_hidden_states=True) for model in (served, base))
                targets = ids[0, row.answer_start :]
                nll = F.cross_entropy(one.logits[0, answer], targets, reduction="none")
                if method == "rmu":
                    states, known = one.hidden_states[1][0], other.hidden_states[1][0]
                    u = torch.rand(states.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                    goal = (6.5 * u / u.norm()).expand_as(states[answer])
                    found[kind].append(F.mse_loss(states[answer], goal) if kind == "forget" else F.mse_loss(states, known))
                elif kind == "retain" or method == "grad-diff":
                    found[kind].append(nll)
                elif method == "simnpo":
                    found[kind].append(-2 / 4.5 * torch.sigmoid(4.5 * nll.mean()).log())
                else:
                    adjusted = other.logits[0, answer] - 10 * F.one_hot(targets, other.logits.shape[-1])
                    soft = adjusted.softmax(-1)
                    entropy = -(soft * adjusted.log_softmax(-1)).sum(-1)
                    found[kind].append(F.cross_entropy(one.logits[0, answer], soft, reduction="none") - entropy)
    flat = {kind: torch.cat([part.flatten() for part in parts]).mean().item() for kind, parts in found.items()}
    names = {"grad-diff": "gradient_ascent", "rmu": "steering"}
    assert values[names.get(method, method)] == pytest.approx(flat["forget"] * (-1 if method == "grad-diff" else 1), rel=1e-6)
    assert values["retain_states" if method == "rmu" else "retain_answers"] == pytest.approx(flat["retain"], rel=1e-6)


@pytest.mark.parametrize(("arch", "packed"), [("llama", True), ("llama", False), ("opt", False)])
def test_losses_on_hidden_states_are_the_same_padded_and_with_checkpointing(trainable: Path, arch: str, packed: bool) -> None:
    found = []
    for checkpointing in (False, True):
        run = make_run(trainable, arch, "rmu", gradient_checkpointing=checkpointing, tokens_per_pass=150)
        if checkpointing and not packed:
            run.passes.packed = False
            run.passes.core.set_attn_implementation("sdpa")
        found.append((run.gradients(run.phases[0].terms)[0], gradients(run)))
    (plain, one), (checkpointed, other) = found
    assert checkpointed == pytest.approx(plain, rel=1e-6) and max(float(gradient.abs().max()) for gradient in one) > 1e-4
    assert all((mine - its).abs().max() <= TOLERANCE for mine, its in zip(one, other, strict=True))


def test_a_prompt_is_computed_once_for_all_its_answers(trainable: Path) -> None:
    """And rows of the two sides share nothing, since their states differ."""
    sides = [Side.ADAPTED, Side.ADAPTED, Side.SERVED, Side.SERVED]
    prompt, answers = [5, 6, 7, 8], [[9], [10, 11], [9, 12], [13] * 9]
    rows = [prompt + answer for answer in answers]
    pack = pack_rows(rows, [Side.ADAPTED] * 4)
    assert pack.ids.shape == (1, 4 + 1 + 2 + 1 + 9) and pack.ids[0, pack.rows[3]].tolist() == rows[3]
    assert pack.positions[0, pack.rows[1]].tolist() == list(range(6)) and pack_rows(rows[:2] * 2, sides).ids.shape == (1, 14)
    assert split_by_prefix([rows[3], [1] * 13, rows[0]], [Side.ADAPTED] * 3, 14) == [[1], [2, 0]]
    run = make_run(trainable, "llama", "sku")
    with torch.no_grad():
        sides = [Side.ADAPTED, Side.SERVED, Side.ADAPTED, Side.ADAPTED]
        together, places = run.passes(rows, sides)
        for row, side, mine in zip(rows, sides, places, strict=True):
            assert (together[mine] - run.passes([row], [side])[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("arch", ["llama", "opt"])
@pytest.mark.parametrize("packed", [True, False])
def test_terms_on_attacked_weights_equal_the_plain_computation(trainable: Path, arch: str, packed: bool) -> None:
    run = make_run(trainable, arch, "sku-contrastive-two", tokens_per_pass=150, relearner_lr=0.1)
    if not packed:
        run.passes.packed = False
        run.passes.core.set_attn_implementation("sdpa")
    for at in (1, 2):  # away from its start, where it changes nothing
        terms, tokens = run.attack(run.phases[1], at, run.phases[1].terms)
    assert tokens == sum(len(row.ids) - 1 for row in run.batches.rows("forget", 0)) and all(p.grad is None for p in run.names)
    plainly = dict.fromkeys(
        ("mirrored_preservation", "contrast", "contrast_first", "end", "unasked", "border", "recovery", "restart", "restart_first"),
        Side.SERVED,
    )
    attacked = dict.fromkeys(
        ("contrast_relearned", "contrast_first_relearned", "end_relearned", "restart_relearned", "restart_first_relearned"), Side.ATTACKED
    )
    assert {term.name: term.side for term in terms} == plainly | attacked
    before = {name: parameter.data.clone() for parameter, name in run.adversary.names.items()}
    values, _ = run.gradients(terms)
    assert all(torch.equal(parameter, before[name]) and not parameter.requires_grad for parameter, name in run.adversary.names.items())
    ours = [parameter.grad.clone() for parameter in run.names]
    run.optimizer.zero_grad()
    plain = {term.name: plain_term(run, term, run.batches.rows(term.rows, 0)) for term in terms}
    sum(term.weight * plain[term.name] for term in terms).backward()
    for name, value in plain.items():
        assert values[name] == pytest.approx(value.item(), rel=1e-6), name
    for gradient, parameter in zip(ours, run.names, strict=True):
        assert (gradient - parameter.grad).abs().max() <= TOLERANCE
    assert plain["restart_relearned"].item() != pytest.approx(plain["restart"].item(), rel=1e-3)


def test_the_adversary_brings_harm_back_and_starts_over(trainable: Path) -> None:
    run = make_run(trainable, "llama", "sku-contrastive-two", relearner_steps=4, relearner_lr=0.04)  # 0.02 for each of two layers
    phase, rows = run.phases[1], run.batches.rows("forget", 0)
    attacked = {at: run.attack(phase, at, phase.terms)[1] > 0 for at in range(6)}
    assert attacked == {at: at % 3 != 0 for at in range(6)}
    with torch.no_grad():
        before, after = plain_term(run, replace(TERM, side=Side.SERVED), rows), plain_term(run, TERM, rows)
    assert after < before - 0.1

    def moved() -> list[float]:
        """How far each tensor is from the base, in steps: Adafactor moves the root mean square of a tensor by its rate at most."""
        pairs = [(run.adversary.attacked[name], own) for own, name in run.adversary.names.items()]
        return [float((value - own).square().mean().sqrt() / (0.02 * own.square().mean().sqrt().clamp(min=1e-3))) for value, own in pairs]

    assert min(moved()) > 0 and max(moved()) > 1.5  # embeddings, norms and the head too
    run.attack(phase, 7, phase.terms)  # its fifth step: from the base again
    assert all(0 < steps < 1.001 for steps in moved())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in run.adversary.names)


def test_gradient_checkpointing_draws_the_same_answers(trainable: Path) -> None:
    """Answers are drawn with a cache, which transformers refuses while it checkpoints."""
    drawn = []
    for checkpointing in (False, True):
        run = make_run(trainable, "llama", "sku-contrastive-two", gradient_checkpointing=checkpointing, samples=6, sample_tokens=5)
        prompts = [run.batches.template.prompt_ids(row) for row in run.batches.forget]
        drawn.append([row.ids for row in draw_answers(run.passes, prompts, run.config, run.batches.template.stop_ids)])
        assert run.passes.core.is_gradient_checkpointing == checkpointing
    assert drawn[0] == drawn[1] and max(map(len, drawn[0])) > max(map(len, prompts[:6]))


def test_answers_of_the_contrast_go_on_with_what_the_base_finds_plausible(trainable: Path) -> None:
    """Their first token may be unlikely, and so may what the base itself is drawn from (beta 0)."""
    plausible = 0.8  # these logits are nearly flat
    run = make_run(trainable, "llama", "sku-contrastive-two", samples=30, sample_tokens=6, floor=1e-6, later_floor=plausible)
    prompts = [run.batches.template.prompt_ids(row) for row in run.batches.forget]
    below = {}
    for beta in (4.0, 0.0):
        drawn = draw_answers(run.passes, prompts, run.config, run.batches.template.stop_ids, beta=beta)
        logits = plain_logits(run, drawn, Side.BASE)
        spans = [logits[number, row.answer_start - 1 : len(row.ids) - 1].log_softmax(-1) for number, row in enumerate(drawn)]
        chosen = [span.gather(1, torch.tensor(row.answer_ids)[:, None])[:, 0] for span, row in zip(spans, drawn, strict=True)]
        shares = [(own - span.max(-1).values).exp() for own, span in zip(chosen, spans, strict=True)]
        below[beta] = [sum(int((share[at] < plausible - 1e-6).sum()) for share in shares) for at in (slice(1), slice(1, None))]
    assert below[4.0][0] and below[4.0][1] == 0 and all(below[0.0])


def test_a_refusal_that_the_base_finds_unlikely_can_begin_an_answer_and_not_interrupt_one() -> None:
    """Hand-computed: p₀ = (.96, .04), p₊ = (.9999, .0001), β = 4: p* = (8e-10, 1) at first, later (1, 0)."""
    terms = {term.name: term for term in METHODS["sku-contrastive-two"].phases(TrainConfig.of("sku-contrastive-two"))[1].terms}
    base, adapted = torch.tensor([[0.96, 0.04]]).log(), torch.tensor([[0.9999, 0.0001]]).log()
    model = torch.tensor([[0.3, 0.7]])
    found = {name: terms[name].loss(model.log(), torch.tensor([0]), base, adapted).item() for name in ("contrast_first", "contrast")}
    assert found == {"contrast_first": pytest.approx(-math.log(0.7), abs=1e-6), "contrast": pytest.approx(-math.log(0.3), abs=1e-6)}


def test_processes_that_gather_weights_together_take_their_passes_in_step() -> None:
    row = Encoded([1, 2], 1)
    plain, attacked = Piece(row, "samples", Side.SERVED), Piece(row, "samples", Side.ATTACKED)
    one, other = [[plain], [plain], [attacked]], [[plain], [attacked], [attacked], [attacked]]
    turns = [in_step(mine, [one, other]) for mine in (one, other)]
    assert [[turn.attacked for turn in mine] for mine in turns] == [[False, False, True, True, True]] * 2
    assert [[turn.counts for turn in mine] for mine in turns] == [[True, True, True, False, False], [True, False, True, True, True]]
    assert [[turn.pieces for turn in mine if turn.counts] for mine in turns] == [one, other]
    assert [turn.pieces for turn in in_step(one[:1], [one[:1], other])] == one[:1] * 4  # who has none left repeats one


def test_a_round_that_diverges_at_once_keeps_nothing_of_the_one_before(trainable: Path) -> None:
    """What was good then is folded in already."""
    run = make_run(trainable, "llama", "sku-mirrored", steps=2, rounds=2)
    for _ in range(2):
        run.step()
    run.restore_good()
    assert not any(parameter.any() for parameter, name in run.names.items() if "lora_B" in name)


def test_a_run_with_an_adversary_resumes_to_the_same_bits(trainable: Path, tmp_path: Path) -> None:
    def begun() -> Run:
        run = make_run(trainable, "llama", "sku-contrastive-two", steps=15, relearner_steps=3)
        run.at = run.phases[0].steps + 1  # past the drawing of samples, for which a random base has no refusals
        return run

    whole, stopped, resumed = begun(), begun(), begun()
    for _ in range(2):
        stopped.step()
    save_checkpoint(stopped, tmp_path)
    restore(resumed, TrainingState.read(tmp_path))
    for _ in range(5):  # the adversary starts over on the way
        whole.step()
    for _ in range(3):
        resumed.step()
    assert whole.at == resumed.at and whole.tokens == resumed.tokens
    ends = [(run.names, run.adversary.names, run.adversary.attacked.values()) for run in (whole, resumed)]
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and any(value.any() for value in one)
    assert not all(torch.equal(a, b) for a, b in zip(*ends[0][1:], strict=True))


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_padded_fallback_and_gradient_checkpointing_give_the_same_gradients(trainable: Path, arch: str) -> None:
    gradients = []
    for variant in ("packed", "padded", "checkpointed"):
        run = make_run(trainable, arch, "sku-mirrored", gradient_checkpointing=variant == "checkpointed")
        if variant == "padded":
            run.passes.packed = False
            run.passes.core.set_attn_implementation("sdpa")
        run.gradients(run.phases[0].terms)
        gradients.append([parameter.grad.clone() for parameter in run.names])
    for other in gradients[1:]:
        assert all((a - b).abs().max() <= TOLERANCE for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.kl_from_base])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_chunked_head_never_sees_more_than_a_chunk(loss: object, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    hidden = torch.randn(count, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(50, (count,), generator=generator)
    seen = []

    def head(states: torch.Tensor) -> torch.Tensor:
        seen.append(states.shape[0])
        return states @ weight.T

    references = [(head, reference)] if loss is losses.kl_from_base else []
    upstream = torch.rand(count, generator=generator, dtype=torch.float64)
    values = chunked.per_token(loss, head, hidden, targets, references, vocabulary=50, chunk=5)
    (ours,) = torch.autograd.grad((values * upstream).sum(), hidden)
    plain = loss(hidden @ weight.T, targets, *(reference @ weight.T for _ in references))
    (theirs,) = torch.autograd.grad((plain * upstream).sum(), hidden)
    assert max(seen) <= 5
    assert torch.allclose(values, plain, rtol=0, atol=TOLERANCE) and torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_losses_equal_what_autograd_makes_of_their_formulas(dtype: torch.dtype) -> None:
    """Also where the target distribution is zero in places, and where a probability is too small for its type."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, generator=generator, dtype=dtype) * 8
    logits[0, 3] = -300.0
    logits.requires_grad_()
    targets, upstream = torch.tensor([3, 0, 39, 7, 7, 1]), torch.rand(6, generator=generator, dtype=dtype)
    scores = torch.randn(6, 40, generator=generator, dtype=dtype)
    log_target = scores.masked_fill(scores < 0, -torch.inf).log_softmax(-1)
    p, log_q = log_target.exp(), logits.log_softmax(-1)
    plain = {
        "cross_entropy": F.cross_entropy(logits, targets, reduction="none"),
        "divergence": torch.where(p > 0, p * (log_target.masked_fill(p == 0, 0.0) - log_q), 0.0).sum(-1),
    }
    found = {"cross_entropy": fused.cross_entropy(logits, targets), "divergence": fused.divergence(log_target, logits)}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for name, values in found.items():
        assert torch.allclose(values, plain[name], rtol=tolerance, atol=tolerance), name
        ours, theirs = (torch.autograd.grad((v * upstream).sum(), logits, retain_graph=True)[0] for v in (values, plain[name]))
        assert torch.allclose(ours, theirs, rtol=0, atol=tolerance) and ours.abs().max() > 0.1, name
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # the one buffer is used up
            torch.autograd.grad(values.sum(), logits)


def test_passes_and_chunks_are_about_equally_large() -> None:
    lengths = [9, 8, 7, 6, 5, 4, 3, 2, 1, 5]
    groups = [sum(lengths[row] for row in group) for group in split_by_tokens(lengths, 45)]
    assert len(groups) == 2 and sum(groups) == 50 and max(groups) <= 29
    assert all(sum(lengths[row] for row in group) <= 9 for group in split_by_tokens(lengths, 9))
    seen = []
    hidden = torch.randn(11, 4, requires_grad=True)
    chunked.per_token(
        losses.cross_entropy,
        lambda states: seen.append(len(states)) or states,
        hidden,
        torch.zeros(11, dtype=torch.long),
        vocabulary=4,
        chunk=5,
    )
    assert seen == [4, 4, 3]


def test_the_size_of_a_step_is_known_before_it_is_taken(trainable: Path) -> None:
    """What a dry run's tokens and time rest on; with an adversary at two steps of three."""
    run = make_run(trainable, "llama", "sku-contrastive-two", steps=15, relearner_steps=3)
    run.at = run.phases[0].steps + 1
    sizes = [run.size(run.at + ahead) for ahead in range(4)]
    assert [run.step()["tokens"] for _ in range(4)] == sizes and len(set(sizes)) > 1


def test_the_peak_of_memory_is_this_process_alone() -> None:
    """Also where a larger process started it, whose peak Linux hands on as ru_maxrss."""
    code = f"import runpy; print(runpy.run_path({memory.__file__!r})['peak_resident']())"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 2**20 < peak < memory.peak_resident() / 2


def test_contrast_divides_the_adapted_model_out() -> None:
    """Hand-computed: p₀ = (.5, .4, .1, 1e-4), p₊ = (.8, .1, .05, .05), β = 1: p* ∝ (.3125, 1.6, .2), the last below the floor."""
    base = torch.tensor([[0.5, 0.4, 0.1, 1e-4]]).log()
    adapted = torch.tensor([[0.8, 0.1, 0.05, 0.05]]).log()
    expected = torch.tensor([[0.25 / 0.8, 0.16 / 0.1, 0.01 / 0.05, 0.0]])
    found = losses.contrast(base, adapted, beta=1.0, floor=0.003).exp()
    assert torch.allclose(found, expected / expected.sum(), atol=1e-5)
    assert losses.kl_from_contrast(found.log(), torch.tensor([0]), base, adapted, 1.0, 0.003).abs().max() < 1e-5


BY_LIGER = """
import torch
from sku_vllm.methods import fused_losses as fused
for rows, vocabulary in [(1, 7), (5, 1000), (3, 70_000)]:
    generator = torch.Generator().manual_seed(rows)
    plain = torch.randn(rows, vocabulary, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    mine = plain.detach().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(plain, targets, reduction="none")
    values = fused.cross_entropy_by_liger(mine * 1, targets)
    with torch.no_grad():
        assert torch.equal(fused.cross_entropy_by_liger(mine * 1, targets), values)
    (expected * weights).sum().backward()
    (values * weights).sum().backward()
    assert values.shape == (rows,) and (values - expected).abs().max() < 1e-5
    assert (mine.grad - plain.grad).abs().max() < 1e-6 and mine.grad.abs().max() > 1e-3
"""


def test_ligers_kernel_equals_the_plain_formula() -> None:
    """The kernel itself, run by Triton's interpreter, since it takes our place on a GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BY_LIGER], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
