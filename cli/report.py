"""`sku report DIR…`: write one page from the records of the other commands."""

from pathlib import Path

import click

from sku_vllm.cli.options import log, print_json, sku_command
from sku_vllm.errors import ConfigError

SERVING_DTYPES = ("float32", "bfloat16", "float16")


@sku_command("report", no="not verified (with --require-verified)")
@click.argument("directories", nargs=-1, required=True, type=click.Path(), metavar="DIR…")
@click.option("--output", required=True, type=click.Path(dir_okay=False), help="File to write; an existing report is replaced.")
@click.option(
    "--format",
    "form",
    default=None,
    type=click.Choice(["html", "md", "json", "card"]),
    help="card: README.md of the fused checkpoint.  [default: by the file's name, else html]",
)
@click.option("--title", default="Unlearning report", help="Heading.")
@click.option(
    "--serving-dtype",
    default=None,
    help="Dtype the checkpoint is served in; needed for one stored in float32, which vLLM by default serves in another dtype.",
)
@click.option(
    "--metrics",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="A server's saved /metrics, for traffic and latency per arm; repeatable.",
)
@click.option("--samples", default=3, type=int, help="Answers shown per set and label; 0 keeps all text out.")
@click.option(
    "--kl",
    "kl_rows",
    default=None,
    type=click.Path(dir_okay=False),
    help="Rows with responses: measure the LoRA arm against the fused weights on them.",
)
@click.option("--require-verified", is_flag=True, help="Exit 1 unless the fused checkpoint is verified.")
@click.option("--push", metavar="ORG/NAME", help="Also put the model card into this repository of the Hugging Face hub, a private one.")
@click.option("--public", is_flag=True, help="With --push: the repository may be public.")
def command(
    directories: tuple[str, ...],
    output: str,
    form: str | None,
    title: str,
    serving_dtype: str | None,
    metrics: tuple[str, ...],
    samples: int,
    kl_rows: str | None,
    require_verified: bool,
    push: str | None,
    public: bool,
    json_output: bool,
) -> None:
    """Write one self-contained page from the records that train, tune, fuse, eval, attack and compare left in DIR…

    A checkpoint is called verified only if eval ran on the fused file itself in its serving dtype.

    \b
    sku report adapter tuned safer measured --output report.html
    """
    from sku_vllm.errors import NegativeResult
    from sku_vllm.output import write_text
    from sku_vllm.report import build_report, render
    from sku_vllm.report.number_format import STATES

    form = form or {".md": "md", ".json": "json"}.get(Path(output).suffix.lower(), "html")
    if not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: its directory does not exist; create it first")
    if samples < 0:
        raise ConfigError(f"--samples {samples}: must be 0 or more")
    if Path(output).is_file() and b"sku_vllm" not in Path(output).read_bytes():
        raise ConfigError(f"--output {output}: exists and is no report of ours; choose another name or remove it first")
    if serving_dtype not in (None, *SERVING_DTYPES):
        raise ConfigError(f"--serving-dtype {serving_dtype}: choose from {', '.join(SERVING_DTYPES)}")
    if public and push is None:
        raise ConfigError("--public: says how to --push, which is not given; leave it out")
    measured = _kl(directories, kl_rows, serving_dtype or "auto") if kl_rows else None
    report = build_report(directories, title=title, serving_dtype=serving_dtype, sample_rows=samples, agreement=measured, metrics=metrics)
    # Samples quote forget-set text, so only the owner may read the page.
    write_text(output, render(report, form), mode=0o600 if report["samples"] else 0o644)
    if push is not None:
        from sku_vllm.client.hub import Repository
        from sku_vllm.report.card import card

        log(f"uploaded to {Repository(push, public=public).upload_card(card(report, published=True))}")
    verdict = report["verdict"]
    if json_output:
        print_json({"output": output, "format": form, **verdict})
    else:
        log(f"{verdict['status']}: {verdict['headline']}".replace("\u00a0", " "))
        for reason in verdict["reasons"]:
            log(f"  not verified because {reason}")
        for check in verdict["checks"]:
            if check["state"] != "pass":
                log(f"  {STATES[check['state']]}: {check['name']}: {check['detail']}".replace("\u00a0", " "))
        log(f"written to {output}")
    if require_verified and verdict["reasons"]:
        raise NegativeResult(f"not verified: {'; '.join(verdict['reasons'])}")


def _kl(directories: tuple[str, ...], rows: str, dtype: str) -> dict[str, object]:
    from sku_vllm.data import read_rows
    from sku_vllm.evaluate.agreement import lora_against_fused
    from sku_vllm.model_spec import ModelSpec
    from sku_vllm.records import collect

    fuses = [document for document in collect(directories) if document.command == "fuse"]
    if not fuses:
        raise ConfigError("--kl: none of the directories is a fused checkpoint; add the one sku fuse wrote")
    config = fuses[-1].config
    adapters = config.get("adapters") or config.get("adapter") or []
    if len(adapters) != 1 or isinstance(adapters[0][1], dict):
        raise ConfigError(f"--kl: compares one LoRA at one scale with the fused weights; this file was fused from {adapters}")
    adapter, scale = adapters[0]
    taken = read_rows(rows, need_response=True)[:64]
    model = ModelSpec(config["model"], config.get("revision"), dtype, adapter, float(scale))
    return lora_against_fused(model, fuses[-1].directory, taken)
