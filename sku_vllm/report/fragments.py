"""HTML fragments that every section of the page is made of."""

from collections.abc import Sequence
from html import escape


def section(title: str, lead: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{lead}</p>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], lead: Sequence[int] = ()) -> str:
    """Cells are HTML already; rows whose index is in `lead` are emphasised."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr{' class=lead' if i in lead else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def numbers(text: str, closed: bool) -> str:
    """A long table, folded away where a chart above already tells its story."""
    return f"<details><summary>All numbers</summary><div>{text}</div></details>" if closed else text
