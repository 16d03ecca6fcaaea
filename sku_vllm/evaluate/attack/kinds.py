"""The names of the kinds of attack. To add one, add its name here and a file of that name in this folder that sets `ATTACK`."""

from collections.abc import Sequence

from sku_vllm.errors import ConfigError, nearest
from sku_vllm.extensions import ATTACKS, extension_names

# In the order in which `all` runs them: someone with the weights, someone with the base too, a client with decoding, any client.
KINDS = (
    "relearn",
    "quantize",
    "abliterate",
    "attenuate",
    "attenuate-abliterate",
    "prefill",
    "ban-eos",
    "rephrase",
    "turns",
    "encode",
    "language",
)
NEED_BASE = ("attenuate", "attenuate-abliterate")  # `all` leaves them out where no unedited base is known


def known_kinds() -> list[str]:
    """The kinds of this package, then those of other installed packages."""
    return [*KINDS, *(name for name in extension_names(ATTACKS) if name not in KINDS)]


def chosen_kinds(kinds: Sequence[str], *, based: bool = True) -> tuple[str, ...]:
    """Each kind once, in the order given; `all` stands for every known kind. based: whether the unedited base is known.

    Raises:
        ConfigError: none is given, or one is unknown.
    """
    known = known_kinds()
    if not kinds:
        raise ConfigError(f"attack: name at least one kind, of {', '.join(known)}, or all")
    if "all" in kinds:
        return tuple(kind for kind in known if based or kind not in NEED_BASE)
    for kind in kinds:
        if kind not in known:
            raise ConfigError(f"attack {kind}: unknown kind{nearest(kind, known)}")
    return tuple(dict.fromkeys(kinds))
