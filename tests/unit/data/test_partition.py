"""Which samples a learner sees."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from hpcavg.data.partition import batches, by_class, dirichlet, epoch_of_part, num_batches, shard, shard_size, shared

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
            sizes = [len(one) for one in batches(indices, batch)]
            assert len(sizes) == num_batches(samples, learners, batch)
            assert sizes.count(batch) == num_batches(samples, learners, batch, drop_last=True)


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


LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(np.array)


@given(LABELS, LEARNERS, st.sampled_from([1e-3, 0.5, 100.0]), st.integers(0, 5))
def test_parts_by_label_are_disjoint_complete_and_of_the_same_size(labels, learners, alpha, seed):
    for parts in (dirichlet(labels, learners, alpha, seed), by_class(labels, learners, seed)):
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
        assert len(parts) == learners
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def label_shares(parts, labels, num_classes):
    """Return of every learner which part of its samples each class is, shape (learners, classes)."""
    return np.array([np.bincount(labels[part], minlength=num_classes) / len(part) for part in parts])


def test_a_small_alpha_gives_few_classes_and_a_large_one_all_alike():
    labels = np.arange(20_000) % 10
    largest = [label_shares(dirichlet(labels, 20, alpha, 0), labels, 10).max(axis=1) for alpha in (0.05, 1, 1e4)]
    assert np.median(largest[0]) > 0.7
    assert 0.2 < np.median(largest[1]) < 0.5
    assert np.median(largest[2]) < 0.13


def test_parts_by_class_hold_few_classes():
    labels = np.random.default_rng(0).permutation(np.arange(1000) % 10)
    assert ((label_shares(by_class(labels, 5, 0), labels, 10) > 0).sum(axis=1) == 2).all()
    assert ((label_shares(by_class(labels, 20, 0), labels, 10) > 0).sum(axis=1) == 1).all()


def test_classes_that_are_missing_or_rare_do_no_harm():
    labels = np.array([7] * 50 + [3])
    assert sorted(map(len, dirichlet(labels, 4, 0.01, 1))) == [12, 13, 13, 13]


def test_an_epoch_of_a_part_is_shuffled_anew_and_as_long_as_the_others():
    part = np.array([3, 1, 4, 15, 9])
    first, second = (epoch_of_part(part, 6, learner=2, seed=1, epoch=epoch) for epoch in (0, 1))
    assert sorted(set(first)) == sorted(part)
    assert len(first) == len(second) == 6
    assert first.tolist() != second.tolist()
    assert first.tolist() == epoch_of_part(part, 6, learner=2, seed=1, epoch=0).tolist()
