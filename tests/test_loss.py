"""The chunked cross-entropy against torch's own on full logits."""

import pytest
import torch
import torch.nn.functional as F

from mmadapter import loss
from mmadapter.loss import cross_entropy_sum


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_equals_cross_entropy_of_full_logits(monkeypatch, smoothing, scaled, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, dtype=torch.float32)
    weight = torch.randn(31, 8, generator=generator)
    targets = torch.randint(31, (13,), generator=generator)
    scale = torch.randn(13, generator=generator) if scaled else None
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()

    got = cross_entropy_sum(mine, weight, targets, scale=scale, label_smoothing=smoothing)
    each = F.cross_entropy(theirs @ weight.T, targets, reduction="none", label_smoothing=smoothing)
    expected = (each * (1 if scale is None else scale)).sum()
    (3 * got).backward()
    (3 * expected).backward()

    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_without_gradient_nothing_is_kept():
    """A validation pass must not pay for a gradient that nobody asks for."""
    with torch.no_grad():
        total = cross_entropy_sum(torch.ones(3, 4), torch.ones(6, 4), torch.tensor([0, 1, 2]))
    assert not total.requires_grad
    torch.testing.assert_close(total, 3 * torch.tensor(6.0).log())
