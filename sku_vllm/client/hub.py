"""Publish a fused checkpoint, or its model card, in a repository of the Hugging Face hub, private unless said otherwise.

Raw adapters are never published: nothing here takes one. Open this file to change what is uploaded, or what is refused beforehand.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError, RunError

# The record of a fusion names this machine's paths; what verifies the files is the manifest.
NOT_PUBLISHED = ["sku_fuse.json", "sku_eval.json", "sku_attack.json", "rows.jsonl"]
WARNING = "public: whoever has the base can subtract this checkpoint from it, and so has the edit, which is the harmful knowledge"


class Repository:
    """A model repository on the hub, which exists, and is private unless `public`.

    Args:
        name: ORG/NAME. public: make it public, or accept one that is.

    Raises:
        ConfigError: no such form of a name, no token, or a repository that is public while `public` is not given.
        RunError: the hub refused, or cannot be reached.
    """

    def __init__(self, name: str, *, public: bool = False) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ConfigError(f"--push {name}: expected ORG/NAME, a repository of the Hugging Face hub")
        from huggingface_hub import HfApi, get_token

        if not get_token():
            raise ConfigError(f"--push {name}: no token of the hub here; run: hf auth login, or set HF_TOKEN")
        self.name, self._api = name, HfApi()
        with _told(name, "nothing was uploaded"):
            self._api.create_repo(name, private=not public, exist_ok=True)
            if not public and not self._api.model_info(name).private:
                raise ConfigError(f"--push {name}: exists and is public; give --public if that is meant, or another name")

    @property
    def address(self) -> str:
        """Where it is looked at."""
        return f"{self._api.endpoint}/{self.name}"

    def upload_checkpoint(self, directory: str | Path) -> str:
        """Upload the files of a fused checkpoint, without records that name paths of this machine; returns the address."""
        if not (Path(directory) / "sku_manifest.json").is_file() or any(Path(directory).glob("adapter_*")):
            raise ConfigError(f"--push {self.name}: {directory} is no fused checkpoint, and nothing else is published")
        with _told(self.name, f"the checkpoint is in {directory}; try again with: hf upload {self.name} {directory}"):
            self._api.upload_folder(
                repo_id=self.name, folder_path=directory, ignore_patterns=NOT_PUBLISHED, commit_message="Upload a checkpoint of sku fuse"
            )
        return self.address

    def upload_card(self, text: str) -> str:
        """Put a model card into the repository as README.md; returns the address."""
        with _told(self.name, "the card was not uploaded"):
            self._api.upload_file(repo_id=self.name, path_or_fileobj=text.encode(), path_in_repo="README.md", commit_message="Describe it")
        return self.address


def licence_lines(base: str) -> list[str]:
    """The licence of a base, as lines of a model card's metadata: as its own card says, if that is here."""
    import yaml

    card = Path(base) / "README.md"
    try:
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.S)
        said: Any = yaml.safe_load(front[1]) if front else {}
    except (OSError, ValueError, yaml.YAMLError):
        return []
    keys = ("license", "license_name", "license_link")
    return [f"{key}: {said[key]}" for key in keys if isinstance(said, dict) and isinstance(said.get(key), str)]


@contextlib.contextmanager
def _told(name: str, left: str) -> Iterator[None]:
    """Turn errors of the hub and of the way there into one line. left: what is as it was."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"--push {name}: HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE')} forbids it; unset it") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise RunError(f"--push {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}; {left}") from error
