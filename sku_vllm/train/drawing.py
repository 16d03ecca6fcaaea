"""What a run draws with its own model, at the steps at which its phases ask for it: looks, samples, and the rows that preserve.

Open this file to see in which order; what is drawn is in targets.py and preserved.py.
"""

from sku_vllm.methods.train_config import TrainConfig
from sku_vllm.train import preserved, targets
from sku_vllm.train.batches import Batches
from sku_vllm.train.forward import Forward
from sku_vllm.train.probe import Probe, fit_probe
from sku_vllm.train.sampling import Gathered


class Drawn:
    """What one run has drawn, and what it has seen of its base on the way. The rows themselves are in its batches.

    Attributes:
        refusal_share: share of refusals in what the samples were drawn from; None where none were drawn.
        looks: what looks at sources of refusals found. probe: tells harmful prompts from benign ones, once it is trained.
        unsaved: whether rows were drawn, which can take longer than many steps, since the last checkpoint.
    """

    def __init__(self, batches: Batches, passes: Forward) -> None:
        self.batches, self.passes = batches, passes
        self.refusal_share: float | None = None
        self.looks: list[targets.Look] = []
        self.probe: Probe | None = None
        self.unsaved = False

    def look(self, config: TrainConfig, gathered: Gathered, needed: float | None = None) -> None:
        """Draw a few refusals. Raises NoRefusals if too few of them are; see `targets.look`."""
        found = targets.look(self.batches, self.passes, config, gathered, needed)
        self.looks += [found] if found else []

    def draw(self, config: TrainConfig, gathered: Gathered, *, looking: bool = True) -> None:
        """Draw the rows that contrastive terms need, for all steps to come.

        Args:
            looking: draw a few first, and only go on if enough of them are refusals.

        Raises:
            NoRefusals: too few of the samples are, or would be, refusals.
        """
        if looking:
            self.look(config, gathered)
        self.batches.samples, self.refusal_share = targets.draw_refusals(self.batches, self.passes, config, gathered)
        preserved.draw_preserved(self.batches, self.passes, config, gathered, self.probe)
        self.unsaved = True

    def fit_probe(self, gathered: Gathered) -> None:
        """Train the probe on the prompts of the run's sets; it stays None where these are too few."""
        sets, template = (self.batches.forget, self.batches.retain, self.batches.border_prompts), self.batches.template
        prompts = [[template.prompt_ids(row) for row in rows] for rows in sets]
        self.probe = gathered(lambda: fit_probe(self.passes, *prompts))
