"""The built-in lab: a fictional world, small models pretrained on text about it, forget and retain sets, and a grammar check.

Importing it does not load torch; making a model does.
"""

from sku_vllm.lab.grammar import is_well_formed
from sku_vllm.lab.make import lab_data, make_lab
from sku_vllm.lab.world import World, make_world

__all__ = ["World", "is_well_formed", "lab_data", "make_lab", "make_world"]
