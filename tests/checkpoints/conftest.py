import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "emu3",
    "text_config": {"max_position_embeddings": 32, "vocab_size": 6},
    "vq_config": {"codebook_size": 3, "channel_multiplier": [1, 2]},
}

MakeCheckpoint = Callable[[Mapping[str, tuple[int, ...]]], Path]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """A function that writes a checkpoint folder with zeros of the given shapes."""

    def make(shapes: Mapping[str, tuple[int, ...]]) -> Path:
        save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        return tmp_path

    return make
