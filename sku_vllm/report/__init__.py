"""`sku report`: `build_report` reads the records that commands wrote, `render` writes HTML, Markdown, JSON or a model card."""

from typing import Any

from sku_vllm.report.build import build_report
from sku_vllm.report.card import card
from sku_vllm.report.markdown import markdown
from sku_vllm.report.page import page

__all__ = ["FORMATS", "build_report", "render"]

FORMATS = ("html", "md", "json", "card")


def render(report: dict[str, Any], form: str) -> str:
    """The report as a self-contained HTML page, Markdown, JSON, or the fused checkpoint's model card."""
    if form == "json":
        import json

        return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {"html": page, "md": markdown, "card": card}[form](report)
