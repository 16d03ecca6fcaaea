"""What differs between the vLLM releases in range, found by what is there, never by a version number."""

import importlib
from http import HTTPStatus
from typing import Any

try:
    from vllm.exceptions import GracefulHTTPError
except ImportError:  # 0.27: the only exception that carries a status of its own is another one
    from vllm.entrypoints.openai.engine.protocol import GenerationError

    class GracefulHTTPError(GenerationError):  # type: ignore[no-redef]
        """An error the client gets with this status, in vLLM's shape."""

        def __init__(self, message: str, http_status: HTTPStatus) -> None:
            super().__init__(message)
            self.status_code = http_status


def serve_flags() -> Any:
    """The module with `make_arg_parser` and `validate_parsed_serve_args`."""
    try:
        return importlib.import_module("vllm.entrypoints.launchers.cli_args")
    except ModuleNotFoundError:
        return importlib.import_module("vllm.entrypoints.openai.cli_args")
