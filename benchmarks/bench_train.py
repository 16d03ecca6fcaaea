"""`sku bench train`: training against the published loop and against plain LoRA fine-tuning, on random models of 100M parameters.

Same method (`sku`, LoRA r 32 on q_proj and v_proj, batch 2, K 5), same rows (PKU-like answer lengths, TruthfulQA-like retain
rows), 32k words. Every contender runs in a process of its own, so that peaks of memory are its own; the rounds are interleaved
and the medians count. The published loop takes the very rows that ours takes at the same steps. A first step of every contender is
not timed; memory is counted above what the imports alone take, that step and the loading included.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sku_vllm.benchmarks.machine import machine
from sku_vllm.benchmarks.train_page import markdown
from sku_vllm.cli.options import log, print_json, sku_command

if TYPE_CHECKING:
    from sku_vllm.train.batches import Batches

VOCABULARY, PADDED, PASS = 32_000, 512, 768
CONTENDERS = {  # contender: (steps it takes a round, what it is)
    "published-512": (1, "published loop, tokenizer that pads to 512"),
    "published-longest": (4, "published loop, tokenizer without a maximum"),
    "ours": (4, "sku train, method sku"),
    "ours-mirrored": (3, "sku train, method sku-mirrored, all linear layers, batch 8"),
    "plain-lora": (3, "plain PEFT LoRA fine-tuning, all linear layers, unpadded blocks of 128 tokens"),
}


@sku_command("train")
@click.option("--architectures", default="llama,opt", help="Of llama and opt.")
@click.option("--rounds", default=1, help="Interleaved rounds.")
@click.option("--layers", default=12, help="Layers of width 768 (12: 110M parameters with the embeddings).")
@click.option("--threads", default=2, help="CPU threads of every contender.")
@click.option("--output", type=click.Path(dir_okay=False), help="Markdown file for the results.")
def command(architectures: str, rounds: int, layers: int, threads: int, output: str | None, json_output: bool) -> None:
    """Examples a second, peak memory and cost a token, as ratios measured side by side."""
    results: dict[str, Any] = {"machine": machine(), "rounds": rounds, "architectures": {}}
    with tempfile.TemporaryDirectory() as work:
        for architecture in architectures.split(","):
            make_model(Path(work) / architecture, architecture, layers)
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
            for _ in range(rounds):
                for name in CONTENDERS:
                    measured[name].append(_in_process(name, Path(work) / architecture, threads))
                    log(f"{architecture} {name}: {measured[name][-1]}")
            results["architectures"][architecture] = summarise(measured)
    text = markdown(results, {name: what for name, (_, what) in CONTENDERS.items()})
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8")
    print_json(results) if json_output else log(text)


def summarise(measured: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each contender, and the ratios the goals are about."""
    median = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in measured.items()}
    ours, mirrored, plain = median["ours"], median["ours-mirrored"], median["plain-lora"]
    return {
        "medians": median,
        "examples_ratio_512": ours["examples_per_second"] / median["published-512"]["examples_per_second"],
        "examples_ratio_longest": ours["examples_per_second"] / median["published-longest"]["examples_per_second"],
        "memory_ratio_512": ours["peak_bytes"] / median["published-512"]["peak_bytes"],
        "memory_ratio_longest": ours["peak_bytes"] / median["published-longest"]["peak_bytes"],
        "token_cost_ratio": mirrored["seconds_per_token"] / plain["seconds_per_token"],
    }


def make_model(path: Path, architecture: str, layers: int) -> None:
    """A random model with a word-level tokenizer, so that a word is a token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "###", "Question", "Answer", ":"]
    words = [*special, *(f"w{number}" for number in range(VOCABULARY - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 768,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture == "llama":
        LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=2048)).save_pretrained(path)
    else:
        OPTForCausalLM(OPTConfig(**sizes, ffn_dim=3072, word_embed_proj_dim=768)).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


def make_rows(count: int = 200) -> tuple[list[Any], list[Any]]:
    """Harmful rows as long as PKU-SafeRLHF's (prompt about 20 tokens, answer log-normal around 80), retain rows as TruthfulQA's (12)."""
    from sku_vllm.data import Row

    draw = random.Random(0)

    def text(length: float) -> str:
        return " ".join(f"w{draw.randrange(31_000)}" for _ in range(max(2, int(length))))

    forget = [Row.ask(text(draw.gauss(20, 8)), text(min(400, draw.lognormvariate(4.2, 0.6)))) for _ in range(count)]
    return forget, [Row.ask(text(draw.gauss(12, 4)), text(draw.gauss(12, 5))) for _ in range(count)]


def _in_process(name: str, path: Path, threads: int) -> dict[str, float]:
    code = f"from sku_vllm.benchmarks.bench_train import run_contender; run_contender({name!r}, {str(path)!r}, {threads})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def run_contender(name: str, path: str, threads: int) -> None:
    """One contender in this process; prints examples/s, seconds per forward token and peak bytes above the imports."""
    import torch
    from accelerate import Accelerator

    import sku_vllm.train.run  # noqa: F401 (its imports belong to the baseline of memory)
    from sku_vllm.benchmarks import published_loop  # noqa: F401
    from sku_vllm.train.memory import peak_resident

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    torch.randn(64, 64, requires_grad=True).matmul(torch.randn(64, 64)).sum().backward()  # thread pools
    before = peak_resident()
    steps = CONTENDERS[name][0]
    if name.startswith("published"):
        seconds, examples, tokens = _published(name, path, steps)
    elif name == "plain-lora":
        seconds, examples, tokens = _plain_lora(path, steps)
    else:
        seconds, examples, tokens = _ours(name, path, steps, accelerator)
    print(
        json.dumps(
            {"examples_per_second": examples / seconds, "seconds_per_token": seconds / tokens, "peak_bytes": peak_resident() - before}
        )
    )


def _batches(name: str, path: str) -> "Batches":
    """The rows of every step, for our loop and for the published one."""
    from sku_vllm.data import PromptTemplate, load_dataset
    from sku_vllm.methods import TrainConfig
    from sku_vllm.model import load_tokenizer
    from sku_vllm.train.batches import Batches

    if name == "ours-mirrored":
        config = TrainConfig.of("sku-mirrored", rounds=1, template="paper", tokens_per_pass=1024)
    else:
        config = TrainConfig.of(preset="llama2-7b", tokens_per_pass=PASS)
    forget, retain = make_rows()
    return Batches(config, PromptTemplate.of(load_tokenizer(path), "paper"), load_dataset(forget, "forget"), load_dataset(retain, "retain"))


def _published(name: str, path: str, steps: int) -> tuple[float, int, int]:
    from sku_vllm.benchmarks.published_loop import PublishedLoop
    from sku_vllm.model import load_model, load_tokenizer

    tokenizer, batches = load_tokenizer(path), _batches(name, path)
    loop = PublishedLoop(load_model(path), tokenizer)

    def words(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).replace("###", "").strip()  # the template's own words aside

    def pairs(kind: str, step: int) -> list[tuple[str, str]]:
        return [(words(row.ids[: row.answer_start]), words(row.answer_ids)) for row in batches.rows(kind, step)]

    def step(number: int) -> int:
        return loop.step(*(pairs(kind, number) for kind in ("forget", "mismatched", "retain")))

    step(0)
    if name.endswith("512"):
        tokenizer.model_max_length = PADDED
    begun = time.perf_counter()
    examples = sum(step(number + 1) for number in range(steps))
    return time.perf_counter() - begun, examples, 1


def _ours(name: str, path: str, steps: int, accelerator: Any) -> tuple[float, int, int]:
    from sku_vllm.train.run import Run

    batches = _batches(name, path)
    run = Run(Path(path), batches.config, batches, accelerator, batches.template.tokenizer)
    run.step()
    warm, begun = run.examples, time.perf_counter()
    tokens = sum(run.step()["tokens"] for _ in range(steps))
    return time.perf_counter() - begun, run.examples - warm, tokens


def _plain_lora(path: str, steps: int) -> tuple[float, int, int]:
    """The Hugging Face way: `labels` in, `.loss` out, whole logits; rows cut into blocks, so that no token is padding."""
    import torch
    from peft import LoraConfig, get_peft_model

    from sku_vllm.data import PromptTemplate
    from sku_vllm.model import load_model, load_tokenizer

    template, (forget, retain) = PromptTemplate.of(load_tokenizer(path), "paper"), make_rows()
    stream = [token for row in [*forget, *retain] for token in template.encode(row).ids]
    model = get_peft_model(load_model(path), LoraConfig(r=32, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for step in range(steps + 1):
        if step == 1:  # the first warms caches and allocators, as everywhere here
            begun = time.perf_counter()
        block = torch.tensor(stream[step * 1024 : (step + 1) * 1024]).view(8, 128)
        model(input_ids=block, labels=block).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begun, 8 * steps, 1024 * steps
