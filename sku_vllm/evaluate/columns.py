"""`--columns prompt=question,response=answer` as a mapping."""

from collections.abc import Sequence

from sku_vllm.errors import ConfigError


def column_names(values: Sequence[str]) -> dict[str, str] | None:
    """Field → column name; the flag may be repeated or hold several, separated by commas."""
    named = {}
    for pair in ",".join(values).split(",") if values else ():
        field, separator, column = pair.partition("=")
        if not (separator and field.strip() and column.strip()):
            raise ConfigError(f"--columns {pair}: expected FIELD=COLUMN, for instance prompt=question,response=answer")
        named[field.strip()] = column.strip()
    return named or None
