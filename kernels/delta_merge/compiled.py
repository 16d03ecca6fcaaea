"""Compile functions to machine code once per machine, log that, and keep it on disk; without a place for it, compile in every process.

What is kept is loaded by llvmlite alone: numba, which makes it, takes 0.3 s to import, and its own cache another 0.5 s. It is kept in
NUMBA_CACHE_DIR where that is set, else in `__pycache__` beside the source, else in the user's cache directory, and made anew when the
source, the compiler or the CPU is another, or the file is damaged. Open this file when functions are compiled at every start.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from llvmlite.binding import ffi

# llvmlite's library object has no __dict__: its __getattr__ returns a function for that name. vLLM 0.32 iterates over the __dict__ of all
# values of all modules when an engine starts on a CPU, and fails at that function in a process that has imported this module.
ffi.lib._fntab.setdefault("__dict__", {})
# Warnings go to stderr where logging is not configured, as in `sku`, and to the log of a server that configures it.
logger = logging.getLogger(__name__)
# Engines own the code that they have loaded.
_engines: list[Any] = []


def compiled(source: Path, llvm_ir: Callable[[], Sequence[tuple[str, str]]], names: Sequence[str]) -> list[int]:
    """Addresses of compiled functions: from the machine code that an earlier process kept, else compiled and kept.

    Args:
        source: the file that `llvm_ir` makes them from. llvm_ir: (name, LLVM IR that defines it) of each; called to compile.
        names: the functions whose addresses are wanted.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    file = f"{source.stem}-{_fingerprint(source)}.o"
    folders = _folders(source)
    code = next(filter(None, (_read(folder / file) for folder in folders)), None)
    if code is None:
        began = time.perf_counter()
        logger.warning("compiling the merge for this machine's CPU: once, some seconds (a minute where the CPU is busy)")
        code = _machine_code(llvm_ir())
        reasons = []
        for folder in folders:
            try:
                _write(folder / file, code)
                logger.warning("compiled in %.1f s, kept in %s", time.perf_counter() - began, folder)
                break
            except OSError as error:
                reasons.append(f"{folder}: {error.strerror}")
        else:
            logger.warning(
                "the compiled merge was not kept (%s), so it will be compiled again; NUMBA_CACHE_DIR names a directory for it",
                "; ".join(reasons),
            )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return [int(engine.get_function_address(name)) for name in names]


def _fingerprint(source: Path) -> str:
    """A name for machine code of this source, made by this compiler for this CPU."""
    cpu = [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    parts = [source.read_bytes(), *(part.encode() for part in (version("numba"), version("llvmlite"), *cpu))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _folders(source: Path) -> list[Path]:
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(chosen)]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [source.parent / "__pycache__", Path(home) / "sku_vllm"]


def _target() -> Any:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, codemodel="jitdefault"
    )


def _machine_code(functions: Sequence[tuple[str, str]]) -> bytes:
    """An object file of these functions alone: what else their IR defines, such as wrappers for Python, is dropped."""
    target, whole = _target(), None
    for name, text in functions:
        module = llvm.parse_assembly(text)
        for other in module.functions:
            if other.name != name and not other.is_declaration:
                other.linkage = "internal"
        passes = llvm.create_new_module_pass_manager()
        passes.add_global_dead_code_eliminate_pass()
        passes.run(module, llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options()))
        if whole is None:
            whole = module
        else:
            whole.link_in(module)
    assert whole is not None
    return bytes(target.emit_object(whole))


def _read(file: Path) -> bytes | None:
    """The machine code that a file holds behind its digest; None where there is none, or it is damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] and len(data) > 32 else None


def _write(file: Path, code: bytes) -> None:
    """Write a file complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, staged = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(hashlib.sha256(code).digest() + code)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(staged)
        raise
