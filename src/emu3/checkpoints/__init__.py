"""Checkpoints: where they are, what they hold, loading and converting them."""

from emu3.checkpoints.names import NANO, resolve

__all__ = ["NANO", "resolve"]
