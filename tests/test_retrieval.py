"""Recall at k counts equal captions as right, and its chance level is that of a random ranking."""

import itertools

import numpy as np
import pytest

from common import data, retrieval


def test_recall_counts_a_caption_that_reads_the_same_as_right():
    rng, n = np.random.default_rng(6), 40
    queries, keys, text = rng.normal(size=(n, 3)), rng.normal(size=(n, 3)), rng.integers(0, 25, n)
    for k in (1, 3, 8, n, n + 5):
        hits = 0
        for i in range(n):
            order = sorted(range(n), key=lambda j: -float(queries[i] @ keys[j]))
            hits += any(text[j] == text[i] for j in order[:k])
        assert retrieval.recall(queries, keys, text, k, block=7) == pytest.approx(hits / n)
        assert hits or k == 1


def test_recalls_are_named_by_their_way():
    image = np.array([[3.0, 1, 2], [0, 2, 1], [0, 0, 1]])  # the third text is nearest to the first
    got = retrieval.recalls(image, np.eye(3), np.arange(3)[:, None], (1, 2))
    assert got == pytest.approx({
        "image_to_text@1": 1, "text_to_image@1": 2 / 3, "recall@1": 5 / 6, "chance@1": 1 / 3,
        "image_to_text@2": 1, "text_to_image@2": 2 / 3, "recall@2": 5 / 6, "chance@2": 2 / 3})


@pytest.mark.parametrize("caption", [[0, 1, 2, 3, 4], [0, 0, 1, 2, 0], [0] * 5, [0, 1, 1, 0]])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_chance_is_the_mean_recall_over_all_rankings(caption, k):
    caption = np.array(caption)
    hits = [(caption[list(order[:k])] == right).any() for right in caption
            for order in itertools.permutations(range(len(caption)))]
    assert retrieval.chance(caption, k) == pytest.approx(np.mean(hits))


def test_recall_of_random_embeddings_is_about_chance():
    rng, n = np.random.default_rng(0), 1500
    image, text = rng.normal(size=(2, n, 8))
    captions = [f"a picture of number {i % 400 if i < 900 else i}" for i in range(n)]
    hashes = np.stack([data.caption_hash(c) for c in captions])
    got = retrieval.recalls(image, text, hashes, (1, 10))
    for k in (1, 10):
        deviation = (got[f"chance@{k}"] / n) ** 0.5
        assert got[f"recall@{k}"] == pytest.approx(got[f"chance@{k}"], abs=4 * deviation)
    assert got["chance@10"] > 10 / n


@pytest.mark.parametrize("captions", [["the same"] * 30, [f"number {i}" for i in range(10)]],
                         ids=["one caption for all", "no more pairs than k"])
def test_a_trivial_evaluation_has_a_chance_of_one(captions):
    rng = np.random.default_rng(0)
    hashes = np.stack([data.caption_hash(c) for c in captions])
    got = retrieval.recalls(*rng.normal(size=(2, len(captions), 4)), hashes, (10,))
    assert got["chance@10"] == got["recall@10"] == 1


def test_captions_that_begin_alike_are_not_right_for_each_other():
    """They differ before the cut. A model that gives all of them one embedding knows nothing."""
    captions = ["a picture, taken by somebody, of " * 4 + f"number {i}" for i in range(200)]
    fields = data.caption_fields(captions, 32, data.byte_ids)
    assert len(np.unique(fields["tokens"], axis=0)) == 1
    same = np.random.default_rng(0).normal(size=(1, 4)).repeat(200, 0)
    got = retrieval.recalls(same, same, fields["caption_hash"], (10,))
    assert got["chance@10"] == pytest.approx(10 / 200) and got["recall@10"] < 0.2
