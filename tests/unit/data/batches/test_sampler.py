"""The order of a run: a bijection in every epoch, and a function of the position alone."""

import numpy as np
import pytest

from cloze.data.batches.counter_rng import make_key
from cloze.data.batches.sampler import block_indices, permute, step_samples


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000, 4097])
def test_every_epoch_visits_every_block_once(size):
    for epoch in range(4):
        samples = np.arange(epoch * size, (epoch + 1) * size)
        assert sorted(block_indices(samples, size, seed=1)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 1000
    first, second = (block_indices(np.arange(e * n, (e + 1) * n), n, seed=1) for e in (0, 1))
    other_seed = block_indices(np.arange(n), n, seed=2)
    for a, b in [(first, second), (first, other_seed), (first, np.arange(n))]:
        assert (a == b).mean() < 0.01


def test_a_hundred_billion_blocks_need_no_memory():
    n = 10**11
    samples = np.random.default_rng(0).integers(0, 10 * n, 100_000)
    blocks = block_indices(samples, n, seed=3)
    assert blocks.min() >= 0
    assert blocks.max() < n
    neighbours = permute(np.arange(5 * 10**10, 5 * 10**10 + 100_000), n, make_key(3))
    assert len(np.unique(neighbours)) == 100_000
    counts = np.histogram(neighbours, bins=100, range=(0, n))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: 5 sigma is 99 +- 70


def test_no_two_epochs_of_a_hundred_billion_blocks_are_alike():
    """Equal places in two epochs, and steps from one to the next, meet as rarely as chance has it."""
    n, looked_at = 10**11, 100_000
    places = np.random.default_rng(1).integers(0, n - 1, looked_at)
    epochs = [block_indices(places + epoch * n, n, seed=3) for epoch in (0, 1, 2, 10**6)]
    following = block_indices(places + 1, n, seed=3)
    for number, one in enumerate(epochs):
        for other in epochs[:number]:
            assert (one == other).sum() <= 1
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.02  # 6 sigma
    steps, counts = np.unique(np.abs(following - epochs[0]), return_counts=True)
    assert counts.max() <= 2
    assert len(steps) > looked_at - 10


def test_every_position_is_equally_likely():
    """Over many keys, block 0 of 10 lands everywhere equally often, and so do pairs."""
    n, keys = 10, 4000
    images = np.stack([permute(np.arange(n), n, make_key(k)) for k in range(keys)])
    for position in range(n):
        counts = np.bincount(images[:, position], minlength=n)
        assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 35  # 9 degrees of freedom
    pairs = np.bincount(images[:, 0] * n + images[:, 1], minlength=n * n).reshape(n, n)
    off_diagonal = pairs[~np.eye(n, dtype=bool)]
    assert ((off_diagonal - keys / 90) ** 2 / (keys / 90)).sum() < 160


@pytest.mark.parametrize(
    ("world_size", "per_device", "accumulation"), [(1, 24, 1), (2, 12, 1), (3, 4, 2), (4, 1, 6), (1, 1, 24), (8, 3, 1)]
)
def test_a_global_step_takes_the_same_samples_however_it_is_split(world_size, per_device, accumulation):
    for step in (0, 1, 17, 10**9):
        taken = np.concatenate(
            [
                step_samples(step, micro, per_device, accumulation, rank, world_size)
                for micro in range(accumulation)
                for rank in range(world_size)
            ]
        )
        assert sorted(taken) == list(range(step * 24, (step + 1) * 24))


def test_positions_out_of_range_are_refused():
    with pytest.raises(ValueError, match="positions"):
        permute(np.array([5]), 5, make_key(0))


def test_the_order_is_the_one_of_every_earlier_version():
    """A changed order would silently break every run that is resumed: these values must never change."""
    assert block_indices(np.arange(8), 1000, seed=42).tolist() == ORDER_OF_SEED_42


ORDER_OF_SEED_42 = [686, 785, 862, 116, 321, 89, 463, 525]
