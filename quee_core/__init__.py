"""The pure library behind quee: arrays and paths in; arrays, tables and dataclasses out (arXiv 2406.14404)."""

__version__ = "0.1.0"
