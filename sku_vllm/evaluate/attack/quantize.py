"""The attack quantize: rounding the weights to few bits, as weight-only quantisers do, may remove an edit smaller than the rounding."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sku_vllm.evaluate.attack.attack import Attack, AttackCase, Finding
from sku_vllm.evaluate.attack.calibrated import calibrated
from sku_vllm.evaluate.attack.quantizers import check_packages
from sku_vllm.evaluate.measurement import as_backend
from sku_vllm.fuse.check_quantisers import CALIBRATED
from sku_vllm.model import load_config, resolve_model
from sku_vllm.quantize import QUANTISERS


class Quantize(Attack):
    """The model rounded with every quantiser of --quantizer in turn."""

    changes_weights = True

    def check(self, case: AttackCase) -> None:
        """Raise ConfigError, naming the extra, if the package of a real quantiser is missing."""
        self._real = check_packages(case.request.settings.quantizers, _config(case))

    def measurements(self, case: AttackCase) -> int:
        """One for each quantiser."""
        return len(case.request.settings.quantizers)

    def run(self, case: AttackCase) -> Iterator[Finding]:
        """One finding per quantiser, with its name."""
        for name in case.request.settings.quantizers:
            case.progress(f"rounding to {name}")
            if name in CALIBRATED:
                texts = [case.template.prompt_text(row) + (row.response or "") for row in case.questions.retain]
                with calibrated(name, case.target.model, case.target.tokenizer, texts) as model:
                    yield Finding(name, case.measured(f"quantize {name}", backend=as_backend(model, case.request.config)))
                continue
            with case.target.changed():
                quantize_weights(case.target.model, name, self._real.get(name))
                yield Finding(name, case.measured(f"quantize {name}"))


ATTACK = Quantize


def _config(case: AttackCase) -> dict[str, object]:
    spec = case.request.model
    return dict(load_config(resolve_model(spec.model, spec.revision)).to_dict())


def quantize_weights(model: PreTrainedModel, name: str, real: Callable[[str, Tensor], Tensor] | None = None) -> None:
    """Round every linear layer's weight but the output head's.

    Args:
        name: one of QUANTISERS, unless `real` is given: weight name and rows [rows, columns] to what the quantiser leaves of them.
    """
    rounded = real or (lambda _, weight: QUANTISERS[name](weight))
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    with torch.no_grad():
        for called, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor):
                continue
            # Conv1D (GPT-2) stores [inputs, outputs]; the quantisers group along inputs and expect [outputs, inputs].
            if isinstance(module, torch.nn.Linear) and module is not head:
                weight.copy_(rounded(f"{called}.weight", weight.float().cpu()))
            elif type(module).__name__ == "Conv1D":
                weight.copy_(rounded(f"{called}.weight", weight.float().T.contiguous().cpu()).T)
