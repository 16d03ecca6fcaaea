"""Leave out rows whose prompt alone fills the length limit, so that one of them does not end a run.

Open this file to see which rows are left out, and how they are named afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sku_vllm.data.rows import Row
from sku_vllm.data.template import PromptTemplate
from sku_vllm.errors import ConfigError, DataError

ON_LONG = ("skip", "error")
NAMED = 5  # how many rows of a set a warning names


def check_on_long(value: str) -> None:
    """Raises ConfigError unless `value` is one of ON_LONG."""
    if value not in ON_LONG:
        raise ConfigError(f"--on-long {value}: choose from {', '.join(ON_LONG)}")


@dataclass(frozen=True, slots=True)
class LongRows:
    """Prompts that leave no room for an answer: `fitting` takes a set and leaves them out.

    Attributes:
        template: writes the prompts. limit: most tokens of prompt and answer; None is no limit. called: what sets the limit, for messages.
        skipped: for each set, the ids of the rows that were left out, or their numbers in the set, from 1.
    """

    template: PromptTemplate
    limit: int | None
    called: str
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def fitting(self, name: str, rows: Sequence[Row]) -> tuple[Row, ...]:
        """The rows of the set `name` that leave room for an answer, in order.

        Raises:
            DataError: there are rows, and none of them does.
        """
        lengths = [len(self.template.prompt_ids(row)) for row in rows] if self.limit is not None else []
        long = {number for number, length in enumerate(lengths) if self.limit is not None and length >= self.limit}
        self.skipped[name] = [rows[number].id or str(number + 1) for number in sorted(long)]
        if rows and len(long) == len(rows):
            raise DataError(
                f"{name} set: none of its {len(rows)} prompts leaves room for an answer: the shortest has {min(lengths)} tokens and "
                f"{self.called} is {self.limit}; raise it or shorten them"
            )
        return tuple(row for number, row in enumerate(rows) if number not in long)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows of each set were left out, for records."""
        return {name: len(rows) for name, rows in self.skipped.items()}

    @property
    def warnings(self) -> list[str]:
        """One line for each set that lost rows: how many, and the first few by name."""
        return [
            f"{len(rows)} {name} prompts leave no room for an answer ({self.called} is {self.limit}) and were skipped: "
            f"rows {', '.join(rows[:NAMED])}{', …' * (len(rows) > NAMED)}"
            for name, rows in self.skipped.items()
            if rows
        ]
