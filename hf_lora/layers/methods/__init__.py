"""The methods, one file each."""

from .additive import ADDITIVE

__all__ = ["ADDITIVE"]
