"""What bench_fuse measured, as Markdown."""

from typing import Any

from sku_vllm.benchmarks.fuse_inputs import RANK, SHARDS


def memory_markdown(results: dict[str, Any]) -> str:
    """Peak memory by size of the checkpoint."""
    about = results["machine"]
    lines = [
        "# bench fuse --memory",
        "",
        f"{about['date']}, {about['cores']} cores ({about['cpu']}), torch {about['versions']['torch']}. "
        f"Peak anonymous memory above imports, q and v edited at rank {RANK}, with digests. The bases are holes: "
        "zeros, beside which any edit is large, so that it is summed in "
        "float64, which takes more memory than the compiled path of real weights.",
        "",
        "| size | GB | tensors edited | peak MB |",
        "|---|---|---|---|",
    ]
    lines += [f"| {size} | {row['bytes'] / 1e9:.1f} | {row['tensors']} | {row['memory_mb']:.0f} |" for size, row in results["rows"].items()]
    return "\n".join(lines) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """Seconds, ratios to a copy, and memory of every contender."""
    about = results["machine"]
    versions = ", ".join(
        f"{name} {about['versions'][name]}" for name in ("torch", "peft", "transformers", "safetensors") if name in about["versions"]
    )
    lines = [
        f"# bench fuse, {results['size']} ({results['bytes'] / 1e9:.2f} GB, {SHARDS} shards, bf16, rank {RANK})",
        "",
        f"{about['date']}, {about['cores']} cores ({about['cpu']}), load {about['load']} at the end, {versions}. "
        "Page cache warm; medians of interleaved runs; every contender's files are synced. Memory: peak anonymous memory above imports. "
        f"Every run began {results['settle']:g} s after a copy of the base was removed.",
        "",
        "| | seconds | × cp | with imports | peak MB | runs |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        memory = f"{row['memory_mb']:.0f}" if "memory_mb" in row else ""
        wall = f"{row['wall']:.2f}" if "wall" in row else ""
        lines.append(f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} | {wall} | {memory} | {row['runs']} |")
    if not any(name.startswith("mergekit") for name in results["rows"]):
        lines.append("\nmergekit: not measured (give `--mergekit PYTHON` of an environment that has it).")
    return "\n".join(lines) + "\n"
