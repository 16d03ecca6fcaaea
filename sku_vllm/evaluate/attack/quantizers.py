"""The names that --quantizer takes: simulated quantisers, and real ones from optional packages.

Those of a weight alone (nf4, gguf:…) are what `sku fuse --check` uses. Those that are calibrated on text
(`fuse/calibrated_quantisers.py`) quantise the whole model. Open this file to add one.
"""

from collections.abc import Sequence
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.fuse.calibrated_quantisers import check_installed
from sku_vllm.fuse.check_quantisers import CALIBRATED, FORMS, Quantiser, quantisers
from sku_vllm.quantize import QUANTISERS

KNOWN = (*QUANTISERS, *FORMS, *CALIBRATED)


def check_quantizers(names: Sequence[str]) -> None:
    """Raise ConfigError naming the first unknown one."""
    for name in names:
        if name not in KNOWN:
            raise ConfigError(f"--quantizer {name}: unknown; choose from {', '.join(KNOWN)}")


def check_packages(names: Sequence[str], config: dict[str, Any]) -> dict[str, Quantiser]:
    """The real quantisers of a weight among `names`, loaded. config: the model's config.json.

    Raises:
        ConfigError: a package is missing, also for those that are calibrated; names the extra that brings it.
    """
    for name in names:
        if name in CALIBRATED:
            check_installed(name, "--quantizer")
    try:
        return quantisers([name for name in names if name in FORMS], config)
    except ConfigError as error:  # it names the flag of `sku fuse`
        raise ConfigError(str(error).replace("--check", "--quantizer")) from error
