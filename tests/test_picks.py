"""What was offered and taken: the counts, picks.csv, and how well they find planted noise."""

import csv
import itertools

import numpy as np
import pytest

from common import data, picks


def pool_of(n, noise=0.5):
    source = data.Source("own", np.arange(n) * 2, lambda ids: {
        "image": np.zeros((len(ids), 2, 2, 1), np.uint8), "label": (ids // 2 % 3).astype(np.int32)},
        describe=lambda ids: [f"class {i // 2 % 3}, \"{i}\"" for i in ids], fingerprint="f" * 16)
    return data.Pool(source, noise=noise)


def test_counts_are_those_of_the_super_batches_and_the_picks():
    pool, rng = pool_of(11), np.random.default_rng(0)
    counts, offered, taken = picks.Counts(pool, seed=3, n=4), {}, {}
    for step in range(7):
        pick = rng.permutation(4)[:2]
        ids = data.batch_ids(pool.ids, 3, step, 4)
        for some, of in ((ids, offered), (ids[pick], taken)):
            for i in some:
                of[i] = of.get(i, 0) + 1
        counts.add(step, pick)
    for name, of in (("offered", offered), ("taken", taken)):
        np.testing.assert_array_equal(counts.arrays[name], [of.get(i, 0) for i in pool.ids])
    assert counts.arrays["offered"].sum() == 28 and counts.arrays["taken"].sum() == 14


def test_with_replacement_an_example_is_taken_as_often_as_it_was_drawn():
    counts = picks.Counts(pool_of(11), seed=0, n=4)
    counts.add(0, np.array([1, 1, 1]))
    assert sorted(counts.arrays["taken"])[-2:] == [0, 3]


def test_the_file_has_a_row_an_example_with_the_text_it_came_with(tmp_path):
    pool = pool_of(5)
    counts = picks.Counts(pool, seed=0, n=4)
    counts.add(0, np.array([0, 2]))
    picks.write(tmp_path / "picks.csv", {("learnability", 0): counts})
    rows = list(csv.DictReader(open(tmp_path / "picks.csv")))
    assert [int(r["id"]) for r in rows] == list(pool.ids)
    assert [int(r["taken"]) for r in rows] == list(counts.arrays["taken"])
    assert [r["text"] for r in rows] == pool.source.describe(pool.donor(pool.ids))
    assert {(r["arm"], r["seed"]) for r in rows} == {("learnability", "0")}


def test_noise_is_known_where_it_was_planted():
    pool = pool_of(40)
    counts = picks.Counts(pool, seed=0, n=4)
    np.testing.assert_array_equal(counts.noisy, pool.read(pool.ids)["noisy"])
    assert counts.metrics() == {}  # nothing offered yet
    for step in range(10):  # takes the clean ones only
        noisy = pool.read(data.batch_ids(pool.ids, 0, step, 4))["noisy"]
        counts.add(step, np.flatnonzero(~noisy))
    assert counts.metrics() == {"noise_auc": 1.0}
    assert picks.Counts(pool_of(40, noise=0.0), seed=0, n=4).metrics() == {}


def counts_of(rng, n=60):
    offered = rng.integers(0, 6, n)
    return offered, rng.binomial(offered, 0.4), rng.random(n) < 0.3


def test_noise_auc_counts_the_pairs_that_are_in_order():
    offered, taken, noisy = counts_of(np.random.default_rng(0))
    rate = {i: taken[i] / offered[i] for i in np.flatnonzero(offered)}
    pairs = list(itertools.product([i for i in rate if noisy[i]], [i for i in rate if not noisy[i]]))
    wins = sum((rate[a] < rate[b]) + 0.5 * (rate[a] == rate[b]) for a, b in pairs)
    assert picks.noise_auc(offered, taken, noisy) == pytest.approx(wins / len(pairs), abs=1e-12)


def test_noise_auc_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        offered, taken, noisy = counts_of(np.random.default_rng(seed))
        seen = offered > 0
        theirs = metrics.roc_auc_score(noisy[seen], -taken[seen] / offered[seen])
        assert picks.noise_auc(offered, taken, noisy) == pytest.approx(theirs, abs=1e-12)


def test_noise_auc_at_its_limits():
    ones, noisy = np.ones(4, int), np.array([True, True, False, False])
    assert picks.noise_auc(ones, np.array([0, 0, 1, 1]), noisy) == 1.0
    assert picks.noise_auc(ones, np.array([1, 1, 0, 0]), noisy) == 0.0
    assert picks.noise_auc(ones, ones, noisy) == 0.5
    assert picks.noise_auc(ones, ones, ~noisy & noisy) is None
    assert picks.noise_auc(ones, ones, noisy | ~noisy) is None
    assert picks.noise_auc(np.array([0, 0, 1, 1]), ones, noisy) is None  # no noisy one was offered
