"""Imports whose place differs between the supported vLLM releases. Each is found by trying, not by comparing version numbers."""

import importlib
from http import HTTPStatus
from typing import Any

__all__ = ["GracefulHTTPError", "serve_flags"]

try:
    from vllm.exceptions import GracefulHTTPError
except ImportError:  # vLLM 0.27 has no such class; GenerationError is its only exception with a status
    from vllm.entrypoints.openai.engine.protocol import GenerationError

    class GracefulHTTPError(GenerationError):  # type: ignore[no-redef, misc]  # the other branch of the same name
        """An exception that vLLM answers with this HTTP status and its JSON error object."""

        def __init__(self, message: str, http_status: HTTPStatus) -> None:
            super().__init__(message)
            self.status_code = http_status


def serve_flags() -> Any:
    """The module with `make_arg_parser` and `validate_parsed_serve_args`."""
    try:
        return importlib.import_module("vllm.entrypoints.launchers.cli_args")
    except ModuleNotFoundError:
        return importlib.import_module("vllm.entrypoints.openai.cli_args")
