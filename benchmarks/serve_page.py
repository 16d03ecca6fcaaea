"""The results of `sku bench serve` as one page."""

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """The results as one page."""
    own = result["machine"]
    yes = {True: "met", False: "not met"}
    lines = [
        "# Serving",
        "",
        f"{own['cpu']}, {own['cores']} cores, {own['system']}; "
        + ", ".join(f"{name} {version}" for name, version in own["versions"].items())
        + f"; {own['date']}.",
        f"{result['requests']} requests of 32 + {result['tokens']} tokens, {result['concurrency']} at once, "
        "vLLM's own load generator; GPU: not measured.",
        "",
        "| throughput | ratio | 95 % interval | goal | tokens per CPU second of the server, ratio |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {each['ratio']:.3f} | {each['low']:.3f} – {each['high']:.3f} ({each['pairs']} pairs) | "
            f"≥ {each['goal']}: {yes[each['met']]} | {'{:.3f} ({:.3f} – {:.3f})'.format(*each['per_cpu_second'])} |"
            for name, each in result["ratios"].items()
        ),
        "",
        "| arm | tokens/s | latency ms | TTFT ms | ITL ms | CPU ms/token |",
        "|---|---|---|---|---|---|",
        *(f"| {name} | {each['throughput']:.0f} | {each['latency_ms']:.0f} | {each['ttft_ms']:.1f} | {each['itl_ms']:.2f} | "
          f"{each['cpu_ms_per_token']:.2f} |" for name, each in result["arms"].items()),
        "",
        "original and LoRA share one LoRA-enabled engine, which is slower than a plain one; fused is a plain engine. "
        "Compare latencies with that in mind.",
        "",
    ]
    cost, adapter, model = result["middleware"], result["adapter_swap"], result["model_swap"]
    lines += [
        f"- middleware, {cost['bytes']} bytes, in process: p50 +{cost['p50_ms']:.3f} ms (goal 0.3), p99 +{cost['p99_ms']:.3f} ms (goal 1)",
        f"- adapter swap under load: {adapter['mean_inside_s'] * 1000:.0f} ms from an adapter on disk to answers from it (goal 50 ms), "
        f"{adapter['median_s'] * 1000:.0f} ms for the whole call with writing the negation (median of {adapter['swaps']}), "
        f"{adapter['errors']} errors in {adapter['requests']} requests",
        f"- whole-model swap: median {model['median_s']:.2f} s, of which requests wait {model['median_stalled_s'] * 1000:.0f} ms; "
        f"server start {model['start_s']:.1f} s, "
        f"{model['ratio']:.0f}x (goal 100x), {model['ratio_stalled']:.0f}x by the wait",
        f"- answers the stalled judge made us drop: {result['dropped_by_stalled_judge']:.0f}, counted",
    ]
    if result.get("soak"):  # 0 where none was asked for
        soak = result["soak"]
        lines.append(
            f"- soak: {soak['requests']} requests over {soak['swaps']} swaps, {soak['errors']} errors, "
            f"{soak['neither_version']} answers of neither version; "
            f"{soak['prompts_clear']} of {soak['prompts']} prompts are clear, {soak['prompts_that_differ']} tell the versions apart"
        )
    return "\n".join(lines) + "\n"
