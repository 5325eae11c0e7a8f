"""How the head sees inserted tokens: means, and what an attention pool makes of them."""

from __future__ import annotations

import pytest
import torch

from vitreous.hosts.read_out import read_out


def tokens(b: int, n: int, d: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("m", [1, 4])
def test_read_out_into_single_tokens_is_a_mean(m):
    x, more = tokens(2, 6), tokens(2, m, seed=1)
    out = read_out(x, more, slice(0, 2), pooled=False)
    for head in (0, 1):
        torch.testing.assert_close(out[:, head], torch.cat([x[:, head : head + 1], more], dim=1).mean(1))
    assert torch.equal(out[:, 2:], x[:, 2:])


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("heads", [slice(0, None), slice(2, None)])
def test_read_out_into_a_pool_is_the_mean_over_all(m, heads):
    """The mean over the pooled tokens becomes that over pooled and inserted ones; what differs between them stays."""
    x, more = tokens(2, 6), tokens(2, m, seed=1)
    out = read_out(x, more, heads, pooled=True)
    assert out.shape == x.shape
    torch.testing.assert_close(out[:, heads].mean(1), torch.cat([x[:, heads], more], dim=1).mean(1))
    torch.testing.assert_close(out[:, heads] - out[:, -1:], x[:, heads] - x[:, -1:])
    assert torch.equal(out[:, : heads.start], x[:, : heads.start])


def test_read_out_in_an_attention_pool_leaves_the_weights():
    """softmax(q k^T) is blind to a vector that all keys share."""
    x, more, q = tokens(1, 6), tokens(1, 2, seed=1), torch.randn(3, generator=torch.Generator().manual_seed(3))
    out = read_out(x, more, slice(0, None), pooled=True)
    weights = (x @ q).softmax(-1)
    torch.testing.assert_close((out @ q).softmax(-1), weights)
    share = 2 / (6 + 2)
    pooled = weights @ x[0]
    torch.testing.assert_close(weights @ out[0], pooled + share * (more.mean(1) - x.mean(1)))
