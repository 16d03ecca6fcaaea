"""The embedded default: small models of a fictional world, their data, and an exact check of their language.

Nothing here loads torch until a model is made.
"""

from sku_vllm.lab.grammar import is_well_formed
from sku_vllm.lab.make import lab_data, make_lab
from sku_vllm.lab.world import World, make_world

__all__ = ["World", "is_well_formed", "lab_data", "make_lab", "make_world"]
