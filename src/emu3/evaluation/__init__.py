"""Measurements of one checkpoint: its speed on this machine."""
