"""A codebook that is learned."""

import pytest
import torch

from emu3.training import codebook as module
from emu3.training.codebook import CodebookAverages, CodeUse, k_means, straight_through_scores


def test_k_means_finds_separated_clusters():
    torch.manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]])
    vectors = (middles[:, None] + 0.1 * torch.randn(4, 100, 2)).flatten(0, 1)
    found = k_means(vectors, 4)
    nearest = torch.cdist(middles, found).min(1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert nearest.values.max() < 0.1


def test_use_of_a_codebook():
    def use_of(*uses, least=0.0):
        return [float(each) for each in CodeUse.of(torch.tensor(uses), least)]

    assert use_of(3.0, 3.0, 0.0, 0.0) == pytest.approx([2, 0.5, 2.0])
    # 2 ** (3/4 log2(4/3) + 1/4 log2(4))
    assert use_of(3.0, 1.0, least=1.0) == pytest.approx([1, 0.5, 1.7548], rel=1e-4)
    assert use_of(0.0, 0.0) == [0, 0, 1]


def test_codebook_follows_its_members():
    averages = CodebookAverages(3, 2)
    codebook = torch.tensor([[0.0, 0.0], [4.0, 4.0], [8.0, 8.0]])
    averages.start(codebook, latents=3)
    # A step of two batches.
    averages.count(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0]))
    averages.count(torch.tensor([[4.0, 6.0]]), torch.tensor([1]))
    averages.move(codebook, decay=0.5)
    torch.testing.assert_close(averages.uses, torch.tensor([1.5, 1.0, 0.5]))
    # Half of the old (one use at the code) and half of the new members' sum, over the uses.
    wanted = torch.tensor([[2 / 1.5, 0.0], [4.0, 5.0], [8.0, 8.0]])
    torch.testing.assert_close(codebook, wanted)
    averages.move(codebook, decay=0.5)  # nothing was counted
    torch.testing.assert_close(codebook, wanted)
    torch.testing.assert_close(averages.uses, torch.tensor([1.5, 1.0, 0.5]))


def test_codes_that_gradients_train_are_counted_only():
    averages, codebook = CodebookAverages(2, 1), torch.tensor([[0.0], [9.0]])
    averages.start(codebook, latents=2)
    averages.count(torch.tensor([[1.0]]), torch.tensor([0]))
    averages.move(None, decay=0.5)
    assert averages.uses.tolist() == [1.0, 0.5]
    assert codebook.tolist() == [[0.0], [9.0]]


def test_a_code_that_nobody_uses_restarts_at_a_latent():
    averages = CodebookAverages(2, 2)
    codebook = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    averages.start(codebook, latents=2)
    latents = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    averages.count(latents, torch.tensor([0, 0]))
    averages.move(codebook, decay=0.5)
    assert averages.uses.tolist() == [1.5, 0.5]
    assert not averages.has_dead(0.5)
    assert averages.has_dead(0.6)
    averages.restart(codebook, latents, torch.tensor([0, 0]), 0.6)
    assert codebook[1].tolist() in latents.tolist()
    assert averages.uses.tolist() == [1.5, 1.0]
    assert torch.equal(averages.sums[1], codebook[1])


@pytest.mark.parametrize("scores", [2**24, 40], ids=["at once", "in parts"])
def test_straight_through_gradient_equals_its_formula(monkeypatch, scores):
    monkeypatch.setattr(module, "MAX_SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(9, 3, generator=generator, dtype=torch.double).requires_grad_()
    codebook = torch.randn(8, 3, generator=generator, dtype=torch.double).requires_grad_()
    codes = torch.cdist(latents, codebook).argmin(1)
    upstream = torch.randn(9, 3, generator=generator, dtype=torch.double)
    mixed = straight_through_scores(latents, codebook, codes)
    assert torch.equal(mixed, codebook[codes])
    mixed.backward(upstream)

    # By hand: with shares p, p = softmax(s / scale) and s = z c - |c|^2 / 2, and upstream gradient g,
    # d s_k = p_k (c_k - sum_j p_j c_j) g / scale.
    z, c = latents.detach(), codebook.detach()
    scale = (z - c[codes]).square().mean()
    p = ((z @ c.T - 0.5 * c.square().sum(1)) / scale).softmax(1)
    assert torch.equal(p.argmax(1), codes)  # the highest score is the nearest code
    s = p * (upstream @ c.T - (upstream * (p @ c)).sum(1, keepdim=True)) / scale
    torch.testing.assert_close(latents.grad, s @ c)
    chosen = torch.zeros_like(c).index_add_(0, codes, upstream)
    torch.testing.assert_close(codebook.grad, chosen + s.T @ z - s.sum(0)[:, None] * c)
    assert (codebook.grad != 0).all()  # all codes, used or not


def test_the_gradient_keeps_its_length_where_codes_are_dense():
    torch.manual_seed(0)
    grid = torch.linspace(-2, 2, 41)
    codebook = torch.cartesian_prod(grid, grid)
    latents = (torch.rand(200, 2) * 2 - 1).requires_grad_()
    upstream = torch.randn(200, 2)
    straight_through_scores(latents, codebook, torch.cdist(latents, codebook).argmin(1)).backward(upstream)
    ratio = (latents.grad * upstream).sum() / upstream.square().sum()
    assert 0.6 < float(ratio) < 1.4


def run_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    averages, codebook = CodebookAverages(3, 1), torch.tensor([[0.0], [4.0], [90.0]])
    averages.start(codebook, latents=3)
    latents, codes = torch.tensor([[1.0], [3.0 + 2 * rank]]), torch.tensor([0, 1])
    averages.count(latents, codes)
    averages.move(codebook, decay=0.0)
    averages.restart(codebook, latents, codes, below=0.5)
    torch.save({"codebook": codebook, **averages.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_one_codebook(tmp_path):
    torch.multiprocessing.spawn(run_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(each, second[name]) for name, each in first.items())
    assert first["codebook"][:2].tolist() == [[1.0], [4.0]]  # 4 is the mean of 3 and 5, each seen by one process
    assert first["codebook"][2].item() in (1.0, 3.0)  # a latent of the first process
