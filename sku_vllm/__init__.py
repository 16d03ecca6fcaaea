"""Find a model's harmful knowledge as an adapter, subtract it, and serve original and negated weights side by side."""

__version__ = "0.1.0"
