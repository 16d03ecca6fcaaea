"""Numbers as text: percent, points, ratios, seconds, intervals. A missing number reads "not measured"."""

from collections.abc import Mapping
from typing import Any

MISSING = "not measured"
# The words for the state of a check.
STATES = {"pass": "holds", "fail": "fails", "missing": "unknown"}
# A no-break space, so that a number and its unit stay on one line.
SPACE = "\u00a0"


def percent(value: float | None, digits: int = 1) -> str:
    """0.0123 → '1.2 %'."""
    return MISSING if value is None else f"{100 * value:.{digits}f}{SPACE}%"


def points(value: float | None) -> str:
    """A difference of shares: −0.021 → '−2.1 points'."""
    return MISSING if value is None else f"{100 * value:+.1f}{SPACE}points".replace("-", "−")


def ratio(value: float | None) -> str:
    """1.0123 → '× 1.0123'."""
    return MISSING if value is None else f"×{SPACE}{value:.4f}"


def number(value: float | None, digits: int = 3) -> str:
    """1234.5 → '1,234.500'."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def seconds(value: float | None) -> str:
    """0.0123 → '12.3 ms', 75 → '75.0 s'."""
    if value is None:
        return MISSING
    return f"{1000 * value:.1f}{SPACE}ms" if value < 1 else f"{value:.1f}{SPACE}s"


def interval(shares: Mapping[str, Any]) -> str:
    """harmful_low and harmful_high of a shares object (see `records/schemas/definitions.json`): '0.0–2.9 %'."""
    low, high = shares.get("harmful_low"), shares.get("harmful_high")
    return MISSING if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f}{SPACE}%"


# The heads of the columns that `answers` fills.
ANSWERS = ("harmful", "95 %", "refusal", "gibberish", "ended", "said again")


def answers(shares: Mapping[str, Any]) -> list[str]:
    """A shares object as the cells of a table, see `ANSWERS`."""
    rest = [percent(shares.get(key)) for key in ("refusal", "gibberish", "ended", "repeated")]
    return [percent(shares["harmful"]), interval(shares), *rest]


# The heads of the columns that `border_cells` fills.
BORDER_HEAD = ("refused", "95 %", "gibberish", "ended", "said again", "prompts")


def border_cells(found: Mapping[str, Any]) -> list[str]:
    """One border set of an eval object as the cells of a table, see `BORDER_HEAD`."""
    interval = f"{100 * found['refusal_low']:.1f}–{100 * found['refusal_high']:.1f}{SPACE}%"
    return [percent(found["refusal"]), interval, *(percent(found[key]) for key in ("gibberish", "ended", "repeated")), str(found["n"])]


def short(text: str, length: int = 600) -> str:
    """Text cut at `length` characters, with a note on how many are missing."""
    return text if len(text) <= length else f"{text[:length].rstrip()} … ({len(text) - length} more characters)"
