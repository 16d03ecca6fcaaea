"""`--columns [SET:]FIELD=COLUMN`: which column of a file holds which field, for all files of a command or for one of them.

Open this file to add a field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sku_vllm.errors import ConfigError, DataError

FIELDS = ("prompt", "messages", "response", "must_contain", "id", "category")


@dataclass(slots=True)
class FileColumns:
    """The columns of one file: `own` were given for it and have to exist; `shared` were given for all files, and are used where they do.

    found: shared columns that some file had. missing: those that this file does not have.
    """

    own: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = ({*self.own} | {*self.shared}) - set(FIELDS)
        if unknown:
            raise DataError(f"--columns: unknown field {sorted(unknown)[0]!r}; choose from {', '.join(FIELDS)}")

    def within(self, name: str, columns: set[str]) -> dict[str, str]:
        """Field → normalised column, among the normalised `columns` of the file `name`.

        Raises:
            DataError: a column that was given for this file does not exist.
        """
        for column in self.own.values():
            if normal(column) not in columns:
                raise DataError(f"{name}: no column {column!r} (--columns); it has {', '.join(sorted(columns))}")
        shared = {key: column for key, column in self.shared.items() if normal(column) in columns}
        self.found.update(shared.values())
        self.missing = sorted(set(self.shared.values()) - set(shared.values()))
        return {key: normal(column) for key, column in {**shared, **self.own}.items()}


class Columns:
    """The values of `--columns`, for the files of one command.

    sets: what a file may be called before the colon.

    Raises:
        ConfigError: a value that is not `[SET:]FIELD=COLUMN`, or several with commas between, or a set that is none of `sets`.
    """

    def __init__(self, values: Sequence[str], sets: Sequence[str] = ()) -> None:
        self._shared: dict[str, str] = {}
        self._own: dict[str, dict[str, str]] = {}
        self._found: set[str] = set()
        owner = ""
        for pair in ",".join(values).split(",") if values else ():
            name, separator, column = pair.partition("=")
            owner, colon, key = name.rpartition(":") if ":" in name else (owner, ":" if owner else "", name)
            if not (separator and key.strip() and column.strip()) or (colon and not owner.strip()):
                raise ConfigError(
                    f"--columns {pair}: expected FIELD=COLUMN or SET:FIELD=COLUMN, for instance prompt=question or forget:prompt=goal"
                )
            if colon and owner.strip() not in sets:
                known = f"choose from {', '.join(sets)}" if sets else "this command reads one file, so write FIELD=COLUMN"
                raise ConfigError(f"--columns {pair}: no set of the name {owner.strip()!r}; {known}")
            (self._own.setdefault(owner.strip(), {}) if colon else self._shared)[key.strip()] = column.strip()

    def of(self, *names: str) -> FileColumns:
        """The columns of the file that these names stand for; a later name wins ("forget" for every forget set, then the set's own)."""
        own = {key: column for name in names for key, column in self._own.get(name, {}).items()}
        return FileColumns(own, {key: column for key, column in self._shared.items() if key not in own}, self._found)

    def check(self) -> None:
        """Raise ConfigError for a column that was given for all files and that none of those read so far has."""
        for key, column in self._shared.items():
            if column not in self._found:
                raise ConfigError(f"--columns {key}={column}: no file has a column {column!r}")


def normal(column: str) -> str:
    """A column's name as readers compare it: lower case, `_` for spaces and hyphens, nothing around it."""
    return str(column).strip().lstrip("\ufeff").casefold().replace(" ", "_").replace("-", "_")
