import math

import pytest
import torch

from iddpm.noise import mix64, normal, stream_key, uniform

KEY = stream_key(7, "noise", 3)


def test_stream_keys_differ_and_stay():
    keys = [stream_key(*args) for args in [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "a1")]]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert stream_key(0, "noise", 1) == stream_key(0, "noise", 1) == 4752123856127514422


def test_mix64_is_splitmix64():
    def reference(x):
        mask = 2**64 - 1
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    inputs = [0, 1, -1, 2**62, -(2**63), 1234567891011, -987654321]
    got = mix64(torch.tensor(inputs))
    assert [x % 2**64 for x in got.tolist()] == [reference(x % 2**64) for x in inputs]


def test_uniform_is_uniform():
    n, bins = 200_000, 100
    u = uniform(KEY, torch.arange(n))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins, 0, 1)
    chi_square = ((counts - n / bins) ** 2 / (n / bins)).sum()
    assert abs(chi_square - (bins - 1)) < 4 * math.sqrt(2 * (bins - 1))
    pairs = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(pairs) < 4 / math.sqrt(n)


def test_low_bits_of_uniform_are_uniform_too():
    low = (uniform(KEY, torch.arange(100_000)) * 2**53).long() & 15
    counts = torch.bincount(low, minlength=16).double()
    assert ((counts - 6250) ** 2 / 6250).sum() < 15 + 4 * math.sqrt(30)


def test_normal_has_the_moments_and_tails_of_one():
    z = normal(KEY, torch.arange(1000), (3, 20, 20)).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for limit in (1, 2, 3, 4):
        p = math.erfc(limit / math.sqrt(2))
        assert abs((z.abs() > limit).double().mean() - p) < 4 * math.sqrt(p / n)
    assert 4.5 < z.abs().max() < 6.7


def test_normal_elements_and_rows_are_uncorrelated():
    z = normal(KEY, torch.arange(2000), (8,)).double()
    off_diagonal = torch.corrcoef(z.T) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / math.sqrt(2000)
    rows = torch.corrcoef(torch.stack([z[:-1].flatten(), z[1:].flatten()]))[0, 1]
    assert abs(rows) < 4 / math.sqrt(z.numel())
    other = normal(KEY + 1, torch.arange(2000), (8,)).double()
    assert abs(torch.corrcoef(torch.stack([z.flatten(), other.flatten()]))[0, 1]) < 4 / math.sqrt(z.numel())


@pytest.mark.parametrize("shape", [(3, 8, 8), (5,), (1, 7, 3), ()])
def test_a_row_depends_on_its_own_index_alone(shape):
    index = torch.arange(100, 164)
    whole = normal(KEY, index, shape)
    assert whole.shape == (64, *shape)
    assert whole.dtype == torch.float32
    for first, last in [(0, 1), (3, 10), (17, 64), (5, 6), (0, 33)]:
        assert torch.equal(normal(KEY, index[first:last], shape), whole[first:last])
    order = uniform(1, index).argsort()
    assert torch.equal(normal(KEY, index[order], shape), whole[order])
    assert torch.equal(uniform(KEY, index[7:9]), uniform(KEY, index)[7:9])


def test_indices_far_apart_and_no_rows():
    z = normal(KEY, torch.tensor([0, 2**40, 2**62]), (4,))
    assert z.isfinite().all()
    assert len(z.unique()) == 12
    assert normal(KEY, torch.arange(0), (2, 2)).shape == (0, 2, 2)
