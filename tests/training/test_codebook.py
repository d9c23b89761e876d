"""A codebook that is learned."""

import torch

from emu3.training.codebook import CodebookAverages, k_means


def test_k_means_finds_separated_clusters():
    torch.manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]])
    vectors = (middles[:, None] + 0.1 * torch.randn(4, 100, 2)).flatten(0, 1)
    found = k_means(vectors, 4)
    nearest = torch.cdist(middles, found).min(1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert nearest.values.max() < 0.1


def test_codebook_follows_its_members():
    averages = CodebookAverages(3, 2)
    codebook = torch.tensor([[0.0, 0.0], [4.0, 4.0], [8.0, 8.0]])
    averages.start(codebook)
    latents = torch.tensor([[1.0, 0.0], [3.0, 0.0], [4.0, 6.0]])
    averages.update(codebook, latents, torch.tensor([0, 0, 1]), decay=0.5, restart_below=0.1)
    torch.testing.assert_close(averages.uses, torch.tensor([1.5, 1.0, 0.5]))
    # Half of the old (one use at the code) and half of the new members' sum, over the uses.
    torch.testing.assert_close(codebook, torch.tensor([[2 / 1.5, 0.0], [4.0, 5.0], [8.0, 8.0]]))


def test_a_code_that_nobody_uses_restarts_at_a_latent():
    averages = CodebookAverages(2, 2)
    codebook = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    averages.start(codebook)
    latents = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    averages.update(codebook, latents, torch.tensor([0, 0]), decay=0.5, restart_below=0.6)
    assert codebook[1].tolist() in latents.tolist()
    assert averages.uses.tolist() == [1.5, 1.0]
