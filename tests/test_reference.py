"""A frozen model: what is accepted as a reference, and what is kept of it."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import data, devices, reference, train, vit
from test_train import RECORD, damage, flip_a_bit, same, trained

ABOUT = {"model": {"image": vit.architecture(vit.ViT("16/1/32/2", 16, 8, 3))}, "tokenizer": "abc"}


def save(path, **changed):
    """A checkpoint of step 3."""
    checkpoints = train.Checkpoints(path)
    totals = vars(train.Totals(step=3, seconds=0.1 + 0.2, flops={"learner": 10**19}))
    checkpoints.save(3, trained(3), {
        **RECORD, "totals": totals, "steps": 3, "about": ABOUT, **changed})
    checkpoints.close()
    return path


@pytest.fixture(scope="module")
def step_three(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoints") / "arm-0")


@pytest.fixture
def saved(step_three, tmp_path):
    return str(shutil.copytree(step_three, tmp_path / "arm-0"))


def load(directory, width=3, about=ABOUT):
    template = jax.eval_shape(lambda: trained(0, width=width)["learner"]["params"])
    return reference.load(directory, template, about)


def test_params_are_restored_without_the_optimiser(saved):
    params, totals = load(saved)
    same(params, jax.device_get(trained(3)["learner"]["params"]))
    assert totals == train.Totals(step=3, seconds=0.1 + 0.2, flops={"learner": 10**19})


def test_all_that_training_a_reference_took_is_an_arm_s_setup():
    totals = train.Totals(step=9, examples_trained=8, seconds=3.0,
                          flops={"reference_training": 5, "selection": 2})
    assert reference.training_as_setup(totals) == train.Totals(
        setup_seconds=3.0, flops={"reference_training": 7})


@pytest.mark.parametrize("how, words", [
    ("size", "another size"), ("missing", "no such"), ("empty", "no checkpoint"),
    ("damaged", "damaged"), ("a bit", "damaged"),
    ("heads", r"another model image size \(\[16, 1, 32, 2\], here it is \[16, 1, 32, 4\]"),
    ("tokenizer", "another tokenizer .abc, here it is xyz")])
def test_what_does_not_fit_is_refused_by_flag(saved, tmp_path, how, words):
    directory = {"missing": str(tmp_path / "nowhere"), "empty": str(tmp_path / "empty")}.get(
        how, saved)
    about = ABOUT
    if how == "empty":
        os.makedirs(directory)
    if how == "heads":  # the same shapes
        about = {**ABOUT, "model": {"image": vit.architecture(vit.ViT("16/1/32/4", 16, 8, 3))}}
    if how == "tokenizer":
        about = {**ABOUT, "tokenizer": "xyz"}
    {"damaged": damage, "a bit": flip_a_bit}.get(how, lambda _: None)(saved)
    with pytest.raises(ValueError, match=words) as error:
        load(directory, 4 if how == "size" else 3, about)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"--reference={directory}: ")
    assert how != "missing" or not os.path.exists(directory)


@pytest.mark.parametrize("changed, words", [
    ({"steps": 5}, "is trained for 3 of its 5 steps: run the command"),
    ({"about": {}}, "no reference but an arm: .*checkpoints/reference-0")])
def test_a_reference_must_be_one_and_be_trained_to_its_end(tmp_path, changed, words):
    directory = str(save(tmp_path / "arm-0", **changed))
    with pytest.raises(ValueError, match=f"^--reference={directory}: .*{words}"):
        load(directory)


def test_a_model_may_be_named_or_given_in_numbers_and_its_dtype_is_no_matter():
    mu = vit.architecture(vit.ViT("mu", 16, 8, 3))
    assert mu == vit.architecture(vit.ViT("32/1/128/2", 16, 8, 3, dtype="bfloat16", remat=True))
    for other in (vit.ViT("32/1/128/4", 16, 8, 3), vit.ViT("mu", 16, 8, 3, pool="map")):
        assert mu != vit.architecture(other)


def pool_of(n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 4, 4, 1), np.uint8)
    return data.Pool(data.Source("own", np.arange(n) * 3, lambda ids: {
        "image": images[ids // 3], "label": (ids // 3 % 2).astype(np.int32)}, fingerprint="f" * 16))


def test_what_a_model_says_comes_in_the_order_of_the_ids():
    pool, n = pool_of(21), jax.device_count()
    forward = devices.pmap(lambda w, batch: {
        k: jax.lax.all_gather(v, devices.AXIS, tiled=True) for k, v in {
            "y": w * batch["image"].astype(jnp.float32).sum((1, 2, 3)),
            "label": batch["label"], "valid": batch["valid"]}.items()}, (None, 0))
    got, seconds = reference.forward_all(np.float32(2), forward, pool, n)  # 21 fill no batches of 8
    assert got.keys() == {"y", "label"} and seconds > 0
    images = pool.read(pool.ids)["image"]
    np.testing.assert_array_equal(got["y"], 2.0 * images.astype(np.float32).sum((1, 2, 3)))
    np.testing.assert_array_equal(got["label"], np.arange(21) % 2)


def test_what_is_kept_is_made_once(tmp_path):
    path, pool = str(tmp_path / "scores.npz"), pool_of(5)
    made_by, made = reference.made_by({"w": np.ones(3)}, pool), []
    def make():
        made.append(1)
        return {"loss": np.arange(5.0)}, 2.5
    for _ in range(2):
        arrays, seconds = reference.cached(path, made_by, make)
        np.testing.assert_array_equal(arrays["loss"], np.arange(5.0))
        assert arrays.keys() == {"loss"} and seconds == 2.5
    assert len(made) == 1 and os.listdir(tmp_path) == ["scores.npz"]


@pytest.mark.parametrize("change, words", [
    ("weights", "made with other weights"), ("ids", "made with other ids"),
    ("data", "made with other data"), ("clusters", "made with other clusters"),
    ("cut", "is damaged"), ("value", "is damaged .its hash differs")])
def test_what_was_made_by_something_else_or_is_damaged_is_refused(tmp_path, change, words):
    path, pool = str(tmp_path / "scores.npz"), pool_of(5)
    by = lambda w=1.0, pool=pool, clusters=3: reference.made_by({"w": w * np.ones(3)}, pool,
                                                                clusters=clusters)
    reference.cached(path, by(), lambda: ({"loss": np.arange(5.0)}, 2.5))
    if change == "cut":
        os.truncate(path, 300)
    if change == "value":
        with np.load(path) as f:
            arrays = dict(f)
        arrays["loss"][2] += 1
        np.savez(path, **arrays)
    other = pool_of(5)
    other.source.fingerprint = "e" * 16
    asked = {"weights": lambda: by(w=2.0), "clusters": lambda: by(clusters=4),
             "ids": lambda: by(pool=pool.subset(pool.ids[1:])),
             "data": lambda: by(pool=other)}.get(change, by)()
    before = open(path, "rb").read()
    with pytest.raises(ValueError, match=words) as error:
        reference.cached(path, asked, lambda: 1 / 0)
    assert path in str(error.value) and "\n" not in str(error.value)
    assert open(path, "rb").read() == before
