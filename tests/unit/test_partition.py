"""Which samples a learner sees."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from hpcavg.data.partition import batches, num_batches, shard, shard_size, shared

SAMPLES, LEARNERS, BATCH = st.integers(1, 200), st.integers(1, 12), st.integers(1, 40)


def all_learners(partition, samples, learners, batch, seed=0, epoch=0):
    return [partition(samples, learners, learner, batch, seed, epoch) for learner in range(learners)]


@given(SAMPLES, LEARNERS, BATCH)
def test_no_sample_is_lost_and_only_the_padding_is_doubled(samples, learners, batch):
    seen = np.concatenate(all_learners(shard, samples, learners, batch))
    counts = np.bincount(seen, minlength=samples)
    assert counts.min() >= 1
    assert counts.sum() == shard_size(samples, learners) * learners
    assert counts.sum() - samples < learners


@given(SAMPLES, LEARNERS, BATCH)
def test_every_learner_takes_the_same_number_of_steps(samples, learners, batch):
    for partition in (shard, shared):
        for indices in all_learners(partition, samples, learners, batch):
            assert len(list(batches(indices, batch))) == num_batches(samples, learners, batch)


@given(st.integers(1, 20), LEARNERS, BATCH)
def test_learners_together_see_what_one_learner_with_the_whole_batch_sees(share, learners, batch):
    samples = share * learners
    one = list(batches(shard(samples, 1, 0, batch * learners, 7, 3), batch * learners))
    many = [list(batches(own, batch)) for own in all_learners(shard, samples, learners, batch, 7, 3)]
    for step, whole in enumerate(one):
        assert sorted(np.concatenate([own[step] for own in many])) == sorted(whole)


def test_epochs_and_seeds_reshuffle_and_repeats_do_not():
    first = shard(100, 2, 0, 8, seed=1, epoch=0)
    assert np.array_equal(first, shard(100, 2, 0, 8, seed=1, epoch=0))
    assert not np.array_equal(first, shard(100, 2, 0, 8, seed=1, epoch=1))
    assert not np.array_equal(first, shard(100, 2, 0, 8, seed=2, epoch=0))


def test_shared_learners_draw_from_the_whole_set_by_themselves():
    own = all_learners(shared, 100, 4, 8)
    assert all(len(set(indices)) == 25 for indices in own)
    assert len({tuple(indices) for indices in own}) == 4
    assert len(set(np.concatenate(own))) < 100
