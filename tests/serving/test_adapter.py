"""A server of an adapter on nano."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from emu3 import Emu3Pipeline


@pytest.fixture
def folder(tmp_path):
    """An adapter that adds to one matrix, as PEFT writes them."""
    folder = tmp_path / "chatty"
    folder.mkdir()
    module = "base_model.model.model.text_model.layers.0.mlp.up_proj"
    noise = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 256, generator=noise), torch.randn(768, 2, generator=noise)
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "nano", "r": 2, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_it_is_served_by_its_name_with_the_words_of_its_base(serve, nano, folder):
    pipeline = Emu3Pipeline.from_pretrained(folder)
    server = serve(pipeline=pipeline, name="chatty")
    assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == ["chatty"]
    words = server.client.get("/api/model").json()["words"]
    assert "cat" in words and words == serve().client.get("/api/model").json()["words"]
    asked = {"prompt": "a cat", "seed": 3, "size": "16x16", "response_format": "b64_json", "model": "chatty"}
    answer = server.post("/v1/images/generations", asked)
    assert answer.status_code == 200, answer.text
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    expected, other = (each.image("a cat", seed=3, height=16, width=16)[0] for each in (pipeline, nano))
    assert picture.tobytes() == expected.tobytes() != other.tobytes()
    (folder / "words.txt").write_text("purple dog")
    assert Emu3Pipeline.from_pretrained(folder).learned.words == ("purple", "dog")
