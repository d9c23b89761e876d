"""Exact arithmetic for tests of training: float32, whatever the processor can do."""

import pytest


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emu3.training.precision.has_fast_bfloat16", lambda: False)
