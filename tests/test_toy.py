"""The toy world holds exactly what it says it holds."""

import numpy as np
import pytest

from common import toy

SMALL = dict(image_size=16)
RANK_OF_CLASS = np.random.default_rng(0).permutation(30)


def distances(queries, images):
    """Root mean square difference of pixels, in grey levels -> [queries, images]."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) for x in (queries, images))
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0) / a.shape[1])


def neighbour_correlation(images):
    """Correlation of horizontally adjacent pixels, over each image's own mean -> [images]."""
    x = images.astype(np.float64) - images.mean((1, 2), keepdims=True)
    return (x[:, :, 1:] * x[:, :, :-1]).mean((1, 2, 3)) / (x**2).mean((1, 2, 3))


def test_shapes_and_types():
    for image_size in (32, 20):
        data = toy.world(7, image_size=image_size)
        assert data["image"].shape == (7, image_size, image_size, 3)
        assert data["image"].dtype == np.uint8 and data["label"].dtype == np.int32
        assert data["duplicate"].dtype == data["hopeless"].dtype == bool
        assert len(data["caption"]) == len(data["label"]) == 7
        assert all(type(caption) is str for caption in data["caption"])
    for domains, n_classes in ((0, 30), (5, 30), (30, 180)):
        names = toy.class_names(domains)
        assert len(names) == len(set(names)) == n_classes


def test_a_seed_is_a_world():
    one, same, other = (toy.world(300, seed=seed, **SMALL) for seed in (3, 3, 4))
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
        assert not np.array_equal(one[name], other[name])


@pytest.mark.parametrize("n, duplicates, hopeless", [(1, 0, 0), (333, 0.1, 0.05), (50, 0.5, 0.47)])
def test_fractions_are_exact_and_disjoint(n, duplicates, hopeless):
    data = toy.world(n, duplicates=duplicates, hopeless=hopeless, **SMALL)
    assert data["duplicate"].sum() == round(duplicates * n)
    assert data["hopeless"].sum() == round(hopeless * n)
    assert not (data["duplicate"] & data["hopeless"]).any()


def test_duplicates_are_near_copies_of_ordinary_examples():
    data = toy.world(600, seed=5, duplicates=0.3)
    caption, label = np.array(data["caption"]), data["label"]
    copies = np.flatnonzero(data["duplicate"])
    ordinary = np.flatnonzero(~data["duplicate"] & ~data["hopeless"])
    distance = distances(data["image"][copies], data["image"][ordinary])
    source = ordinary[distance.argmin(1)]
    assert (caption[source] == caption[copies]).all() and (label[source] == label[copies]).all()
    # Fresh noise alone, of 6 levels, is 6 * sqrt(2) = 8.5 apart: near, but never identical.
    assert distance.min() > 7 and np.median(distance.min(1)) < 0.4 * np.median(distance)
    # The originals have a heavy tail, and no two ordinary examples are near.
    counts = np.unique(source, return_counts=True)[1]
    assert counts.max() >= 10 and np.median(counts) <= 2
    among = distances(data["image"][ordinary], data["image"][ordinary])
    np.fill_diagonal(among, np.inf)
    assert np.median(among.min(1)) > 1.5 * np.median(distance.min(1))


@pytest.mark.parametrize("tail", [0, 1, 1.7])
def test_class_histogram(tail):
    n = 8_000
    label = toy.world(n, seed=6, tail=tail, duplicates=0, hopeless=0, image_size=8)["label"]
    count = np.bincount(label, minlength=30)
    p = np.arange(1, 31.0) ** -tail
    expected = n * p / p.sum()
    chi_square = ((count - expected[RANK_OF_CLASS]) ** 2 / expected[RANK_OF_CLASS]).sum()
    assert chi_square < 58  # 29 degrees of freedom: one seed in a thousand exceeds 58.3
    assert tail == 0 or count.argmax() == RANK_OF_CLASS.argmin() != 0


def test_test_world_ranks_the_classes_alike():
    train, test = (np.bincount(toy.world(4_000, seed=seed, image_size=8)["label"], minlength=30)
                   for seed in (7, 8))
    assert np.corrcoef(train, test)[0, 1] > 0.9


def test_captions_name_the_class():
    data = toy.world(2_000, **SMALL)
    for caption, label in zip(data["caption"], data["label"]):
        words = caption.replace(",", " ").replace(":", " ").split()
        colour, shape = toy.class_names(0)[label].split()
        assert colour in words and shape in words[words.index(colour):]
        assert not (set(toy.COLOURS) - {colour}) & set(words), caption
        assert caption.isascii() and "  " not in caption and "{" not in caption
    lengths = [len(caption) for caption in data["caption"]]
    assert np.median(lengths) <= 64 and len(set(data["caption"])) > 1_500


def test_no_caption_can_exceed_80_characters():
    def longest(names):
        return list(names).index(max(names, key=len))

    scene = {"size": 1, "place": longest(toy.PLACES), "colour": longest(toy.COLOURS),
             "shape": longest(toy.SHAPES), "ground": longest(toy.GROUNDS),
             "ground_colour": longest(toy.GROUND_COLOURS), "other": True,
             "tone": longest(toy.TONES), "other_shape": longest(toy.SHAPES)}
    n = len(toy.TEMPLATES)
    scene = {name: np.full(n, value) for name, value in scene.items()}
    captions = toy.describe({**scene, "template": np.arange(n)})
    assert all("medium" in caption for caption in captions)
    assert max(map(len, captions)) <= 80


def test_captions_are_true_of_the_pixels():
    """Where the class's colour is: how wide, and in which part of the picture."""
    data = toy.world(400, seed=2, duplicates=0, hopeless=0)
    grid = (np.arange(32) + 0.5) / 32
    palette = np.array(list(toy.COLOURS.values()), np.float32)
    for image, caption, label in zip(data["image"], data["caption"], data["label"]):
        difference = image.astype(np.float32) - palette[label % len(palette)]
        ink = np.linalg.norm(difference, axis=-1) < 55
        assert ink.sum() > 15, caption
        x, y = np.median(grid[ink.nonzero()[1]]), np.median(grid[ink.nonzero()[0]])
        for word, inside in (("left", x < 0.5), ("right", x > 0.5), ("top", y < 0.5),
                             ("bottom", y > 0.5), ("centre", max(abs(x - .5), abs(y - .5)) < 0.2)):
            assert inside or word not in caption, (caption, x, y)
        if "large" in caption or "small" in caption:
            width = np.ptp(grid[ink.any(0).nonzero()[0]])
            assert width > 0.34 if "large" in caption else width < 0.5, (caption, width)
        assert "white" not in caption or (image.min(-1) > 215).sum() >= 3, caption
        assert "black" not in caption or (image.max(-1) < 40).sum() >= 3, caption


def test_the_radius_of_the_objects():
    for radius in (0.2, 0.4):
        data = toy.world(300, radius=radius, tail=0, duplicates=0, hopeless=0)
        palette = np.array(list(toy.COLOURS.values()), np.float32)[data["label"] % 5]
        ink = np.linalg.norm(data["image"] - palette[:, None, None], axis=-1) < 55
        square = data["label"] // 5 == list(toy.SHAPES).index("square")
        # A square of radius 1 has the side 1.52.
        assert ink[square].mean() == pytest.approx((1.52 * radius) ** 2, rel=0.12)
    assert all("large" in caption for caption in data["caption"])


def test_a_class_of_a_domain_is_its_shape_and_its_ground():
    data = toy.world(500, domains=7, radius=0.15, tail=0, duplicates=0, hopeless=0)
    names = toy.class_names(7)
    colours = np.array(list(toy.GROUND_COLOURS.values()), np.float32)
    for image, caption, label in zip(data["image"], data["caption"], data["label"]):
        shape, ground = names[label].split(" on ")
        assert ground in caption and f" {shape}" in caption
        colour = colours[list(toy.GROUND_COLOURS).index(ground.split()[0])]
        middle = np.median(image.reshape(-1, 3), axis=0)
        # The ground's pattern makes it lighter or darker by at most a fifth; the rest is noise.
        assert np.abs(middle / colour - 1).max() < 0.28, caption
    # The object has any colour in every domain, so no colour tells the class.
    used = {(label // 6, caption.split(f" {names[label].split()[0]}")[0].split()[-1])
            for caption, label in zip(data["caption"], data["label"])}
    assert {(d, colour) for d in range(7) for colour in toy.COLOURS} <= used


def test_about_half_of_the_scenes_have_a_distractor():
    data = toy.world(2_000, **SMALL)
    has = [any(f" {tone} " in f" {caption}" for tone in toy.TONES) for caption in data["caption"]]
    assert 0.4 < np.mean(has) < 0.6


def test_hopeless_images_have_no_structure():
    data = toy.world(1_000, hopeless=0.2)
    noise, rest = (data["image"][mask] for mask in (data["hopeless"], ~data["hopeless"]))
    assert np.abs(neighbour_correlation(noise)).max() < 0.1
    assert neighbour_correlation(rest).min() > 0.15
    counts = np.bincount(noise.ravel(), minlength=256)
    np.testing.assert_allclose(counts / counts.mean(), 1, atol=0.1)  # uniform, not grey
    assert distances(noise, noise)[~np.eye(len(noise), dtype=bool)].min() > 90


def test_large_images_show_the_same_scenes():
    small, large = (toy.world(4, image_size=s, duplicates=0, hopeless=0) for s in (32, 224))
    assert small["caption"] == large["caption"]
    pooled = large["image"].reshape(4, 32, 7, 32, 7, 3).mean((2, 4))
    assert np.diag(distances(small["image"], pooled)).max() < 15


@pytest.mark.parametrize("knobs, flag", [
    (dict(n=0), "--toy_examples"), (dict(tail=-1), "--toy_tail"),
    (dict(tail=float("nan")), "--toy_tail"), (dict(tail=float("inf")), "--toy_tail"),
    (dict(duplicates=-0.1), "--toy_duplicates"), (dict(duplicates=1), "--toy_duplicates"),
    (dict(hopeless=1.5), "--toy_hopeless"), (dict(hopeless=float("nan")), "--toy_hopeless"),
    (dict(duplicates=0.6, hopeless=0.4), "--toy_duplicates plus --toy_hopeless"),
    (dict(radius=0.1), "--toy_radius"), (dict(radius=float("nan")), "--toy_radius"),
    (dict(domains=-1), "--toy_domains"), (dict(domains=31), "--toy_domains"),
    (dict(image_size=4), "--image_size")])
def test_bad_knobs_name_their_flag(knobs, flag):
    with pytest.raises(ValueError, match=flag) as error:
        toy.world(**{"n": 10, **knobs})
    assert "\n" not in str(error.value)
