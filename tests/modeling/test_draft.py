"""The draft head: its two forms, its file, and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from emu3 import Emu3Pipeline
from emu3.checkpoints.load import load_model
from emu3.modeling.draft import DraftHead, load_draft


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = DraftHead(64, width=8, ahead=5).eval().requires_grad_(False)
    for parameter in (head.edge, head.distance.weight):
        torch.nn.init.normal_(parameter)
    return head


def test_looking_up_is_multiplying(head):
    embeddings_VE, hidden_RE = torch.randn(6, 64), torch.randn(3, 64)
    codes_RN, distance_R = torch.randint(7, (3, 8)), torch.tensor([1, 4, 99])
    found = head(head.prepare(hidden_RE, distance_R), codes_RN, head.table(embeddings_VE))
    x = head.hidden(F.rms_norm(hidden_RE, (64,))) + head.distance.weight[[0, 3, 4]]
    for n, linear in enumerate(head.around):
        added = torch.cat((linear(F.rms_norm(embeddings_VE, (64,))), head.edge[None, n]))
        x = x + added[codes_RN[:, n]]
    x = F.silu(x)
    expected = head.norm(head.output(x + F.silu(head.middle(x))))
    torch.testing.assert_close(found, expected)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in tiny_checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def head_of(model):
    return DraftHead(model.lm_head.weight.shape[1], width=8, ahead=5)


def test_a_checkpoint_brings_its_head(checkpoint):
    assert load_draft(checkpoint, load_model(checkpoint)) is None
    assert Emu3Pipeline.from_pretrained(checkpoint).draft is None
    saved = head_of(load_model(checkpoint))
    saved.save(checkpoint)
    pipeline = Emu3Pipeline.from_pretrained(checkpoint)  # the weights beside it are read as before
    assert not pipeline.draft.training
    for name, tensor in pipeline.draft.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name].half().float())
    assert pipeline.engine.draft is pipeline.draft
    without = Emu3Pipeline.from_pretrained(checkpoint, draft=False)
    assert without.draft is None
    assert len(pipeline.image("a red car", seed=1)) == 1
    requests = [each.draw_requests("a red car", seed=1) for each in (pipeline, without)]
    ids = [list(each.engine.stream(own))[-1].ids for each, own in zip((pipeline, without), requests, strict=True)]
    assert ids[0] == ids[1]


def test_a_head_that_does_not_fit_is_refused(checkpoint):
    model = load_model(checkpoint)
    DraftHead(model.lm_head.weight.shape[1] + 8, width=8).save(checkpoint)
    with pytest.raises(ValueError, match=r"is for a model \d+ wide, this one is \d+"):
        Emu3Pipeline.from_pretrained(checkpoint)
    assert Emu3Pipeline.from_pretrained(checkpoint, draft=False).draft is None
    head_of(model).save(checkpoint)
    file = checkpoint / "draft" / "head.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    sizes = json.loads(metadata["emu3_draft"])
    fewer = {name: tensor for name, tensor in tensors.items() if name != "edge"}
    broken = tensors | {"edge": torch.full_like(tensors["edge"], torch.nan)}
    wider = {"emu3_draft": json.dumps(sizes | {"width": 9})}
    for content, settings in [
        (tensors, {}),
        (tensors, {"emu3_draft": "[]"}),
        (tensors, {"emu3_draft": json.dumps(sizes | {"width": 0})}),
        (tensors, wider),
        (fewer, metadata),
        (broken, metadata),
    ]:
        save_file(content, file, metadata=settings)
        with pytest.raises(ValueError, match=r"head\.safetensors"):
            load_draft(checkpoint, model)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="is damaged or holds no draft head"):
        load_draft(checkpoint, model)
