"""base − scale·delta, written as a checkpoint that loads like its base: the one function behind `sku fuse`.

Open this file to see the order of the work; each step has a file of its own beside it.
"""

import time
from pathlib import Path

from sku_vllm.adapter.placement import place
from sku_vllm.checkpoint.manifest import file_digests, read_key, write_manifest
from sku_vllm.fuse.check_quantisers import CALIBRATED, quantisers
from sku_vllm.fuse.checks import check_device, check_overflow, check_space
from sku_vllm.fuse.companion_files import write_small_files
from sku_vllm.fuse.copy_baseline import estimate_copy
from sku_vllm.fuse.fuse_report import FuseReport, build_manifest, report_fusion, write_card
from sku_vllm.fuse.fuse_request import FuseRequest
from sku_vllm.fuse.shard_plan import plan_fusion
from sku_vllm.fuse.shard_writer import Progress, ShardWriter
from sku_vllm.fuse.sources import Sources, open_sources
from sku_vllm.fuse.warm_up import load_kernels
from sku_vllm.output import check_output, output_directory, record


def fuse_checkpoint(request: FuseRequest, progress: Progress = lambda done, total: None) -> FuseReport:
    """Subtract adapters from a checkpoint and write the result, complete or not at all.

    Args:
        progress: called with bytes done and bytes in all.
    Returns:
        What `sku fuse --json` prints.
    Raises:
        InputError: the request, the base or an adapter cannot be used. RunError, SkuError: no room on the disk, a merged weight that its
            dtype cannot hold, or a file that changed or could not be written. No output is left in any case.
    """
    output = check_output(request.output)
    key = None if request.signing_key is None else read_key(request.signing_key)
    sources = open_sources(request)
    scaled = [(adapter, scale) for adapter, (_, scale) in zip(sources.adapters, request.adapters, strict=True)]
    placed = place(sources.reader, scaled, untie=request.untie)
    checks = quantisers(request.check, sources.reader.config)
    texts = _calibration_texts(request.calibrate, sources) if request.calibrate is not None else []
    began = time.perf_counter()
    backend = check_device(request.device)
    load_kernels(request, backend, sources.reader, placed)
    started = time.perf_counter()
    plan = plan_fusion(request, sources.reader, placed)
    check_space(sources.reader, plan.size, output)
    with output_directory(output) as partial, sources.held():
        written = ShardWriter(partial, request, plan, backend, checks, progress).write()
        check_overflow(written)
        write_small_files(sources.reader, partial, request.dtype, request.untie, plan.index)
        report = report_fusion(request, output, sources, plan, written)
        for kind in sorted(CALIBRATED.keys() & request.check):
            from sku_vllm.fuse.check_calibrated import check_calibrated

            report.add_check(kind, check_calibrated(kind, sources.reader, partial, placed, texts))
        write_card(partial, report)
        manifest = build_manifest(report, request, backend.name)
        if request.digests:
            manifest["files"] = file_digests(partial, written.leaves)
        write_manifest(partial, manifest, key)
        report.seconds, report.setup_seconds = round(time.perf_counter() - started, 3), round(started - began, 3)
        report.compare(estimate_copy(sources.reader, partial))
        record(partial, "fuse", report.to_json(), request.to_json())
    return report


def _calibration_texts(file: str | Path, sources: Sources) -> list[str]:
    from sku_vllm.fuse.check_calibrated import calibration_texts  # readers of rows and tokenizers, which other fusions do without

    return calibration_texts(file, sources.reader.directory)
