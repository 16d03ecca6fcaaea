"""The results of `sku bench serve` as one page; parts that were not measured are left out."""

from collections.abc import Iterator
from typing import Any

YES = {True: "met", False: "not met"}


def markdown(result: dict[str, Any]) -> str:
    """Markdown of `sku bench serve`'s result."""
    own = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
    lines = [
        "# Serving",
        "",
        f"{own['cpu']}, {own['cores']} cores, {own['system']}; {versions}; {own['date']}.",
        f"32 + {result['tokens']} tokens a request, {result['concurrency']} at once, vLLM's own load generator; GPU: not measured.",
        "",
    ]
    if result.get("ratios"):
        lines += [*_ratios(result["ratios"]), ""]
    if result.get("arms"):
        lines += [*_arms(result["arms"]), ""]
    return "\n".join([*lines, *_facts(result)]) + "\n"


def _ratios(ratios: dict[str, Any]) -> Iterator[str]:
    yield "| throughput | ratio | 95 % interval | goal | tokens per CPU second of the server, ratio |"
    yield "|---|---|---|---|---|"
    for name, each in ratios.items():
        yield (
            f"| {name} | {each['ratio']:.3f} | {each['low']:.3f} – {each['high']:.3f} ({each['pairs']} pairs of runs of {each['requests']} "
            f"requests) | ≥ {each['goal']}: {YES[each['met']]} | {'{:.3f} ({:.3f} – {:.3f})'.format(*each['per_cpu_second'])} |"
        )
    yield ""
    yield "Ratio: Hodges–Lehmann on the logarithms of interleaved pairs in alternating order; interval: Wilcoxon's exact signed-rank test."


def _arms(arms: dict[str, Any]) -> Iterator[str]:
    yield "| arm | tokens/s | latency ms | TTFT ms | ITL ms | CPU ms/token |"
    yield "|---|---|---|---|---|---|"
    for name, each in arms.items():
        yield (
            f"| {name} | {each['throughput']:.0f} | {each['latency_ms']:.0f} | {each['ttft_ms']:.1f} | {each['itl_ms']:.2f} | "
            f"{each['cpu_ms_per_token']:.2f} |"
        )
    yield ""
    yield (
        "original and LoRA share one LoRA-enabled engine, which is slower than a plain one; fused is a plain engine. "
        "Compare latencies with that in mind."
    )


def _facts(result: dict[str, Any]) -> Iterator[str]:
    if cost := result.get("middleware"):
        yield (
            f"- middleware, {cost['bytes']} bytes, in process: p50 +{cost['p50_ms']:.3f} ms (goal 0.3), "
            f"p99 +{cost['p99_ms']:.3f} ms (goal 1)"
        )
    if adapter := result.get("adapter_swap"):
        yield (
            f"- adapter swap under load: {adapter['median_inside_s'] * 1000:.0f} ms from an adapter on disk to answers from it, "
            f"{adapter['median_s'] * 1000:.0f} ms for the whole call with writing the negation (goal 50 ms; medians of {adapter['swaps']}, "
            f"slowest call {adapter['max_s'] * 1000:.0f} ms), {adapter['errors']} errors in {adapter['requests']} requests"
        )
    if model := result.get("model_swap"):
        yield (
            f"- whole-model swap: median {model['median_s']:.3f} s of {model['swaps']} (slowest {model['max_s']:.3f} s), of which requests "
            f"wait {model['median_stalled_s'] * 1000:.0f} ms; server start {model['start_s']:.1f} s, {model['ratio']:.0f}x (goal 100x), "
            f"{model['ratio_stalled']:.0f}x by the wait; restore {model['median_restore_s']:.3f} s, exact in {model['exact_restores']} of "
            f"{model['swaps']}"
        )
    if "dropped_by_stalled_judge" in result:
        yield f"- answers the stalled judge made us drop: {result['dropped_by_stalled_judge']:.0f}, counted"
    for key, asked in {"soak": "completions", "soak_responses": "streamed responses"}.items():
        if isinstance(soak := result.get(key), dict):  # the number that was asked for, where it was not measured
            yield _soak(soak, asked)
    if isinstance(many := result.get("replaces"), dict):
        yield _replaces(many)
    if isinstance(equal := result.get("equal_arms"), dict):
        yield (
            f"- {equal['tests']} A/A tests of {equal['requests']} requests by 16, 40 or 200 users (correlation of a user's answers .2 or "
            f".5), read {equal['looks']} times each: {equal['recommended']} recommended something, where a test that counts requests "
            f"would have in {equal['by_requests']}; {equal['unjudged']} answers unjudged"
        )


def _soak(soak: dict[str, Any], asked: str) -> str:
    checked = f", {soak['lost']} lost, {soak['unjudged']} unjudged" if "lost" in soak else ""  # in records of earlier versions it is not
    return (
        f"- soak of {asked}: {soak['requests']} requests over {soak['swaps']} swaps in {soak['seconds']:.0f} s, {soak['errors']} errors"
        f"{checked}, {soak['neither_version']} answers of neither version ({' and '.join(map(str, soak['answers_of_each']))} of each); "
        f"{soak['prompts_clear']} of {soak['prompts']} prompts are clear, {soak['prompts_that_differ']} tell the versions apart"
    )


def _replaces(many: dict[str, Any]) -> str:
    looks = "; ".join(
        f"after {look['replaces']}: {look['memory_bytes'] / 1e6:.0f} MB, {look['files']} files open, {look['series']} series, "
        f"{look['disk_bytes'] / 1e6:.2f} MB in {look['disk_files']} files on disk, {look['log_bytes'] / 1e6:.1f} MB of log"
        for look in many["looks"]
    )
    memory, files, disk, series = (f"{100 * each:+.1f} %" for each in many["grown"].values())
    return (
        f"- {many['replaces']} replaces in {many['seconds']:.0f} s, {many['errors']} errors: memory {memory}, open files {files}, disk "
        f"{disk}, series of metrics {series} from the first look to the last (goal ± 2 %: {YES[many['flat']]}); {looks}"
    )
