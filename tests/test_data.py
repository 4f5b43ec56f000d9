"""Examples by id, batches by (seed, step), planted noise whose truth is right, tokens, prefetch."""

import hashlib
import io
import itertools
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from common import data, prepared, toy
from processes import ROOT


def make_source(n=60, classes=5, first=0, log=None):
    """A source whose every field tells the id; `log` collects the ids that are really decoded."""
    def read(ids):
        if log is not None:
            log.extend(int(i) for i in ids)
        return {"image": np.broadcast_to(ids[:, None, None, None] % 251, (len(ids), 2, 2, 3))
                .astype(np.uint8), "label": (ids * 7 % classes).astype(np.int32),
                "tokens": np.stack([ids, ids // 2], 1).astype(np.int32)}
    return data.Source("made", np.arange(first, first + n), read)


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


# ------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 4), (11, 4), (7, 7), (5, 1), (9, 5)])
def test_an_epoch_is_without_replacement_and_drops_what_is_left(n, batch_size):
    ids, n_batches = np.arange(100, 100 + 3 * n, 3), n // batch_size
    for e in range(6):
        steps = range(e * n_batches, (e + 1) * n_batches)
        stream = np.concatenate([data.batch_ids(ids, 0, s, batch_size) for s in steps])
        assert stream.dtype == ids.dtype and len(stream) == n_batches * batch_size
        assert len(set(stream)) == len(stream) and set(stream) <= set(ids)
    # what is dropped is not the same in every epoch
    seen = {i for s in range(60 * n_batches) for i in data.batch_ids(ids, 0, s, batch_size)}
    assert seen == set(ids)


@pytest.mark.parametrize("n, batch_size", [(7, 20), (1, 3), (5, 6)])
def test_a_batch_larger_than_the_pool_goes_round_evenly(n, batch_size):
    ids = np.arange(100, 100 + 3 * n, 3)
    stream = np.concatenate([data.batch_ids(ids, 0, s, batch_size) for s in range(2 * n)])
    assert stream.dtype == ids.dtype and len(stream) == 2 * n * batch_size
    for e in range(2 * batch_size):
        np.testing.assert_array_equal(np.sort(stream[e * n:(e + 1) * n]), ids)


@pytest.mark.parametrize("n, batch_size", [(60, 61), (3, 4), (40, 320)])
def test_a_batch_larger_than_the_pool_is_refused_at_once_unless_it_may_wrap(n, batch_size, caplog):
    pool, how = data.Pool(make_source(n)), dict(seed=0, batch_size=batch_size, start=0, stop=1)
    for refuse in (lambda: data.batches(pool, flags="--batch_size and --filter_ratio", **how),
                   lambda: data.check_batch(pool, batch_size, "--batch_size and --filter_ratio")):
        with pytest.raises(ValueError, match=rf"\A--batch_size and --filter_ratio: .*{batch_size} "
                                             rf"examples.* {n} .*\Z"):
            refuse()
    with caplog.at_level("WARNING"):
        (batch,) = data.batches(pool, wrap=True, **how)
    assert set(batch["id"]) == set(pool.ids) and f"only {n}" in caplog.text
    caplog.clear()
    whole = dict(how, batch_size=n)
    (batch,) = data.batches(pool, wrap=True, **whole)
    assert len(set(batch["id"])) == n and not caplog.text
    (same,) = data.batches(pool, **whole)
    np.testing.assert_array_equal(batch["id"], same["id"])


def test_every_epoch_and_seed_has_its_own_order():
    ids = np.arange(50)
    orders = {tuple(data.batch_ids(ids, seed, epoch, 50))
              for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and tuple(ids) not in orders


def test_a_batch_is_a_function_of_seed_and_step_alone():
    ids = np.arange(37)
    want = {(seed, step): data.batch_ids(ids, seed, step, 8)
            for seed in (0, 1) for step in range(30)}
    rng = np.random.default_rng(0)
    for k in rng.permutation(len(want)):
        seed, step = list(want)[k]
        data.batch_ids(np.arange(11), seed, step, 8)  # another pool in between
        if k % 2:
            data._permutation.cache_clear()
        np.testing.assert_array_equal(data.batch_ids(ids, seed, step, 8), want[seed, step])


@pytest.mark.parametrize("n_hosts", [1, 2, 4])
def test_host_slices_make_up_the_batch(n_hosts):
    pool = data.Pool(make_source(), noise=0.5, seed=3)
    def rows(host, hosts):
        return list(data.batches(pool, seed=5, batch_size=8, start=2, stop=12, host=(host, hosts)))
    parts, whole = [rows(h, n_hosts) for h in range(n_hosts)], rows(0, 1)
    assert len(whole) == 10
    for step, (full, *slices) in enumerate(zip(whole, *parts), 2):
        np.testing.assert_array_equal(full["id"], data.batch_ids(pool.ids, 5, step, 8))
        for k in full:
            assert all(len(s[k]) == 8 // n_hosts for s in slices)
            np.testing.assert_array_equal(np.concatenate([s[k] for s in slices]), full[k])


def test_starting_in_the_middle_is_starting_at_the_beginning():
    pool = data.Pool(make_source(), noise=0.2)
    run = lambda start: list(data.batches(pool, seed=1, batch_size=16, start=start, stop=9))
    later, all_of_them = run(5), run(0)
    assert len(all_of_them) == 9 and len(later) == 4
    for a, b in zip(later, all_of_them[5:]):
        assert a.keys() == b.keys()
        for k in a:
            np.testing.assert_array_equal(a[k], b[k])


@pytest.mark.parametrize("n, batch_size", [(60, 8), (56, 8), (3, 8), (1, 4)])
@pytest.mark.parametrize("n_hosts", [1, 2, 4])
def test_a_sweep_covers_each_id_once(n, batch_size, n_hosts):
    pool = data.Pool(make_source(), seed=1).subset(np.random.default_rng(0).permutation(60)[:n])
    hosts = [list(data.sweep(pool, batch_size, (h, n_hosts))) for h in range(n_hosts)]
    seen = []
    for slices in zip(*hosts):
        assert {len(s["id"]) for s in slices} == {len(s["valid"]) for s in slices} == {
            batch_size // n_hosts}
        for s in slices:
            assert s["valid"].dtype == bool
            np.testing.assert_array_equal(s["image"][:, 0, 0, 0], s["id"])
            seen += list(s["id"][s["valid"]])
    assert len(hosts[0]) == -(-n // batch_size)
    np.testing.assert_array_equal(seen, pool.ids)  # once each, and in their order


# ----------------------------------------------------------------------------------- prefetch


def test_prefetch_keeps_the_order():
    def slow_when_even(i):
        time.sleep(0.004 * (i % 2 == 0))
        return i * i
    assert list(data.prefetch(slow_when_even, range(30), threads=4, ahead=7)) == [
        i * i for i in range(30)]
    assert list(data.prefetch(slow_when_even, [])) == []


def test_prefetch_works_in_several_threads():
    together = threading.Barrier(2, timeout=5)  # breaks, and raises, unless two are there at once
    meet = lambda i: together.wait() * 0 + i
    assert list(data.prefetch(meet, range(4), threads=2)) == [0, 1, 2, 3]


def test_prefetch_hands_on_exceptions_in_their_place():
    def fails_at_3(i):
        if i == 3:
            raise KeyError("three")
        return i
    stream, got = data.prefetch(fails_at_3, range(10)), []
    with pytest.raises(KeyError, match="three"):
        for x in stream:
            got.append(x)
    assert got == [0, 1, 2] and list(stream) == []


@pytest.mark.parametrize("ahead", [1, 4])
def test_prefetch_runs_ahead_as_far_as_promised_and_no_further(ahead):
    begun = []
    stream = data.prefetch(lambda i: begun.append(i) or i, itertools.count(), ahead=ahead)
    assert not begun  # nothing before the first item is asked for
    for taken in range(3):
        assert next(stream) == taken
        assert wait_for(lambda: len(begun) == taken + 1 + ahead)
        time.sleep(0.03)
        assert sorted(begun) == list(range(taken + 1 + ahead))
    stream.close()


def test_prefetch_leaves_promptly():
    begun, release = [], threading.Event()
    def make(i):
        begun.append(i)
        return i if i == 0 else release.wait(10)
    stream = data.prefetch(make, range(100), threads=2, ahead=6)
    assert next(stream) == 0 and wait_for(lambda: len(begun) == 3)
    before = time.monotonic()
    stream.close()
    assert time.monotonic() - before < 2  # does not wait for the two under way
    release.set()
    time.sleep(0.05)
    assert sorted(begun) == [0, 1, 2]  # nor begins those that were queued


# ----------------------------------------------------------------------------------- captions


def test_tokens_are_bytes_with_an_end_mark():
    np.testing.assert_array_equal(data.tokenize("ab", 6), [97 + 3, 98 + 3, 1, 0, 0, 0])
    np.testing.assert_array_equal(data.tokenize("", 3), [1, 0, 0])
    np.testing.assert_array_equal(data.tokenize("abcd", 5), [100, 101, 102, 103, 1])  # just fits
    np.testing.assert_array_equal(data.tokenize("abcdefgh", 5), [100, 101, 102, 103, 1])
    np.testing.assert_array_equal(data.tokenize("é", 4), [0xC3 + 3, 0xA9 + 3, 1, 0])
    np.testing.assert_array_equal(data.tokenize("é", 2), [0xC3 + 3, 1])  # cut within a letter
    assert data.tokenize("x", 4).dtype == np.int32
    # no byte leaves the vocabulary, and none is taken for a mark
    all_bytes = data.tokenize("\U0010ffff ÿ\x00", 32)
    assert all_bytes.max() < data.VOCAB and (all_bytes[:all_bytes.argmin() - 1] >= 3).all()
    assert data.VOCAB - 1 == 255 + 3


@pytest.mark.parametrize("name", ["words", "bytes"])
def test_no_id_of_a_tokenizer_leaves_its_vocabulary_or_is_a_mark(name):
    encode, size = data.tokenizer(name)
    for caption in ("A dog!", "zwölf Bäume", "\U0010ffff ÿ\x00 \u4e2d\u6587", "x" * 300, "1 2 22"):
        ids = encode(caption)
        assert ids.dtype == np.int32 and ids.min() >= 3 and ids.max() < size
    assert encode("").shape == (0,) and encode("").dtype == np.int32


def test_words_are_told_apart_whatever_their_case_and_punctuation():
    encode, size = data.tokenizer("words")
    assert size == 4096 + 3
    np.testing.assert_array_equal(encode("A small dog, 22 cats."), encode("a SMALL dog 22 cats"))
    np.testing.assert_array_equal(encode("dog"), [zlib.crc32(b"dog") % 4096 + 3])
    np.testing.assert_array_equal(encode("Bäume"), [zlib.crc32("bäume".encode()) % 4096 + 3])
    assert encode("it's a dog_house").shape == (5,)
    words = {w for c in toy.world(3000, image_size=8)["caption"] for w in re.findall(r"\w+", c)}
    assert len({int(encode(w)[0]) for w in words}) == len(words) > 30  # as the docstring says


@pytest.mark.parametrize("name, word", [
    ("nowhere.model", "no such file"), ("~/nowhere.model", "no such file"), (__file__, "sentencepiece")])
def test_a_tokenizer_that_is_none_is_refused(name, word):
    with pytest.raises(ValueError, match=rf"\A--tokenizer={re.escape(name)}.*{word}.*\Z"):
        data.tokenizer(name)


def captioned_source(captions, context, encode=data.byte_ids):
    def read(ids):
        return {"image": np.zeros((len(ids), 2, 2, 3), np.uint8),
                **data.caption_fields([captions[i] for i in ids], context, encode)}
    return data.Source("made", np.arange(len(captions)), read,
                       describe=lambda ids: [captions[i] for i in ids])


def test_captions_are_told_apart_before_the_cut():
    start = "a picture of " * 10
    source = captioned_source([start + "a dog", start + "a cat", start + "a dog"], 20)
    got = source.read(source.ids)
    assert (got["tokens"] == got["tokens"][0]).all()
    assert got["caption_hash"].dtype == np.int32 and got["caption_hash"].shape == (3, 2)
    equal = (got["caption_hash"][:, None] == got["caption_hash"]).all(-1)
    np.testing.assert_array_equal(equal, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    digest = hashlib.sha256((start + "a cat").encode()).digest()
    assert got["caption_hash"][1].tobytes() == digest[:8]


@pytest.mark.parametrize("captions, encode, want", [
    (["a", "bb", "ccc", "dddd"], "bytes", dict(cut=0, empty=0, equal=0, equal_tokens=0)),
    (["a", "", "", "long as can be"], "bytes", dict(cut=.25, empty=.5, equal=.5, equal_tokens=0)),
    (["the same dog", "the same cat", "the one", "one"], "bytes",
     dict(cut=.75, empty=0, equal=0, equal_tokens=.75)),
    (["a dog", "A dog.", "a dog", "!?"], "words",
     dict(cut=0, empty=.25, equal=.5, equal_tokens=.25)),
    (["one two three four five", "x"], "words", dict(cut=.5, empty=0, equal=0, equal_tokens=0))])
def test_captions_that_cannot_be_told_apart_are_counted(captions, encode, want, caplog):
    encode = data.tokenizer(encode)[0]
    source = captioned_source(captions, 5, encode)
    with caplog.at_level("WARNING"):
        got = data.count_captions(source, encode, 5, "--eval_split=test")
    assert got == pytest.approx({"looked_at": len(captions), **want})
    assert ("--eval_split=test" in caplog.text) == any(want.values())


def test_a_thousand_captions_are_looked_at_all_over_the_split():
    captions = ["same" if i >= 4000 else f"{i}" for i in range(5000)]
    got = data.count_captions(captioned_source(captions, 9), data.byte_ids, 9, "train")
    assert got["looked_at"] == 1000 and got["equal"] == pytest.approx(0.2, abs=0.002)


# -------------------------------------------------------------------------------------- noise


def donors(pool):
    return pool.donor(pool.source.ids)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.33, 0.5, 1.0])
@pytest.mark.parametrize("first", [0, 1000])
def test_the_planted_fraction_is_exact_and_one_cycle(noise, first):
    pool = data.Pool(make_source(first=first), noise=noise, seed=2)
    moved = np.flatnonzero(donors(pool) != pool.source.ids)
    assert len(moved) == round(noise * 60)
    np.testing.assert_array_equal(np.sort(donors(pool)), pool.source.ids)
    if len(moved):
        length, i = 1, pool.donor(pool.source.ids[moved[:1]])
        while i != pool.source.ids[moved[0]]:
            length, i = length + 1, pool.donor(i)
        assert length == len(moved)


@pytest.mark.parametrize("field", ["label", "tokens"])
def test_noisy_is_the_truth_and_only_the_field_changes(field):
    source = make_source()
    pool = data.Pool(source, noise=0.5, field=field, seed=4)
    ids = np.random.default_rng(0).permutation(60)
    got, true = pool.read(ids), source.read(ids)
    differs = (got[field] != true[field]).reshape(60, -1).any(1)
    assert got["noisy"].dtype == bool and got["noisy"].any()
    np.testing.assert_array_equal(got["noisy"], differs)
    np.testing.assert_array_equal(got["id"], ids)
    np.testing.assert_array_equal(got[field], source.read(pool.donor(ids))[field])
    for k in {"image", "label", "tokens"} - {field}:
        np.testing.assert_array_equal(got[k], true[k])
    # the fields are permuted, so their histogram stays; the source itself is not written to
    np.testing.assert_array_equal(np.sort(got[field], axis=0), np.sort(true[field], axis=0))
    np.testing.assert_array_equal(source.read(ids)[field], true[field])
    if field == "label":  # a label that was replaced by its equal is not noise
        assert got["noisy"].sum() < (pool.donor(ids) != ids).sum()


def test_a_caption_is_noisy_if_it_differs_before_the_cut():
    start = "a picture of "
    captions = [start + ("a dog" if i % 3 else f"{i}") for i in range(30)]
    pool = data.Pool(captioned_source(captions, 8), noise=1.0, field="tokens")
    got = pool.read(pool.ids)
    given = [captions[i] for i in pool.donor(pool.ids)]
    np.testing.assert_array_equal(got["caption_hash"], [data.caption_hash(c) for c in given])
    np.testing.assert_array_equal(got["noisy"], [a != b for a, b in zip(given, captions)])
    assert 0 < got["noisy"].sum() < 30


def test_noise_of_zero_touches_nothing():
    source = make_source()
    got, true = data.Pool(source, noise=0.0).read(source.ids), source.read(source.ids)
    assert not got["noisy"].any()
    for k in true:
        np.testing.assert_array_equal(got[k], true[k])


def test_seeds_plant_differently():
    pools = [data.Pool(make_source(), noise=0.3, seed=s) for s in (0, 1, 0)]
    np.testing.assert_array_equal(donors(pools[0]), donors(pools[2]))
    assert not np.array_equal(donors(pools[0]), donors(pools[1]))


def test_a_sub_pool_carries_the_same_labels():
    pool = data.Pool(make_source(first=30), noise=0.6, field="tokens", seed=7)
    ids = np.random.default_rng(1).permutation(pool.ids)[:20]
    part = pool.subset(ids)
    np.testing.assert_array_equal(part.ids, np.sort(ids))
    assert len(part) == 20 and len(pool) == 60
    same, other = pool.replant(0.6), pool.subset(ids).replant(0.1)
    want = pool.read(part.ids)
    for p in (part, same, part.subset(part.ids[:20])):
        for k, v in p.read(part.ids).items():
            np.testing.assert_array_equal(v, want[k])
    np.testing.assert_array_equal(other.ids, part.ids)
    assert (other.field, other.seed, other.noise) == ("tokens", 7, 0.1)
    assert (donors(other) != other.source.ids).sum() == 6  # of the source's 60, not of the part's
    clean = pool.replant(0.0).read(part.ids)
    assert not clean["noisy"].any() and want["noisy"].any()
    np.testing.assert_array_equal(clean["tokens"], pool.source.read(part.ids)["tokens"])


def test_identity_names_what_was_planted():
    source = make_source()
    identities = [data.Pool(source, **k).identity() for k in (
        {}, {"noise": 0.1}, {"noise": 0.2}, {"noise": 0.1, "seed": 1},
        {"noise": 0.1, "field": "tokens"})]
    assert len(set(identities)) == 5
    assert identities[1] == data.Pool(source, noise=0.1).identity()


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_split_is_disjoint_complete_and_seeded(fraction):
    ids = np.arange(5, 105)
    a, b = data.split(ids, fraction, 0)
    assert len(a) == round(100 * fraction)
    np.testing.assert_array_equal(np.sort(np.concatenate([a, b])), ids)
    for x in (a, b):
        np.testing.assert_array_equal(x, np.sort(x))
    np.testing.assert_array_equal(a, data.split(ids, fraction, 0)[0])
    if 0 < fraction < 1:
        assert not np.array_equal(a, data.split(ids, fraction, 1)[0])
        assert not np.array_equal(a, ids[:len(a)])


# -------------------------------------------------------------------------------------- cache


def test_the_cache_decodes_each_example_once():
    log = []
    source = make_source(first=10, log=log)
    probe = len(log)  # the constructor looks at one example for its shape
    assert probe == 1
    for _ in range(3):
        for ids in (np.arange(40, 70), np.array([12, 12, 69, 10]), np.arange(10, 70)[::-1]):
            got = source.read(ids)
            np.testing.assert_array_equal(got["image"][:, 1, 1, 2], ids)
            np.testing.assert_array_equal(got["tokens"][:, 0], ids)
    assert sorted(log[probe:]) == list(range(10, 70))


def test_what_the_cache_gives_may_be_written_to():
    source = make_source()
    source.read(source.ids)["label"][:] = -1
    assert source.read(source.ids)["label"].min() >= 0


def test_too_large_a_set_is_not_cached(monkeypatch):
    log = []
    monkeypatch.setattr(data, "CACHE_BYTES", 60 * 12)  # 2 x 2 x 3 bytes each: just fits
    source = make_source(log=log)
    source.read(source.ids), source.read(source.ids)
    assert len(log) == 61
    monkeypatch.setattr(data, "CACHE_BYTES", 60 * 12 - 1)
    log.clear()
    source = make_source(log=log)
    source.read(source.ids)
    np.testing.assert_array_equal(source.read(source.ids[3:5])["image"][:, 0, 0, 0], [3, 4])
    assert len(log) == 63 and source.image_shape == (2, 2, 3)


def test_threads_may_share_a_cache():
    class Slowly(dict):  # another thread comes in between the fields
        def items(self):
            for item in super().items():
                time.sleep(0.002)
                yield item

    def read(ids):
        return Slowly(image=np.tile(ids[:, None, None, None], (2, 2, 1)).astype(np.uint8),
                      label=ids.astype(np.int32))
    source = data.Source("made", np.arange(200), read)
    rng = np.random.default_rng(0)
    wanted = [rng.integers(0, 200, 40) for _ in range(60)]
    for ids, got in zip(wanted, data.prefetch(source.read, wanted, threads=8, ahead=16)):
        np.testing.assert_array_equal(got["image"][:, 1, 0, 0], ids)
        np.testing.assert_array_equal(got["label"], ids)


# ------------------------------------------------------------------------------------- images


def fitted(array, side):
    image = PIL.Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    image = prepared.fit(image, side)
    return np.asarray(image).reshape(image.height, image.width, -1)


def test_fit_leaves_alone_what_fits():
    image = PIL.Image.new("RGB", (8, 8))
    assert prepared.fit(image, 8) is image and prepared.fit(image, 0) is image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_fit_cuts_the_middle_of_an_oblong(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    want = image[:, 4:12] if shape == (8, 16) else image[4:12]  # the short side fits: no resizing
    np.testing.assert_array_equal(fitted(image, 8), want)


def test_fit_resizes_without_turning_or_stretching():
    v, u = np.mgrid[0:24, 0:40]
    image = np.stack([4 * v, 4 * u, np.full_like(u, 9)], -1).astype(np.uint8)
    got = fitted(image, 6).astype(float)  # 24 x 40 -> 6 x 10 -> the middle 6 x 6
    assert got.shape == (6, 6, 3)
    inner = slice(1, 5)  # bicubic bends at the border
    np.testing.assert_allclose(got[inner, 2, 0], 4 * (4 * np.arange(1, 5) + 1.5), atol=1.5)
    np.testing.assert_allclose(got[2, :, 1], 4 * (4 * (np.arange(6) + 2) + 1.5), atol=1.5)
    assert (got[..., 2] == 9).all()


def test_fit_always_gives_a_square():
    for height, width, side in itertools.product((1, 5, 7, 23), (3, 5, 18), (1, 4, 7)):
        for channels in (1, 3):
            got = fitted(np.full((height, width, channels), 77, np.uint8), side)
            assert got.shape == (side, side, channels) and got.dtype == np.uint8
            assert (got == 77).all()


SIZES = [(500, 375), (375, 500), (640, 427), (333, 500), (64, 64), (97, 31), (30, 200), (28, 29)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cutting_first_gives_the_pixels_of_resizing_first(size):
    rng = np.random.default_rng(size[0])
    image = PIL.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    for side in (32, 64, 224):
        scale = side / min(size)
        new = [max(side, round(length * scale)) for length in size]
        left, top = ((length - side) // 2 for length in new)
        want = image.resize(new, PIL.Image.BICUBIC).crop((left, top, left + side, top + side))
        differ = np.abs(np.asarray(prepared.fit(image, side)).astype(int) - np.asarray(want))
        assert differ.max() <= 1 and (differ > 0).mean() < 0.002  # on noise, the hardest picture


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_long_thin_picture_costs_no_more_than_its_centre(size):
    image = PIL.Image.new("L", size, 50)
    begin, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert prepared.fit(image, 224).getextrema() == (50, 50)
    assert time.monotonic() - begin < 2
    # resized whole, it has 224 x 4,480,000 pixels, a gigabyte
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000


# --------------------------------------------------------------------------------------- TFDS


def png(array):
    """A file object: arrays themselves would be encoded by TensorFlow."""
    out = io.BytesIO()
    PIL.Image.fromarray(array.squeeze()).save(out, "png")
    out.seek(0)
    return out


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """prepare(features, rows of 'train', rows of 'test' or the first) -> path of a prepared set."""
    import tensorflow_datasets as tfds
    tfds.disable_progress_bar()

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        content = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(Tiny.content[0](tfds.features)))

        def _split_generators(self, dl_manager):
            return {k: self._generate_examples(rows) for k, rows in
                    zip(("train", "test"), Tiny.content[1:])}

        def _generate_examples(self, rows):
            for i, row in enumerate(rows):
                for value in row.values():
                    if isinstance(value, io.BytesIO):
                        value.seek(0)
                yield i, row

    def prepared(features, train, test=None):
        Tiny.content = features, train, test or train[:1]
        builder = Tiny(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
        builder.download_and_prepare()
        return str(builder.data_dir)
    return prepared


@pytest.fixture(scope="module")
def labelled(prepare):
    """20 + 4 images whose pixels all are their number, of class number % 3."""
    rows = [{"image": png(np.full((8, 8, 3), i, np.uint8)), "label": i % 3} for i in range(24)]
    return prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)),
                              "label": f.ClassLabel(names=["a", "b", "c"])}, rows[:20], rows[20:])


def test_a_prepared_set_is_opened_by_its_path(labelled):
    source = data.open_source(labelled, "train", need=("label",))
    got = source.read(source.ids)
    assert set(got) == {"image", "label"} and source.image_shape == (8, 8, 3)
    assert got["image"].dtype == np.uint8 and got["label"].dtype == np.int32
    number = got["image"][:, 0, 0, 0]
    np.testing.assert_array_equal(np.sort(number), np.arange(20))
    assert (got["image"] == number[:, None, None, None]).all()
    np.testing.assert_array_equal(got["label"], number % 3)
    assert source.class_names == ("a", "b", "c")
    assert source.describe(source.ids) == ["abc"[i % 3] for i in number]
    # it has no caption: no tokens
    test = data.open_source(labelled, "test", image_size=4, context=9)
    assert test.image_shape == (4, 4, 3) and set(test.read(test.ids)) == {"image", "label"}
    number = test.read(test.ids)["image"][:, 3, 3, 0]
    np.testing.assert_array_equal(np.sort(number), np.arange(20, 24))


def test_a_sub_split_keeps_the_ids_of_the_whole(labelled):
    whole = data.open_source(labelled, "train")
    for split, ids in (("train[50%:]", range(10, 20)), ("train[:25%]", range(5)),
                       ("train[5:7]", (5, 6)), ("train[-3:]", (17, 18, 19))):
        part = data.open_source(labelled, split)
        np.testing.assert_array_equal(part.ids, list(ids))
        got, want = part.read(part.ids[::-1]), whole.read(part.ids[::-1])
        for k in want:
            np.testing.assert_array_equal(got[k], want[k])
        assert part.describe(part.ids[:1]) == whole.describe(part.ids[:1])


def test_noise_and_batches_over_a_sub_split(labelled):
    pool = data.Pool(data.open_source(labelled, "train[50%:]"), noise=1.0)
    assert set(donors(pool)) == set(range(10, 20)) and (donors(pool) != pool.ids).all()
    for batch in data.batches(pool, seed=0, batch_size=5, start=0, stop=4):
        np.testing.assert_array_equal(
            batch["noisy"], batch["label"] != batch["image"][:, 0, 0, 0] % 3)


@pytest.mark.parametrize("name", ["caption", "captions", "text"])
def test_captions_are_found_by_name(prepare, name):
    texts = ["a dog", "", "zwölf Bäume, very long"]
    wrap = (lambda s: [s, "another"]) if name == "captions" else (lambda s: s)
    rows = [{"image": png(np.full((6, 9 + i, 1), i, np.uint8)), name: wrap(s)}
            for i, s in enumerate(texts)]
    path = prepare(lambda f: {"image": f.Image(shape=(None, None, 1)), name: f.Sequence(f.Text())
                              if name == "captions" else f.Text()}, rows, rows[:1])
    source = data.open_source(path, "train", image_size=6, context=12, need=("caption",))
    assert source.image_shape == (6, 6, 1) and source.class_names == ()
    got = source.read(source.ids)
    assert set(got) == {"image", "tokens", "caption_hash"} and got["tokens"].shape == (3, 12)
    for i, number in enumerate(got["image"][:, 0, 0, 0]):
        np.testing.assert_array_equal(got["tokens"][i], data.tokenize(texts[number], 12))
        assert source.describe(source.ids[i:i + 1]) == [texts[number]]
    with pytest.raises(ValueError, match="--image_size"):  # of no one size
        data.open_source(path, "train")
    with pytest.raises(ValueError, match="no feature 'label'"):
        data.open_source(path, "train", image_size=6, need=("label",))


@pytest.mark.parametrize("keywords, words", [
    ({"need": ("caption",)}, ("--dataset", "'caption'", "--task")),
    ({"split": "val"}, ("--split=val", "train, test")),
    ({"split": "train[:0]"}, ("--split=train[:0]", "no example")),
    ({"split": "train[:10%]+test"}, ("--split=train[:10%]+test",)),
    ({"dataset": "/nowhere/at/all"}, ("--dataset=/nowhere/at/all", "no such directory")),
    ({"dataset": "."}, ("--dataset=.",)),
    ({"dataset": "no_such_data_set"}, ("--dataset=no_such_data_set",)),
    ({"dataset": "mnist"}, ("--dataset=mnist", "not prepared", "pip install", "--data_dir")),
    ({"dataset": "toy", "split": "val"}, ("--split=val", "train, test")),
    ({"dataset": "toy", "toy_knobs": {"n": 0}}, ("--toy_examples",)),
])
def test_errors_are_one_line_that_names_the_flag(labelled, tmp_path, keywords, words):
    with pytest.raises(ValueError) as error:
        data.open_source(**{"dataset": labelled, "split": "train", "data_dir": str(tmp_path),
                            **keywords})
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_set_in_another_file_format_is_refused(labelled, tmp_path):
    path = shutil.copytree(labelled, tmp_path / "tiny" / "1.0.0")
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match=r"\A--dataset=.*array_record.*\Z"):
        data.open_source(str(path), "train")


def test_labels_without_class_names_are_refused(prepare):
    rows = [{"image": png(np.zeros((8, 8, 3), np.uint8)), "label": 2}]
    path = prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)), "label": f.Scalar(np.int64)},
                   rows, rows)
    with pytest.raises(ValueError, match="--dataset=.*label"):
        data.open_source(path, "train", need=("label",))


@pytest.mark.parametrize("kind", ["none", "nested"])
def test_captions_in_a_container(prepare, kind):
    value = [] if kind == "none" else [{"id": 1, "text": "a dog"}, {"id": 2, "text": "a cat"}]
    rows = [{"image": png(np.zeros((8, 8, 3), np.uint8)), "captions": value}]
    path = prepare(lambda f: {
        "image": f.Image(shape=(8, 8, 3)), "captions": f.Sequence(
            f.Text() if kind == "none" else {"id": f.Scalar(np.int64), "text": f.Text()})}, rows)
    source = data.open_source(path, "train", context=9)
    assert source.describe([0]) == ["" if kind == "none" else "a dog"]


# ------------------------------------------------------- what an image file or a tensor may hold

RGB = (np.add.outer(np.arange(12) // 3, [0, 0, 0]) * 20)[:, None] + np.array([[5, 60, 110]]) * (
    np.arange(12) // 3 % 2)[None, :, None]
RGB = np.broadcast_to(RGB, (12, 12, 3)).astype(np.uint8)  # eight colours, well apart
GREY = (RGB @ [0.299, 0.587, 0.114])  # ITU-R 601, as PIL and TensorFlow have it
ALPHA = np.linspace(0, 255, 144).reshape(12, 12).astype(np.uint8)


def over_white(colour):
    alpha = ALPHA.reshape(12, 12, *(1,) * (colour.ndim - 2)) / 255
    return alpha * colour + (1 - alpha) * 255


def image_file(image, kind="png", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return io.BytesIO(out.getvalue())


def pil(array, mode=None):
    image = PIL.Image.fromarray(array)
    return image.convert(mode) if mode else image


def deep(array):
    """16 bits, of which the high byte is the array and the low byte says nothing."""
    return array * np.uint16(256) + np.uint8(255 - array)


def deep_png(array):
    """A PNG of 16 bits a channel, which PIL cannot write."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunk = lambda kind, body: (struct.pack(">I", len(body)) + kind + body
                                + struct.pack(">I", zlib.crc32(kind + body)))
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">IIBBBBB", width, height, 16, colour, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b""))


def with_alpha(array, alpha=ALPHA):
    return np.concatenate([array.reshape(12, 12, -1), alpha[..., None]], -1)


def palette(transparency=None):
    image = pil(RGB).quantize(8)
    options = {} if transparency is None else {"transparency": transparency}
    return image_file(image, **options)


L = GREY.round().astype(np.uint8)
SEE_THROUGH = np.where((RGB == RGB[0, 0]).all(-1, keepdims=True), 255, RGB)
# name: (file, what it shows, by how much formats and roundings may differ from it)
FILES = {
    "RGB png": (lambda: image_file(pil(RGB)), RGB, 0),
    "RGB bmp": (lambda: image_file(pil(RGB), "bmp"), RGB, 0),
    "RGB webp": (lambda: image_file(pil(RGB), "webp", lossless=True), RGB, 0),
    "RGB jpeg": (lambda: image_file(pil(RGB), "jpeg", quality=100, subsampling=0), RGB, 4),
    "RGB of 16 bits": (lambda: deep_png(deep(RGB)), RGB, 0),
    "RGB with a colour that is transparent": (
        lambda: image_file(pil(RGB), transparency=tuple(RGB[0, 0].tolist())), SEE_THROUGH, 0),
    "L": (lambda: image_file(pil(L)), L, 0),
    "L of 16 bits": (lambda: image_file(pil(deep(L))), L, 0),
    "L of 16 bits, by hand": (lambda: deep_png(deep(L)[..., None]), L, 0),
    "L of 16 bits, tiff": (lambda: image_file(pil(deep(L)), "tiff"), L, 0),
    "L of 16 bits, big-endian tiff": (
        lambda: image_file(pil(deep(L).astype(">u2")), "tiff"), L, 0),
    "L of 16 bits, ppm, which PIL opens as I": (
        lambda: image_file(pil(deep(L)), "ppm"), L, 0),
    "I": (lambda: image_file(pil(deep(L).astype(np.int32)), "tiff"), L, 0),
    "F": (lambda: image_file(pil((L / 255).astype(np.float32)), "tiff"), L, 0),
    "1": (lambda: image_file(pil(L > 80)), (L > 80) * 255, 0),
    "P": (palette, RGB, 0),
    "P gif": (lambda: image_file(pil(RGB), "gif"), RGB, 0),
    "P of two pictures": (lambda: image_file(pil(RGB), "gif", save_all=True, append_images=[
        pil(255 - RGB)]), RGB, 0),
    "P with alphas": (lambda: palette(bytes(range(255, 255 - 8, -1))), RGB, 8),
    "RGBA, opaque": (lambda: image_file(pil(with_alpha(RGB, 0 * ALPHA + 255))), RGB, 0),
    "RGBA": (lambda: image_file(pil(with_alpha(RGB))), over_white(RGB), 1),
    "RGBA of 16 bits": (lambda: deep_png(deep(with_alpha(RGB))), over_white(RGB), 1),
    "LA": (lambda: image_file(pil(with_alpha(L))), over_white(L), 1),
    "LA of 16 bits": (lambda: deep_png(deep(with_alpha(L))), over_white(L), 1),
    "PA": (lambda: image_file(pil(with_alpha(RGB), "PA"), "tiff"), None, 0),
    "CMYK": (lambda: image_file(pil(RGB, "CMYK"), "tiff"), RGB, 1),
    "CMYK jpeg": (lambda: image_file(pil(RGB, "CMYK"), "jpeg", quality=100), RGB, 4),
    "YCbCr": (lambda: image_file(pil(RGB, "YCbCr"), "tiff"), RGB, 2)}


def grey_or_colours(want, channels):
    want = np.asarray(want, np.float64)
    if want.ndim == 2:
        return np.repeat(want[..., None], channels, -1)
    return want if channels == 3 else (want @ [0.299, 0.587, 0.114])[..., None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_image_files_of_every_kind_are_read_alike(prepare, monkeypatch, name, channels):
    """The file that is odd stands among ordinary ones, with and without OpenCV."""
    from tensorflow_datasets.core.features import image_feature
    monkeypatch.setattr(image_feature, "cv2", None)
    make, want, atol = FILES[name]
    if want is None:  # PA: whatever its palette became, as PIL shows it
        shown = PIL.Image.open(make()).convert("RGBA")
        white = PIL.Image.new("RGBA", (12, 12), "white")
        want = np.asarray(PIL.Image.alpha_composite(white, shown))[..., :3]
    rows = [{"image": make()}, {"image": image_file(pil(RGB))}]
    path = prepare(lambda f: {"image": f.Image(shape=(None, None, channels))}, rows)
    got = data.open_source(path, "train", image_size=12)
    assert got.image_shape == (12, 12, channels)
    image = got.read(got.ids)["image"].astype(float)
    assert image.shape == (2, 12, 12, channels)
    odd, plain = grey_or_colours(want, channels), grey_or_colours(RGB, channels)
    errors = [np.abs(image - x).max((1, 2, 3)) for x in (odd, plain)]
    # TFDS shuffles, so either may come first
    assert min(max(errors[0][0], errors[1][1]), max(errors[0][1], errors[1][0])) <= atol + (
        channels == 1), [e.tolist() for e in errors]


TENSORS = {
    "uint8 [H, W]": (L, L), "uint8 [H, W, 1]": (L[..., None], L), "uint8 [H, W, 3]": (RGB, RGB),
    "uint8 [H, W, 2]": (with_alpha(L), over_white(L)),
    "uint8 [H, W, 4]": (with_alpha(RGB), over_white(RGB)),
    "uint16": (deep(RGB), RGB), "uint16 [H, W]": (deep(L), L),
    "float32": ((RGB / 255).astype(np.float32), RGB), "float64": (RGB / 255, RGB),
    "float32, rounded up": ((np.maximum(RGB - 0.4, 0) / 255).astype(np.float32), RGB),
    "float32, rounded down": (((RGB + 0.4) / 255).astype(np.float32), RGB),
    "float32 [H, W]": ((L / 255).astype(np.float32), L), "int32": (RGB.astype(np.int32), RGB),
    "int64 [H, W]": (L.astype(np.int64), L), "int8": ((RGB // 2).astype(np.int8), RGB // 2),
    "uint32": (RGB.astype(np.uint32), RGB),
    "bool": (L > 80, (L > 80) * 255), "bool [H, W, 1]": ((L > 80)[..., None], (L > 80) * 255)}


@pytest.mark.parametrize("encoding", ["none", "zlib"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_every_dtype_and_rank_are_read_alike(prepare, name, encoding):
    array, want = TENSORS[name]
    shape = (None, None, *array.shape[2:]) if encoding == "zlib" else array.shape
    path = prepare(lambda f: {"image": f.Tensor(shape=shape, dtype=array.dtype, encoding=encoding)},
                   [{"image": array}])
    source = data.open_source(path, "train", image_size=12 * (encoding == "zlib"))
    channels = 1 if array.shape[2:] in ((), (1,), (2,)) else 3
    assert source.image_shape == (12, 12, channels)
    np.testing.assert_allclose(source.read(source.ids)["image"][0], grey_or_colours(want, channels),
                               atol=1 if array.shape[2:] in ((2,), (4,)) else 0)


def test_float_images_that_tfds_stores_as_png(prepare):
    values = (L / 255).astype(np.float32)
    stored = image_file(PIL.Image.fromarray(values[..., None].view(np.uint8), "RGBA"))
    path = prepare(lambda f: {"image": f.Tensor(shape=(), dtype=np.object_)},
                   [{"image": stored.getvalue()}])
    features = Path(path, "features.json")
    with pytest.raises(ValueError, match=r"\A--dataset=.*image.*\Z"):  # text is no image
        data.open_source(path, "train")
    import tensorflow_datasets as tfds
    tfds.features.FeaturesDict({"image": tfds.features.Image(
        shape=(12, 12, 1), dtype=np.float32)}).save_config(features.parent)
    source = data.open_source(path, "train")
    np.testing.assert_array_equal(source.read(source.ids)["image"][0, ..., 0], L)


def tensor(array, shape=None, **options):
    return (lambda f: f.Tensor(shape=shape or array.shape, dtype=array.dtype, **options)), array


REFUSED = {
    "float32 from -1 to 1": (*tensor((RGB / 127.5 - 1).astype(np.float32)), "-1.0"),
    "float32 of bytes": (*tensor(RGB.astype(np.float32)), "from 0 to 1"),
    "not a number": (*tensor(np.full((12, 12), np.nan, np.float32)), "nan"),
    "int32 beyond a byte": (*tensor(RGB.astype(np.int32) * 3), "from 0 to 255"),
    "int64 below 0": (*tensor(RGB.astype(np.int64) - 1), "from -1"),
    "uint16 of 8 bits": (*tensor(RGB.astype(np.uint16)), "16-bit"),
    "uint16 of 12 bits": (*tensor(L * np.uint16(16)), "16-bit"),
    "a file of 12 bits": ((lambda f: f.Image(shape=(12, 12, 1))),
                          deep_png((L * np.uint16(16))[..., None]), "16-bit"),
    "rank 1": (*tensor(RGB.ravel()), "height"), "rank 4": (*tensor(RGB[None]), "height"),
    "channels first": (*tensor(np.moveaxis(RGB, 2, 0)), "height"),
    "five channels": (*tensor(np.zeros((12, 12, 5), np.uint8)), "height"),
    "five channels, unsaid": (*tensor(np.zeros((12, 12, 5), np.uint8), (None,) * 3,
                                      encoding="zlib"), "height"),
    "several pictures": ((lambda f: f.Sequence(f.Image(shape=(12, 12, 3)))),
                         [image_file(pil(RGB))], "height"),
    "a video's feature": ((lambda f: f.Image(shape=(None, 12, 12, 3))), image_file(pil(RGB)),
                          "height"),
    "a text": ((lambda f: f.Text()), "a picture", "height"),
    "no image file": ((lambda f: f.Image(shape=(12, 12, 3))), io.BytesIO(b"<html>"), "example 0"),
    "floats in a file": ((lambda f: f.Image(shape=(12, 12, 1))),
                         image_file(pil(L.astype(np.float32)), "tiff"), "from 0 to 1"),
    "32 bits in a file": ((lambda f: f.Image(shape=(12, 12, 1))),
                          image_file(pil(L.astype(np.int32) * 1000), "tiff"), "from 0 to 255"),
    "another size than said": ((lambda f: f.Image(shape=(12, 12, 3))),
                               image_file(pil(RGB[:11])), "11 x 12 pixels")}


@pytest.mark.parametrize("name", REFUSED)
def test_images_without_a_reading_are_refused_when_the_set_is_opened(prepare, name):
    feature, stored, word = REFUSED[name]
    path = prepare(lambda f: {"image": feature(f)}, [{"image": stored}])
    with pytest.raises(ValueError, match=r"\A--(dataset|split)=.*\Z") as error:
        data.open_source(path, "train", image_size=0 if name == "another size than said" else 12)
    assert word in str(error.value) and path in str(error.value), error.value


def test_opencv_is_never_asked_and_nothing_is_said(labelled, monkeypatch, caplog):
    from tensorflow_datasets.core.features import image_feature
    for installed in (None, object()):  # TFDS would warn without it, and call it with it
        monkeypatch.setattr(image_feature, "cv2", installed)
        with caplog.at_level("INFO"):
            source = data.open_source(labelled, "train", need=("label",))
            source.read(source.ids)
    assert not [r.getMessage() for r in caplog.records if r.levelname != "INFO"]


# ------------------------------------------------------------- what is wrong with single examples


def broken(prepare, **fields):
    """A set of 40 examples, and some whose fields are as given."""
    def rows():
        for i in range(40):
            yield {"image": png(np.full((8, 8, 3), i, np.uint8)), "caption": f"number {i}"}
        yield {"image": png(np.zeros((8, 8, 3), np.uint8)), "caption": "odd", **fields}
    return prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)), "caption": f.Text()}, list(rows()))


NOISE_PNG = png(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).getvalue()


@pytest.mark.parametrize("fields, words", [
    ({"image": io.BytesIO(NOISE_PNG[:-60])}, ("image of example",)),
    ({"image": io.BytesIO(b"")}, ("image of example",)),
    ({"image": io.BytesIO(NOISE_PNG[:60] + b"\xff" * 9 + NOISE_PNG[69:])}, ("image of example",)),
    ({"caption": b"caf\xe9"}, ("caption of example", "utf-8")),
    ({"caption": b"\xff\xfea\0"}, ("caption of example", "utf-8"))])
def test_one_broken_example_is_named_in_one_line(prepare, monkeypatch, fields, words):
    path = broken(prepare, **fields)
    monkeypatch.setattr(prepared.Split, "check_images", lambda self: None)  # it may look at it
    source = data.open_source(path, "train", context=8)
    healthy = []
    for i in source.ids:
        try:
            healthy.append(source.read(source.ids[i:i + 1])["image"][0, 0, 0, 0])
        except ValueError as e:
            number, message = i, str(e)
    assert len(healthy) == 40
    stream = data.sweep(data.Pool(source), 41)
    with pytest.raises(ValueError) as error:
        list(stream)
    assert str(error.value) == message and "\n" not in message and error.value.__suppress_context__
    for word in (*words, f"example {number}:", "--split=train", path):
        assert word in message, message


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"",
                                    lambda b: b[:200] + bytes(200) + b[400:]])
def test_a_broken_shard_is_one_line(labelled, tmp_path, damage):
    path = shutil.copytree(labelled, tmp_path / "tiny" / "1.0.0")
    (shard,) = path.glob("*train*array_record*")
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=r"\A--(dataset|split)=.*\Z") as error:
        data.open_source(str(path), "train")
    assert str(path) in str(error.value)
    data.open_source(str(path), "test")
    shard.unlink()
    with pytest.raises(ValueError, match=r"\A--(dataset|split)=.*\Z"):
        data.open_source(str(path), "train")


@pytest.mark.parametrize("labels, words", [
    ([-1] * 6, "its labels are -1, it is not labelled; choose another"),
    ([0, 1, 2, -1, 1, -1], "2 of 6 labels are not from 0 to 2"),
    ([0, 1, 2, 0, 1, 7], "1 of 6 labels are not from 0 to 2"),
    ([3, 3, 3, 3, 3, 3], "6 of 6 labels are not from 0 to 2")])
def test_labels_that_name_no_class_are_refused_before_any_work(prepare, caplog, labels, words):
    rows = [{"image": png(np.full((8, 8, 3), i, np.uint8)), "label": label}
            for i, label in enumerate(labels)]
    path = prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)),
                              "label": f.ClassLabel(num_classes=9)}, rows, rows[:1])
    import tensorflow_datasets as tfds
    tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3)),
                                "label": tfds.features.ClassLabel(num_classes=3)}
                               ).save_config(path)  # as where a file of class names has lost some
    with pytest.raises(ValueError, match=rf"\A--eval_split=train: {words}.*\Z"):
        data.open_source(path, "train", need=("label",), flags=("dataset", "eval_split"))
    with caplog.at_level("WARNING"):  # who does not need them gets none, and is told
        source = data.open_source(path, "train", flags=("dataset", "eval_split"))
    assert "label" not in source.read(source.ids) and source.class_names == ()
    assert "left out" in caplog.text and "--eval_split=train" in caplog.text
    assert source.describe([0]) == [""]


def test_only_the_part_that_is_used_must_be_labelled(prepare):
    rows = [{"image": png(np.zeros((8, 8, 3), np.uint8)), "label": -1}] * 3 + [
        {"image": png(np.ones((8, 8, 3), np.uint8)), "label": 1}] * 3
    path = prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)),
                              "label": f.ClassLabel(num_classes=3)}, rows)
    label = [int(row["label"]) for row in unchecked(path)]
    good = [i for i in range(6) if label[i] == 1]
    for i in range(6):
        if i in good:
            data.open_source(path, f"train[{i}:{i + 1}]", need=("label",))
        else:
            with pytest.raises(ValueError, match="not labelled"):
                data.open_source(path, f"train[{i}:{i + 1}]", need=("label",))


def unchecked(path):
    import tensorflow_datasets as tfds
    return tfds.builder_from_directory(path).as_data_source(split="train")


def test_labels_that_were_not_looked_at_are_refused_when_they_are_read(prepare, monkeypatch):
    rows = [{"image": png(np.full((8, 8, 3), i, np.uint8)), "label": -1 if i == 7 else 1}
            for i in range(40)]
    path = prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)),
                              "label": f.ClassLabel(num_classes=3)}, rows)
    number = [int(row["label"]) for row in unchecked(path)].index(-1)
    monkeypatch.setattr(prepared.Split, "find_wrong", lambda self, ids, label: "")
    source = data.open_source(path, "train", need=("label",))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"\A--split=train: .* example {number};.*\Z"):
        source.read(source.ids)


@pytest.mark.parametrize("feature, value", [
    (lambda f: f.Text(), "a dog"), (lambda f: f.Scalar(np.int64), 3),
    (lambda f: f.Sequence(f.ClassLabel(num_classes=3)), [0, 2]),
    (lambda f: f.Tensor(shape=(2,), dtype=np.float32), np.zeros(2, np.float32))])
def test_a_label_that_is_no_class_is_left_out(prepare, feature, value):
    rows = [{"image": png(np.zeros((8, 8, 3), np.uint8)), "caption": "a cat", "label": value}]
    path = prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)), "caption": f.Text(),
                              "label": feature(f)}, rows)
    source = data.open_source(path, "train", context=9, need=("caption",))
    assert set(source.read(source.ids)) == {"image", "tokens", "caption_hash"}
    assert source.class_names == () and source.describe([0]) == ["a cat"]
    with pytest.raises(ValueError, match=r"\A--dataset=.*not a class.*\Z"):
        data.open_source(path, "train", need=("label",))


@pytest.mark.parametrize("feature, value", [
    (lambda f: f.Scalar(np.int64), 3), (lambda f: f.ClassLabel(num_classes=4), 3),
    (lambda f: f.Sequence({"id": f.Scalar(np.int64)}), [{"id": 1}])])
def test_a_caption_that_is_no_text_is_none(prepare, feature, value):
    rows = [{"image": png(np.zeros((8, 8, 3), np.uint8)), "caption": value}]
    path = prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)), "caption": feature(f)}, rows)
    with pytest.raises(ValueError, match=r"\A--dataset=.*no feature 'caption'.*\Z"):
        data.open_source(path, "train", context=9, need=("caption",))


# -------------------------------------------------------------------------------- fingerprints


def numbered(prepare, change=lambda rows: rows, names=("a", "b", "c")):
    rows = [{"image": png(np.full((8, 8, 3), i, np.uint8)), "label": i % 3,
             "caption": f"number {i}"} for i in range(30)]
    return prepare(lambda f: {"image": f.Image(shape=(8, 8, 3)), "caption": f.Text(),
                              "label": f.ClassLabel(names=list(names))}, change(rows), rows[:3])


CHANGES = {
    "one label": lambda rows: rows[:9] + [{**rows[9], "label": 1}] + rows[10:],
    "two labels for each other": lambda rows: [
        {**rows[0], "label": 1}, {**rows[1], "label": 0}] + rows[2:],
    "one caption": lambda rows: [{**rows[0], "caption": "nUmber 0"}] + rows[1:],
    "one pixel": lambda rows: [{**rows[0], "image": png(
        np.pad(np.zeros((8, 7, 3), np.uint8), ((0, 0), (0, 1), (0, 0)), constant_values=1))}]
    + rows[1:],
    "one example more": lambda rows: rows + rows[:1],
    "one example less": lambda rows: rows[1:]}


@pytest.mark.parametrize("scan_bytes", [2**31, 100], ids=["whole", "sampled"])
def test_a_fingerprint_changes_with_the_records_alone(prepare, monkeypatch, tmp_path, scan_bytes):
    monkeypatch.setattr(prepared, "SCAN_BYTES", scan_bytes)
    path = numbered(prepare)
    of = lambda path, split="train", **how: data.open_source(path, split, **how).fingerprint
    base = of(path)
    moved = shutil.copytree(path, tmp_path / "elsewhere" / "tiny" / "1.0.0")
    assert base == of(str(moved)) == of(numbered(prepare)) == of(path, image_size=4, context=9)
    fingerprints = [base, of(path, "test"), of(path, "train[:29]"),
                    of(numbered(prepare, names=("a", "b", "d")))]
    fingerprints += [of(numbered(prepare, change)) for change in CHANGES.values()]
    assert len(set(fingerprints)) == len(fingerprints)
    assert data.Pool(data.open_source(path, "train")).identity() != data.Pool(data.open_source(
        numbered(prepare, CHANGES["one label"]), "train")).identity()


def test_of_a_large_split_sizes_and_ten_thousand_records_are_looked_at(labelled, monkeypatch):
    seen = []
    records = prepared.Split.records
    monkeypatch.setattr(prepared.Split, "records",
                        lambda self, ids: seen.extend(ids) or records(self, ids))
    monkeypatch.setattr(prepared.Split, "check_images", lambda self: None)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    part = lambda: prepared.Split(labelled, "train", data_dir=None, image_size=0, captions=False,
                                  need=(), flags=("dataset", "split"))
    part()
    assert sorted(seen) == list(range(20))
    seen.clear()
    spread = prepared.spread
    monkeypatch.setattr(prepared, "SCAN_BYTES", 0)
    monkeypatch.setattr(prepared, "spread", lambda ids, n: n == 10_000 and spread(ids, 5))
    part()
    np.testing.assert_array_equal(seen, [0, 4, 9, 14, 19])


def test_of_a_large_split_a_longer_record_is_seen_wherever_it_stands(prepare, monkeypatch):
    monkeypatch.setattr(prepared, "SCAN_BYTES", 0)
    monkeypatch.setattr(prepared, "spread", lambda ids, n: ids[:1])  # one is looked at
    path = numbered(prepare)
    first = int(unchecked(path)[0]["caption"].split()[1])
    other = (first + 7) % 30
    longer = numbered(prepare, lambda rows: [
        {**row, "caption": row["caption"] * 1000 ** (i == other)} for i, row in enumerate(rows)])
    a, b = (data.open_source(p, "train").fingerprint for p in (path, longer))
    assert a != b


def test_toys_fingerprint_changes_with_its_knobs_and_its_code(monkeypatch):
    source = lambda split="train", image_size=8, **knobs: data.open_source(
        "toy", split, image_size=image_size, toy_knobs={"n": 20, **knobs}).fingerprint
    base = source()
    assert source() == base
    others = [source("test"), source(seed=3), source(tail=0.5), source(image_size=9)]
    monkeypatch.setitem(toy.TONES, "black", (16, 15, 15))  # a change of the code
    others.append(source())
    monkeypatch.undo()
    monkeypatch.setattr(toy, "TEMPLATES", toy.TEMPLATES[:4] + (toy.TEMPLATES[3],))
    others.append(source())
    assert len({base, *others}) == 1 + len(others)


# ---------------------------------------------------------------------------------------- paths


def test_a_tilde_is_the_home_directory(labelled, monkeypatch, tmp_path):
    home = Path(labelled).parents[1]
    monkeypatch.setenv("HOME", str(home))
    short = "~/" + str(Path(labelled).relative_to(home))
    assert len(data.open_source(short, "train").ids) == 20
    with pytest.raises(ValueError, match=r"\A--dataset=~/nowhere: no such directory\Z"):
        data.open_source("~/nowhere", "train")
    with pytest.raises(ValueError, match="not prepared under " + re.escape(f"{home}/there/mnist")):
        data.open_source("mnist", "train", data_dir="~/there")


# ---------------------------------------------------------------------------------------- toy


def test_toy_opens_both_splits():
    train = data.open_source("toy", "train", image_size=8, context=90, toy_knobs={"n": 40})
    test = data.open_source("toy", "test", image_size=8, toy_knobs={"n": 40})
    assert len(train.ids) == 40 and len(test.ids) == 2000
    got, world = train.read(np.array([7, 3])), toy.world(40, image_size=8)
    for k in ("image", "label", "duplicate", "hopeless"):
        np.testing.assert_array_equal(got[k], world[k][[7, 3]])
    np.testing.assert_array_equal(got["tokens"][1], data.tokenize(world["caption"][3], 90))
    assert train.describe([3]) == [world["caption"][3]]
    assert train.class_names == test.class_names == toy.class_names(0)
    clean = test.read(test.ids)
    assert "tokens" not in clean and not (clean["duplicate"] | clean["hopeless"]).any()
    assert test.describe([5]) == [toy.class_names(0)[clean["label"][5]]]
    count = np.bincount(clean["label"], minlength=30)
    assert count.min() > 0.5 * count.mean()  # balanced, whatever the tail of the training pool
    # other examples than those of a training pool that is as large, clean and balanced
    twin = data.open_source("toy", "train", image_size=8, toy_knobs={
        "n": 2000, "tail": 0.0, "duplicates": 0.0, "hopeless": 0.0})
    assert not (clean["image"] == twin.read(twin.ids)["image"]).all((1, 2, 3)).any()


def test_toy_pools_are_told_apart():
    source = lambda **knobs: data.open_source("toy", "train", image_size=8,
                                              toy_knobs={"n": 20, **knobs})
    pools = [data.Pool(source()), data.Pool(source(), noise=0.5),
             data.Pool(source(), noise=0.5, seed=1), data.Pool(source(tail=0.0)),
             data.Pool(source(n=21)), data.Pool(source(hopeless=0.1)),
             data.Pool(data.open_source("toy", "test", image_size=8))]
    assert len({p.identity() for p in pools}) == len(pools)
    assert data.Pool(source()).identity() == pools[0].identity()


def test_a_fingerprint_is_the_same_in_every_process(prepared):
    """TFDS lists the features in an order that the process's hash seed decides."""
    code = ("from common import prepared; print(prepared.Split({!r}, 'train', data_dir=None, "
            "image_size=16, captions=True, need=('caption',), flags=('dataset', 'split')"
            ").fingerprint)").format(str(prepared["captioned"]))
    prints = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                             check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
              for seed in ("1", "2", "3", "4")}
    assert len(prints) == 1 and len(prints.pop().strip()) == 64
