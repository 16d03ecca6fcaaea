"""The attack ban-eos: stop tokens are forbidden, against a model that suppresses harm by ending its answer early."""

from collections.abc import Iterator

from sku_vllm.evaluate.attack.attack import Attack, AttackCase, Finding
from sku_vllm.evaluate.attack.decoding import NeverStops


class BanEos(Attack):
    """Every answer runs to --max-new-tokens. When relearn runs too, it also measures this attack on each relearned model."""

    def run(self, case: AttackCase) -> Iterator[Finding]:
        """One finding."""
        case.progress("banning the end of sequence")
        yield Finding("ban-eos", case.measured("ban-eos", backend=NeverStops(case.target.backend)))


ATTACK = BanEos
