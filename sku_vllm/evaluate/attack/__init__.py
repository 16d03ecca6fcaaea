"""Attacks that try to bring subtracted knowledge back: one file per attack, their interface (attack.py) and `attack_model`."""
