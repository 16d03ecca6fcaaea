"""Methods, judges and attacks that other installed packages provide, found through entry points.

A package names them in its pyproject.toml, for instance `[project.entry-points."sku_vllm.judges"]`; docs/extending.md shows one.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sku_vllm.errors import ConfigError

METHODS, JUDGES, ATTACKS = "sku_vllm.methods", "sku_vllm.judges", "sku_vllm.attacks"


def extension_names(group: str) -> list[str]:
    """Names that installed packages register in an entry-point group, sorted; the packages are not imported."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_extension(group: str, name: str) -> Any:
    """Import and return the object that entry point `name` of a group points to.

    Raises:
        KeyError: no installed package registers the name.
        ConfigError: two packages register it, or the object cannot be imported.
    """
    found = {entry.value: entry for entry in entry_points(group=group, name=name)}
    if not found:
        raise KeyError(name)
    if len(found) > 1:
        raise ConfigError(f"{group}: {name!r} comes from {_packages(list(found.values()))}; uninstall all but one")
    (entry,) = found.values()
    try:
        return entry.load()
    except Exception as error:  # another package's code may raise anything
        raise ConfigError(f"{group}: {name!r} of {_packages([entry])} cannot be loaded ({type(error).__name__}: {error})") from error


def _packages(entries: list[EntryPoint]) -> str:
    return " and ".join(sorted({entry.dist.name if entry.dist else entry.value for entry in entries}))
