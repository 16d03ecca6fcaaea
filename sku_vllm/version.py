"""The version of this package: written to records, /metrics and by `sku --version`. pyproject.toml reads it from here."""

__version__ = "0.1.0"
