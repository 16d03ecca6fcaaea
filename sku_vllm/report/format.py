"""Numbers as people read them. A missing number is said to be missing."""

from typing import Any

MISSING = "not measured"
# What a check came to.
STATES = {"pass": "holds", "fail": "fails", "missing": "unknown"}
# A number and its unit stay on one line.
SPACE = "\u00a0"


def percent(value: float | None, digits: int = 1) -> str:
    """0.0123 → '1.2 %'."""
    return MISSING if value is None else f"{100 * value:.{digits}f}{SPACE}%"


def points(value: float | None) -> str:
    """A difference of shares: −0.021 → '−2.1 points'."""
    return MISSING if value is None else f"{100 * value:+.1f}{SPACE}points".replace("-", "−")


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"×{SPACE}{value:.4f}"


def number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def seconds(value: float | None) -> str:
    """0.0123 → '12.3 ms', 75 → '75.0 s'."""
    if value is None:
        return MISSING
    return f"{1000 * value:.1f}{SPACE}ms" if value < 1 else f"{value:.1f}{SPACE}s"


def interval(shares: dict[str, Any]) -> str:
    """'0.0–2.9 %' of CONTRACTS' shares object."""
    low, high = shares.get("harmful_low"), shares.get("harmful_high")
    return MISSING if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f}{SPACE}%"


def answers(shares: dict[str, Any]) -> list[str]:
    """Harmful, its interval, refusal and gibberish of CONTRACTS' shares object, as cells of a table."""
    return [percent(shares["harmful"]), interval(shares), percent(shares["refusal"]), percent(shares["gibberish"])]


def short(text: str, length: int = 600) -> str:
    """Text cut at `length` characters, saying so."""
    return text if len(text) <= length else f"{text[:length].rstrip()} … ({len(text) - length} more characters)"
