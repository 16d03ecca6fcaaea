"""The HTML building blocks of the page's sections: a section, a table, and a table that can be opened."""

from collections.abc import Sequence
from html import escape


def section(title: str, lead: str, *parts: str) -> str:
    """A section of the page. title: text. lead, parts: HTML; empty parts are left out."""
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{lead}</p>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], lead: Sequence[int] = ()) -> str:
    """A table. head: text. rows: cells as HTML. lead: indices of rows to emphasise."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=lead' if i in lead else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def numbers(text: str, closed: bool) -> str:
    """A long table; with `closed` inside a closed <details> element, for numbers that a chart above it also shows."""
    return f"<details><summary>All numbers</summary><div>{text}</div></details>" if closed else text
