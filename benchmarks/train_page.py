"""What bench_train measured, as Markdown."""

from collections.abc import Mapping
from typing import Any


def markdown(results: dict[str, Any], contenders: Mapping[str, str]) -> str:
    """The goals as a table, then every contender; `contenders` says what each is."""
    machine = results["machine"]
    kept = {name: machine["versions"].get(name) for name in ("sku_vllm", "torch", "transformers", "peft")}
    lines = [
        "# Training",
        "",
        f"{machine['cpu']}, {machine['date']}, {', '.join(f'{name} {version}' for name, version in kept.items())}; "
        f"medians of {results['rounds']} interleaved round(s), each contender in a process of its own. `sku bench train`.",
        "",
        "The published loop takes the very rows that `sku train` takes at the same steps (padded to 512, to which lengths do not matter, "
        "fewer of them); a first step of every contender is not timed. Memory is the process's own peak above its imports, "
        "the loading of the model included.",
        "",
        "| against the published loop | goal | " + " | ".join(results["architectures"]) + " |",
        "|---|---|" + "---|" * len(results["architectures"]),
    ]
    goals = [
        ("examples/s, tokenizer pads to 512", "≥ 8", "examples_ratio_512"),
        ("examples/s, batches padded to their longest", "≥ 2.5", "examples_ratio_longest"),
        ("peak memory above imports, pads to 512", "≤ 0.4", "memory_ratio_512"),
        ("peak memory above imports, longest", "≤ 0.4", "memory_ratio_longest"),
        ("seconds per forward token against plain PEFT LoRA", "≤ 1.15", "token_cost_ratio"),
    ]
    for text, goal, key in goals:
        lines.append(f"| {text} | {goal} | " + " | ".join(f"{arch[key]:.2f}" for arch in results["architectures"].values()) + " |")
    on_gpu = "| OPT-2.7B, LLaMA2-7B, LLaMA2-13B on an H100: peak memory, share of the matrix-product rate | ≤ 24, 24, 40 GB; ≥ 40 % | "
    lines.append(on_gpu + "not measured | " * len(results["architectures"]))
    for name, arch in results["architectures"].items():
        lines += ["", f"## {name}", "", "| contender | examples/s | peak MiB above imports | ms per forward token |", "|---|---|---|---|"]
        for contender, values in arch["medians"].items():
            token = "" if contender.startswith("published") else f"{values['seconds_per_token'] * 1000:.2f}"
            speed, peak = f"{values['examples_per_second']:.2f}", f"{values['peak_bytes'] / 2**20:.0f}"
            lines.append(f"| {contenders[contender]} | {speed} | {peak} | {token} |")
    return "\n".join(lines) + "\n"
