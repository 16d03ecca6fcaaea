"""One check of a report's verdict."""

from dataclasses import dataclass
from typing import Literal

State = Literal["pass", "fail", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check of the verdict. state: "missing" where its numbers were not measured. detail: the numbers it is based on."""

    name: str
    state: State
    detail: str
