"""Data sets that `datasets` reads: `hf://ORG/NAME[@REVISION][:CONFIG][#SPLIT]` from the hub, and directories of `save_to_disk`.

A hub set is named by the commit that was read, so that a record says which data it was.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hf://"
FORM = "hf://ORG/NAME[@REVISION][:CONFIG][#SPLIT]"
_NAME = re.compile(
    r"hf://(?:datasets/)?(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:#]+))?(?::(?P<config>[^#]+))?"
    r"(?:#(?P<split>[^#]+))?(?:#(?P<part>\w+))?"
)
_COMMIT = re.compile(r"@([0-9a-f]{40})/")
# hf:// name as given → the same with the commit that was read; `pinned` looks it up for a command's record.
_read: dict[str, str] = {}


def hub_dataset(source: str) -> tuple[str, "Dataset", str | None]:
    """The name with the commit, the data set, and the part of it that is still to be taken (`#train#validation`: of the set's split
    `train` the part `validation`). Without a split the only one is taken, or `train`.

    Raises:
        DataError: not such a name, or the hub has no such data set, configuration, revision or split.
    """
    told = _NAME.fullmatch(source)
    if told is None:
        raise DataError(f"{source}: expected {FORM}, for instance hf://PKU-Alignment/BeaverTails#330k_train")
    name, config, split = told["name"], told["config"], told["split"]
    found = _load(source, name, config, told["revision"], split)
    if isinstance(found, dict):  # of every split, since none was named
        split = "train" if "train" in found else next(iter(found))
        found = found[split]
    commit = _commit(found, name, told["revision"])
    name = f"{HUB}{name}" + (f"@{commit}" if commit else "") + (f":{config}" if config else "") + f"#{split}"
    _read[source] = name + (f"#{told['part']}" if told["part"] else "")
    return name, found, told["part"]


def pinned(source: str) -> str:
    """A source as a record names it: a hub set that was read with its commit, any other as it is."""
    return _read.get(source, source)


def _load(source: str, name: str, config: str | None, revision: str | None, split: str | None) -> Any:
    datasets = _library(source)
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub, the network, the builder: each with exceptions of its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"{source}: cannot be read ({reason}); check the name, the network, and HF_TOKEN for a gated set") from error


def _commit(dataset: "Dataset", name: str, revision: str | None) -> str | None:
    """The commit that was read, from the addresses of the files, or from the hub; else the revision that was asked for."""
    for address in dataset.info.download_checksums or {}:
        if told := _COMMIT.search(str(address)):
            return told[1]
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(name, revision=revision).sha or revision
    except Exception:  # offline, with the set in the cache: the record then names what was asked for
        return revision


def saved_dataset(path: Path, split: str | None) -> tuple["Dataset", str | None]:
    """A data set from disk, and the split that is still to be taken of it.

    Raises:
        DataError: no such directory, or no split of that name.
    """
    datasets = _library(path)
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:  # the last two: its JSON files lack a field or have a wrong type
        raise DataError(f"{path}: not a directory written by datasets.save_to_disk") from error
    if isinstance(dataset, datasets.DatasetDict):
        chosen = "train" if split is None else split
        if chosen not in dataset:
            raise DataError(f"{path}: no split {chosen!r}; name one as {path}#{next(iter(dataset))}")
        return dataset[chosen], None
    return dataset, split


def _library(source: str | Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: needs `datasets`; pip install 'sku-vllm[data]'") from error
    return datasets
