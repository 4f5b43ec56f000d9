"""Examples by id, batches by (seed, step), planted noise whose truth is right, tokens, prefetch."""

import io
import itertools
import shutil
import threading
import time

import numpy as np
import PIL.Image
import pytest

from common import data, toy


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


@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 4), (7, 20), (5, 1), (1, 3)])
def test_epochs_are_without_replacement(n, batch_size):
    ids = np.arange(100, 100 + 3 * n, 3)
    steps = -(-6 * n // batch_size)
    stream = np.concatenate([data.batch_ids(ids, 0, s, batch_size) for s in range(steps)])
    assert stream.dtype == ids.dtype and len(stream) == steps * batch_size
    for e in range(6):
        np.testing.assert_array_equal(np.sort(stream[e * n:(e + 1) * n]), ids)


def test_every_epoch_and_seed_has_its_own_order():
    ids = np.arange(50)
    orders = {tuple(data.batch_ids(ids, seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16 and tuple(ids) not in orders


def test_a_batch_is_a_function_of_seed_and_step_alone():
    ids = np.arange(37)
    want = {(seed, step): data.batch_ids(ids, seed, step, 8) for seed in (0, 1) for step in range(30)}
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
    assert list(data.prefetch(lambda i: together.wait() * 0 + i, range(4), threads=2)) == [0, 1, 2, 3]


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


# ------------------------------------------------------------------------------------- tokens


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


def test_fit_leaves_alone_what_fits():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert data._fit(image, 8) is image and data._fit(image, 0) is image


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_fit_cuts_the_middle_of_an_oblong(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    want = image[:, 4:12] if shape == (8, 16) else image[4:12]  # the short side fits: no resizing
    np.testing.assert_array_equal(data._fit(image, 8), want)


def test_fit_resizes_without_turning_or_stretching():
    v, u = np.mgrid[0:24, 0:40]
    image = np.stack([4 * v, 4 * u, np.full_like(u, 9)], -1).astype(np.uint8)
    got = data._fit(image, 6).astype(float)  # 24 x 40 -> 6 x 10 -> the middle 6 x 6
    assert got.shape == (6, 6, 3)
    inner = slice(1, 5)  # bicubic bends at the border
    np.testing.assert_allclose(got[inner, 2, 0], 4 * (4 * np.arange(1, 5) + 1.5), atol=1.5)
    np.testing.assert_allclose(got[2, :, 1], 4 * (4 * (np.arange(6) + 2) + 1.5), atol=1.5)
    assert (got[..., 2] == 9).all()


def test_fit_always_gives_a_square():
    for height, width, side in itertools.product((1, 5, 7, 23), (3, 5, 18), (1, 4, 7)):
        for channels in (1, 3):
            image = np.full((height, width, channels), 77, np.uint8)
            got = data._fit(image, side)
            assert got.shape == (side, side, channels) and got.dtype == np.uint8
            assert (got == 77).all()


# --------------------------------------------------------------------------------------- TFDS


def png(array):
    """A file object: arrays themselves would be encoded by TensorFlow."""
    out = io.BytesIO()
    PIL.Image.fromarray(array.squeeze()).save(out, "png")
    out.seek(0)
    return out


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """prepare(features, rows of 'train', rows of 'test') -> the path of a prepared set."""
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
            yield from enumerate(rows)

    def prepared(*content):
        Tiny.content = content
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
    assert [source.describe(i) for i in source.ids] == ["abc"[i % 3] for i in number]
    test = data.open_source(labelled, "test", image_size=4, context=9)  # it has no caption: no tokens
    assert test.image_shape == (4, 4, 3) and set(test.read(test.ids)) == {"image", "label"}
    np.testing.assert_array_equal(np.sort(test.read(test.ids)["image"][:, 3, 3, 0]), np.arange(20, 24))


def test_a_sub_split_keeps_the_ids_of_the_whole(labelled):
    whole = data.open_source(labelled, "train")
    for split, ids in (("train[50%:]", range(10, 20)), ("train[:25%]", range(5)),
                       ("train[5:7]", (5, 6)), ("train[-3:]", (17, 18, 19))):
        part = data.open_source(labelled, split)
        np.testing.assert_array_equal(part.ids, list(ids))
        got, want = part.read(part.ids[::-1]), whole.read(part.ids[::-1])
        for k in want:
            np.testing.assert_array_equal(got[k], want[k])
        assert part.describe(part.ids[0]) == whole.describe(part.ids[0])


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
    assert set(got) == {"image", "tokens"} and got["tokens"].shape == (3, 12)
    for i, number in enumerate(got["image"][:, 0, 0, 0]):
        np.testing.assert_array_equal(got["tokens"][i], data.tokenize(texts[number], 12))
        assert source.describe(source.ids[i]) == texts[number]
    with pytest.raises(ValueError, match="--image_size"):  # of no one size
        data.open_source(path, "train")
    with pytest.raises(ValueError, match="no feature 'label'"):
        data.open_source(path, "train", image_size=6, need=("label",))


@pytest.mark.parametrize("keywords, words", [
    ({"need": ("caption",)}, ("--dataset", "'caption'", "--task")),
    ({"split": "val"}, ("split", "'val'", "train, test")),
    ({"split": "train[:0]"}, ("split", "'train[:0]'", "no example")),
    ({"split": "train[:10%]+test"}, ("split", "'train[:10%]+test'")),
    ({"dataset": "/nowhere/at/all"}, ("--dataset=/nowhere/at/all", "no such directory")),
    ({"dataset": "."}, ("--dataset=.",)),
    ({"dataset": "no_such_data_set"}, ("--dataset=no_such_data_set",)),
    ({"dataset": "mnist"}, ("--dataset=mnist", "not prepared", "pip install", "--data_dir")),
    ({"dataset": "toy", "split": "val"}, ("split", "'val'", "train, test")),
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
            f.Text() if kind == "none" else {"id": f.Scalar(np.int64), "text": f.Text()})}, rows, rows)
    source = data.open_source(path, "train", context=9)
    assert source.describe(0) == ("" if kind == "none" else "a dog")


# ---------------------------------------------------------------------------------------- toy


def test_toy_opens_both_splits():
    train = data.open_source("toy", "train", image_size=8, context=90, toy_knobs={"n": 40})
    test = data.open_source("toy", "test", image_size=8, toy_knobs={"n": 40})
    assert len(train.ids) == 40 and len(test.ids) == 2000
    got, world = train.read(np.array([7, 3])), toy.world(40, image_size=8)
    for k in ("image", "label", "duplicate", "hopeless"):
        np.testing.assert_array_equal(got[k], world[k][[7, 3]])
    np.testing.assert_array_equal(got["tokens"][1], data.tokenize(world["caption"][3], 90))
    assert train.describe(3) == world["caption"][3]
    assert train.class_names == test.class_names == toy.CLASSES
    clean = test.read(test.ids)
    assert "tokens" not in clean and not (clean["duplicate"] | clean["hopeless"]).any()
    assert test.describe(5) == toy.CLASSES[clean["label"][5]]
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
