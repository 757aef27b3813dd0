"""Foreplan: decide ahead which AI service runs on which GPU, apply the decision, and prove it against traces."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("foreplan")
