"""What several test files need."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # beside other processes: threads would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run: what fails is a change's own fault. `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact arithmetic in training, whatever the processor can do."""
    monkeypatch.setattr("emu3.training.machine.has_fast_bfloat16", lambda: False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder of a tiny random model: pictures of 48x48 pixels as 12x12 tokens of 16 codes."""
    from emu3.testing import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """Makes the configuration of a tiny model: 40 text ids, then the control tokens, then the visual ones.

    Arguments are those of the text and the vision configuration that differ, and more of the whole one.
    """
    from emu3.configuration import Emu3Config
    from emu3.vocabulary import SURFACES

    def make(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **whole: Any) -> Emu3Config:
        pictures = {
            "codebook_size": 64,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [2],
            "hidden_size": 64,
        } | (vision or {})
        visual = [f"<|visual token {code:06d}|>" for code in range(pictures["codebook_size"])]
        ids = {surface: 40 + n for n, surface in enumerate([*SURFACES.values(), *visual])}
        words = {
            "vocab_size": 40 + len(ids),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": ids["<|endoftext|>"],
            "bos_token_id": ids["<|extra_203|>"],
            "eos_token_id": ids["<|extra_204|>"],
        } | (text or {})
        return Emu3Config(text_config=words, vq_config=pictures, **{"vocabulary_map": ids} | whole)

    return make
