"""MoCLR, k-means, experts and distillation do what their equations say, on any devices."""

import functools
import itertools
import math
import types

from hypothesis import example, given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import augment, data, devices, flags, flops, probe, reference, resnet, train
import dnc
import slow_dnc
from test_jest import assert_close, sharded

MODEL = dnc.Model(resnet.ResNet("8/4", 8), hidden=8, embed=6, head_hidden=8)
VIEWS = augment.Views(0.3, 1.0, (0.5, 0.5), (0.5, 0.5))


def test_the_reference_itself():
    slow_dnc.check()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def images(n, seed=0, side=8, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), np.uint8)


@functools.cache
def on(n, fn, *in_axes):
    """`fn` under pmap over the first n devices, compiled once for all tests that share it."""
    return jax.pmap(fn, axis_name=devices.AXIS, in_axes=in_axes, out_axes=None,
                    devices=jax.devices()[:n])


def counted_flops(jaxpr, kind):
    """FLOPs of every 'conv' or 'dot' (of matrices) in a jaxpr, scans included."""
    total = 0
    for eqn in jaxpr.eqns:
        size = 2 * math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
        if kind == "conv" and eqn.primitive.name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            total += size * math.prod(kernel) // kernel[spec[0]]
        if kind == "dot" and eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.ndim == 2:
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(counted_flops(inner, kind) for inner in
                             jax.extend.core.jaxprs_in_params(eqn.params))
    return total


# ------------------------------------------------------------------------------------- resnet


@pytest.mark.parametrize("size, count", [("18", 11_176_512), ("50", 23_508_032)])
def test_published_sizes(size, count):
    config = resnet.ResNet(size, 224)
    params, _ = jax.eval_shape(lambda: resnet.resnet_init(jax.random.key(0), config))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    with_head = {"18": 11_689_512, "50": 25_557_032}[size]
    assert count + config.features * 1000 + 1000 == with_head


@pytest.mark.parametrize("size, side", [("18", 224), ("50", 224), ("8/16", 32), ("14/8", 9),
                                        ("50/4", 50), ("18/8", 65)])
def test_flops_are_those_of_the_convolutions(size, side):
    config = resnet.ResNet(size, side)
    params, stats = jax.eval_shape(lambda: resnet.resnet_init(jax.random.key(0), config))
    jaxpr = jax.make_jaxpr(lambda p, s, x: resnet.resnet_apply(p, s, x, config, False))(
        params, stats, jax.ShapeDtypeStruct((3, side, side, 3), jnp.float32))
    assert counted_flops(jaxpr.jaxpr, "conv") == 3 * resnet.resnet_flops(config)


def test_sizes_that_do_not_exist():
    for name in ("huge", "9/16", "8/0", "8/16/2", "", "2", "18/x"):
        with pytest.raises(ValueError, match="model size"):
            resnet.size(name)


@pytest.mark.parametrize("n", [1, 4])
def test_batch_norm(on_devices, n):
    batches, stats = [3 * normal(i, 8, 2, 2, 5) + 1 for i in range(3)], resnet.norm_init(5)[1]
    p = {"scale": normal(1, 5), "bias": normal(2, 5)}
    apply = lambda p, s, x: jax.tree.map(lambda v: v[None], resnet.batch_norm(p, s, x, True))
    for i, x in enumerate(batches):
        y, new = on_devices(n, apply, p, stats, sharded(x, n), in_axes=(None, None, 0), out_axes=0)
        np.testing.assert_allclose(y.reshape(x.shape), slow_dnc.batch_norm(
            x, p["scale"], p["bias"]), rtol=1e-4, atol=1e-4)
        stats = {k: v.reshape(n, -1)[0].reshape(stats[k].shape) for k, v in new.items()}
        for k, v in new.items():
            np.testing.assert_array_equal(v.reshape(n, -1), stats[k].reshape(1, -1).repeat(n, 0))
        mean, var = slow_dnc.batch_norm_running(batches[:i + 1])
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-4)
    y, same = resnet.batch_norm(p, stats, x, train=False)
    assert_close(same, stats, rtol=0)
    np.testing.assert_allclose(y, (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * p["scale"]
                               + p["bias"], rtol=1e-4, atol=1e-4)


def test_batch_norm_keeps_its_digits_where_the_mean_is_large(on_devices):
    x = 3000 + normal(0, 64, 5)
    p, stats = resnet.norm_init(5)
    y, new = on_devices(1, lambda x: resnet.batch_norm(p, stats, x, True), sharded(x, 1),
                        in_axes=(0,))
    np.testing.assert_allclose(new["var"], np.float64(x).var(0), rtol=1e-3)
    np.testing.assert_allclose(y, slow_dnc.batch_norm(x, np.ones(5), np.zeros(5)), atol=1e-3)


def test_first_weights_have_the_variance_of_their_fan_in():
    @jax.jit
    def kernels(key):
        params, _ = resnet.resnet_init(key, resnet.ResNet("8/64", 8))
        return params["stem"]["w"], params["stage0_block0"]["conv1"]["w"]
    for w, c_in in zip(kernels(jax.random.key(0)), (3, 64)):
        assert w.shape == (3, 3, c_in, 64)
        np.testing.assert_allclose(np.var(w), 1 / (3 * 3 * c_in), rtol=0.1)


def test_a_residual_block_starts_as_its_shortcut_and_bf16_is_close():
    config = resnet.ResNet("14/4", 16)
    params, stats = jax.jit(lambda key: resnet.resnet_init(key, config))(jax.random.key(0))
    x = normal(0, 2, 16, 16, 4)
    layers = resnet.convs(config, *next(s for n, *s in resnet.blocks(config)))
    y, _ = resnet.block(params["stage0_block0"], stats["stage0_block0"], x, layers, False)
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    leaves = [x for x in jax.tree.leaves(params) if x.ndim == 4]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(leaves, 2))
    image = normal(1, 2, 16, 16, 3)
    low = resnet.ResNet("14/4", 16, dtype="bfloat16")
    apply = jax.jit(resnet.resnet_apply, static_argnums=(3, 4))
    full, half = (apply(params, stats, image, c, False)[0] for c in (config, low))
    assert full.dtype == half.dtype == jnp.float32
    np.testing.assert_allclose(full, half, rtol=0.1, atol=0.05)


def test_published_flops():
    """He et al.'s ResNet-18, and ResNet-50 with the stride in its 3 x 3, in multiply-adds."""
    for name, million in (("18", 1814), ("50", 4087)):
        got = resnet.resnet_flops(resnet.ResNet(name, 224)) / 2e6
        assert got == pytest.approx(million, rel=1e-3)


def test_a_block_s_convolutions_have_a_relu_between():
    config = resnet.ResNet("14/4", 16)
    layers = resnet.convs(config, 4, 4, 4, 1)
    one = {"w": np.zeros((3, 3, 4, 4), np.float32), "norm": resnet.norm_init(4)[0]}
    one["w"][1, 1] = -np.eye(4)  # the identity, negated
    stats = resnet.norm_init(4)[1]
    x = np.abs(normal(0, 2, 5, 5, 4))
    y, _ = resnet.block({"conv0": one, "conv1": one}, {"conv0": stats, "conv1": stats}, x, layers,
                        False)
    np.testing.assert_allclose(y, x, rtol=1e-5)  # all that the first gives is below 0


# ------------------------------------------------------------------------------- augmentation


@functools.partial(jax.jit, static_argnums=3)
def two_views(key, place_N, image_NHWC, views):
    return augment.draw_views(key, place_N, image_NHWC, views, 2)


crop = jax.jit(augment.crop, static_argnums=2)
blur = jax.jit(augment.blur)
recolour = jax.jit(augment.recolour, static_argnums=2)


def test_a_view_depends_on_its_place_and_key_alone():
    image, key = images(8), jax.random.key(0)
    a, b = two_views(key, jnp.arange(8), image, VIEWS)
    colours = a * augment.DEVIATION + augment.MEAN
    assert a.shape == image.shape and -1e-5 < colours.min() and colours.max() < 1 + 1e-5
    assert not np.allclose(a, b)
    some = np.array([4, 1, 1, 4, 6, 1, 4, 4])  # in another batch
    np.testing.assert_allclose(two_views(key, jnp.array(some), image[some], VIEWS)[0], a[some],
                               atol=1e-6)
    same = two_views(key, jnp.arange(8), image[:1].repeat(8, 0), VIEWS)[0]
    assert len(np.unique(np.round(same, 3).reshape(8, -1), axis=0)) == 8
    assert not np.allclose(two_views(jax.random.key(1), jnp.arange(8), image, VIEWS)[0], a)


def pictures(rng, n, side=5):
    """Any colours, pale ones, greys, and colours whose channels are 0 or 1."""
    x = rng.uniform(size=(n, side, side, 3))
    x[1::4] = 0.5 + 0.1 * (x[1::4] - 0.5)
    x[2::4] = x[2::4, ..., :1]
    x[3::4] = np.round(x[3::4])
    return np.float32(x)


def test_colours_change_as_in_the_slow_hsv():
    rng, orders = np.random.default_rng(0), list(itertools.permutations(range(4)))
    image = pictures(rng, len(orders))
    amount = rng.uniform(-1, 1, (len(orders), 4)) * [0.4, 0.4, 0.5, 0.5] + [0, 1, 1, 0]
    got = jax.jit(jax.vmap(lambda x, order, a: augment.jitter(x, order, *a)))(
        image, np.array(orders), np.float32(amount))
    for i, order in enumerate(orders):
        np.testing.assert_allclose(got[i], slow_dnc.jitter(image[i], order, *amount[i]), atol=1e-5)


def test_recolour_draws_byol_s_amounts():
    image, n, strength = pictures(np.random.default_rng(1), 1)[0], 40, 0.5
    keys = jax.random.split(jax.random.key(0), n)
    got, kinds = jax.jit(jax.vmap(lambda key: augment.recolour(key, image, strength)))(keys), set()
    for key, x in zip(keys, got):
        key_amount, key_order, key_jitter, key_grey = jax.random.split(key, 4)
        amount = jax.random.uniform(key_amount, (4,), minval=-1.0, maxval=1.0)
        amount = np.float64(amount) * strength * [0.4, 0.4, 0.2, 0.1] + [0, 1, 1, 0]
        jitter, grey = (bool(jax.random.bernoulli(k, p))
                        for k, p in ((key_jitter, 0.8), (key_grey, 0.2)))
        expected = slow_dnc.jitter(image, jax.random.permutation(key_order, 4),
                                   *amount) if jitter else image
        np.testing.assert_allclose(x, slow_dnc.grey(expected) if grey else expected, atol=1e-5)
        kinds.add((jitter, grey))
    assert len(kinds) == 4


def test_crop_flip_blur_solarise():
    ramp = np.linspace(0.1, 0.9, 16, dtype=np.float32)[None, :, None].repeat(16, 0).repeat(3, 2)
    crops = np.stack([crop(jax.random.key(s), ramp, 0.2) for s in range(20)])
    slope = np.diff(crops[:, 8, 4:12, 0]).mean(1) / np.diff(ramp[8, :, 0]).mean()
    assert 0.3 < slope.min() and slope.max() < 1.02 and slope.std() > 0.1  # never beyond the image
    for side in (9, 40):  # three weights each way, and five
        key, image = jax.random.key(side), normal(0, side, side, 3)
        sigma = float(jax.random.uniform(key, minval=0.1, maxval=2.0))
        np.testing.assert_allclose(blur(key, image), slow_dnc.blur(
            image, sigma, max(1, side // 20)), atol=1e-5)
    flat = np.full((40, 8, 8, 3), 200, np.uint8)
    only = augment.Views(1.0, 0.0, (0.0, 0.0), (0.0, 0.5))
    a, b = two_views(jax.random.key(0), jnp.arange(40), flat, only)
    inputs = lambda colour: (colour - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(a, np.tile(inputs(200 / 255), (40, 8, 8, 1)), atol=1e-3)
    solarised = np.isclose(b[:, 0, 0], inputs(1 - 200 / 255), atol=1e-3).all(-1)
    assert 8 < solarised.sum() < 32
    grey = jax.eval_shape(lambda: two_views(jax.random.key(0), jnp.arange(2),
                                            images(2, channels=1), VIEWS))
    assert grey.shape[-1] == 3


def test_crops_have_their_area_and_aspect_anywhere():
    """Read off the slopes of two ramps, one across and one down, and where their middles are."""
    ramp = np.linspace(0, 1, 32, dtype=np.float32)
    image = np.stack([*np.meshgrid(ramp, ramp), np.ones((32, 32), np.float32)], -1)
    crops = np.asarray(jax.jit(jax.vmap(lambda key: augment.crop(key, image, 0.3)))(
        jax.random.split(jax.random.key(0), 200)))
    width = np.diff(crops[:, 16, 8:24, 0]).mean(1) * 31
    height = np.diff(crops[:, 8:24, 16, 1]).mean(1) * 31
    assert 0.28 < (width * height).min() < 0.35 and (width * height).max() > 0.85
    some = np.maximum(width, height) < 0.97  # none of their sides was cut
    aspect = (width / height)[some]
    assert 0.73 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.37
    assert abs(np.corrcoef(crops[some, 16, 16, 0], crops[some, 16, 16, 1])[0, 1]) < 0.3


def test_a_view_is_the_transforms_in_byol_s_order():
    """One image, each transform as it is, with the keys that `view` gives them."""
    image = images(1, side=16)[0] / np.float32(255)
    views = augment.Views(0.3, 1.0, (0.1, 0.9), (0.9, 0.1))
    kinds, view = set(), jax.jit(augment.view, static_argnums=2)
    for seed, v in itertools.product(range(12), (0, 1)):
        keys = jax.random.split(jax.random.key(seed), 5)
        happens = lambda key, p: bool(jax.random.bernoulli(key, p))
        x = crop(keys[0], image, 0.3)
        flip, solarise = happens(keys[1], 0.5), happens(keys[4], views.solarise[v])
        x = recolour(keys[2], x[:, ::-1] if flip else x, 1.0)
        key_draw, key_blur = jax.random.split(keys[3])
        blurs = happens(key_draw, views.blur[v])
        x = np.asarray(blur(key_blur, x) if blurs else x)
        x = np.where(x >= 0.5, 1 - x, x) if solarise else x
        got = view(jax.random.key(seed), image, views, v) * augment.DEVIATION + augment.MEAN
        assert (np.abs(got - x) < 1e-4).mean() > 0.99  # rounding may cross 0.5
        kinds.add((v, flip, blurs, solarise))
    assert {(0, True, False, True), (1, True, True, False)} <= kinds


def test_blur_reaches_a_twentieth_of_the_side():
    dot = np.zeros((60, 60, 3), np.float32)
    dot[30, 30] = 1
    wide = max((blur(jax.random.key(s), dot) for s in range(5)), key=lambda x: x[30, 33, 0])
    assert (wide[30, 27:34] > 0).all() and (wide[30, :27] == 0).all() and (wide[30, 34:] == 0).all()


# -------------------------------------------------------------------------------------- MoCLR


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("same_view", [True, False])
def test_loss_and_gradients_are_the_whole_batch_s(on_devices, same_view, n):
    rows = {k: normal(i, 8, 6) for i, k in enumerate(("q1", "q2", "k1", "k2"))}

    def step(shift, rows):
        def local(shift):
            return dnc.moclr_loss(rows["q1"] + shift[0], rows["q2"], rows["k1"] + shift[1],
                                  rows["k2"], 0.3, same_view, devices.AXIS)[0]
        return devices.mean(jax.value_and_grad(local)(shift))
    got, grad = on_devices(n, step, np.zeros((2, 6), np.float32), sharded(rows, n),
                           in_axes=(None, 0))
    slow = lambda d: slow_dnc.moclr_loss(np.float64(rows["q1"]) + d, rows["q2"], rows["k1"],
                                         rows["k2"], 0.3, same_view)
    np.testing.assert_allclose(got, slow(0), rtol=1e-5)
    finite = [(slow(1e-5 * d) - slow(-1e-5 * d)) / 2e-5 for d in np.eye(6)]
    np.testing.assert_allclose(grad[0], finite, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(grad[1], 0)  # nothing reaches the target


def test_loss_of_one_image_and_of_equal_ones():
    z = slow_dnc._unit_rows(normal(0, 1, 5))
    info_nce = jax.jit(dnc.info_nce)
    for same in (None, z):
        assert float(info_nce(z, z, 0.1, same)[0]) == 0
    z = np.tile(z, (7, 1))
    np.testing.assert_allclose(info_nce(z, z, 0.1)[0], math.log(7), rtol=1e-5)
    np.testing.assert_allclose(info_nce(z, z, 0.1, z), (math.log(13), 10 + math.log(12)),
                               rtol=1e-5)


def test_a_row_of_zeros_has_a_finite_gradient():
    z = np.stack([np.zeros(3, np.float32), normal(0, 3)])
    got, grad = jax.value_and_grad(lambda z: dnc.unit(z).sum())(z)
    assert np.isfinite(grad).all() and np.isfinite(got)
    np.testing.assert_allclose(dnc.unit(z), [[0, 0, 0], z[1] / np.linalg.norm(z[1])], rtol=1e-6)
    np.testing.assert_allclose(probe.unit(z), dnc.unit(z), rtol=1e-6)


def test_schedules():
    for step in range(13):
        np.testing.assert_allclose(dnc.ema_decay(step, 12, 0.97),
                                   slow_dnc.ema_decay(step, 12, 0.97), rtol=1e-6)
        for warmup in (0, 1, 5):
            np.testing.assert_allclose(dnc.warmup_cosine(step, 12, (warmup + 0.2) / 12, 2.0),
                                       slow_dnc.warmup_cosine(step, 12, warmup, 2.0), atol=1e-6)


def test_lars_is_the_slow_one():
    params = {"layer": {"w": normal(0, 3, 2), "b": normal(1, 2)}, "zero": {"w": 0 * normal(0, 2)},
              "norm": {"scale": normal(2, 2), "bias": normal(3, 2)}}
    flat = lambda t: {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(t)}
    free = [k for k in flat(params) if "'w'" not in k]
    optimiser, slow = dnc.lars(0.1, trust=0.02, momentum=0.8), flat(params)
    learner = {"params": params, "opt": optimiser.init(params)}
    momentum = {k: np.zeros_like(v) for k, v in slow.items()}
    for step in range(4):
        grads = jax.tree.map(lambda x: normal(step, *x.shape), params)
        rate = [0.5, 2.0, 1.0, 0.0][step]
        learner = dnc.update(learner, grads, optimiser, rate)
        slow, momentum = slow_dnc.lars_step(slow, flat(grads), momentum, rate, 0.1, trust=0.02,
                                            momentum_coefficient=0.8, excluded=free)
        for k, v in flat(learner["params"]).items():
            np.testing.assert_allclose(v, slow[k], rtol=1e-5, atol=1e-6, err_msg=k)


OPTIMISER = dnc.lars(1e-4)
KNOBS = dict(model=MODEL, optimiser=OPTIMISER, views=VIEWS, peak=2.0, warmup=0.2)


CONTRAST = {same_view: functools.partial(
    dnc.contrast_step, temperature=0.2, m0=0.9, n_classes=3, same_view_negatives=same_view, **KNOBS)
    for same_view in (True, False)}
DISTIL = functools.partial(dnc.distil_step, **KNOBS)


def batch(seed=0, n=8):
    return {"image": images(n, seed), "label": np.arange(n, dtype=np.int32) % 3,
            "cluster": np.random.default_rng(seed).integers(0, 3, n, dtype=np.int32)}


def one_step(n, step, state, index, rows):
    """(state, metrics) of a step on n devices, in numpy."""
    return devices.to_host(on(n, step, None, None, None, 0)(
        state, np.int32(index), jax.random.key(1), sharded(rows, n)))


def in_steps(n, step, state, n_steps=3):
    rows = []
    for i in range(n_steps):
        state, metrics = one_step(n, step, state, i, batch(i))
        rows.append(metrics)
    return state, rows


def contrast_start(n_steps=10):
    return devices.to_host(dnc.new_state(jax.random.key(0), MODEL, OPTIMISER, n_steps))


def test_three_steps_on_four_devices_are_those_of_one():
    start = contrast_start()
    one, four = (in_steps(n, CONTRAST[True], start) for n in (1, 4))
    assert_close(one, four, rtol=2e-3, atol=3e-4)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), start, one[0])
    assert all(jax.tree.leaves(moved["learner"]["params"])) and all(jax.tree.leaves(moved["stats"]))
    assert "b" not in start["learner"]["params"]["projector"]["down"]
    for row in one[1]:
        np.testing.assert_allclose(row["effective_classes"],
                                   np.exp(slow_dnc._entropy([i % 3 for i in range(8)])), rtol=1e-5)


def test_the_target_follows_the_updated_learner():
    start = contrast_start()
    start["target"] = jax.tree.map(lambda x: x + 0.1, start["target"])
    for index in (0, 4):
        state, _ = one_step(1, CONTRAST[True], start, index, batch())
        decay = slow_dnc.ema_decay(index, 10, 0.9)
        assert_close(state["target"], jax.tree.map(
            lambda t, o: decay * t + (1 - decay) * o, start["target"], state["learner"]["params"]),
            rtol=1e-5, atol=1e-6)
        if index == 0:  # the rate starts at 0
            assert_close(state["learner"]["params"], start["learner"]["params"], rtol=0, atol=0)


PROJECT = functools.partial(dnc.project, model=MODEL)


def by_hand(params, stats, view):
    """`project` on one device, of a whole batch."""
    return devices.to_host(on(1, PROJECT, None, None, 0)(params, stats,
                                                         sharded(np.asarray(view), 1)))


@pytest.mark.parametrize("same_view", [True, False])
def test_the_loss_of_a_contrasting_step_is_the_slow_one(same_view):
    """Each view's online projection against the target network's of the other view."""
    start, rows = contrast_start(), batch()
    start["target"] = jax.tree.map(lambda x: x + 0.3 * normal(1, *x.shape), start["target"])
    state, metrics = one_step(1, CONTRAST[same_view], start, 3, rows)
    views = two_views(jax.random.fold_in(jax.random.key(1), 3), jnp.arange(8), rows["image"], VIEWS)
    stats, q, k = start["stats"], [], []
    for view in views:
        q_NE, stats = by_hand(start["learner"]["params"], stats, view)
        q, k = [*q, q_NE], [*k, by_hand(start["target"], start["stats"], view)[0]]
    np.testing.assert_allclose(metrics["loss"], slow_dnc.moclr_loss(*q, *k, 0.2, same_view),
                               rtol=1e-4)
    assert_close(state["stats"], stats, rtol=1e-4, atol=1e-5)  # of both views, in turn


# ------------------------------------------------------------------------------------ k-means


seeding = jax.jit(dnc.kmeans_plus_plus)
lloyd = jax.jit(dnc.lloyd, static_argnames="tile")
nearest = jax.jit(dnc.nearest, static_argnames="tile")
kmeans = jax.jit(dnc.kmeans, static_argnums=2, static_argnames=("restarts", "tile"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([6, 15, 30]), st.sampled_from([1, 6]),
       st.sampled_from([1, 3]))
@example(0, 15, 6, 3)  # two candidates leave equal sums, and rounding favours the second
def test_seeding_is_the_slow_one(seed, n, k, n_candidates):
    rng = np.random.default_rng(seed)
    x, draws = normal(seed, 30, 3), rng.uniform(size=(k, n_candidates)).astype(np.float32)
    x = x[:n]
    np.testing.assert_array_equal(seeding(draws, x), x[slow_dnc.kmeans_plus_plus(x, k, draws)])


def test_a_draw_of_zero_is_no_point_that_is_a_centre_already():
    x = normal(0, 5, 3)
    got = seeding(np.zeros((5, 2)), x)
    np.testing.assert_array_equal(got, x)


def test_candidates_are_as_many_as_the_authors():
    assert [dnc.n_candidates(k) for k in (1, 2, 3, 10, 1000)] == [2, 2, 3, 4, 8]


@pytest.mark.parametrize("far", [0, 1, 3])
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_lloyd_is_the_slow_one_and_reseeds(tile, far):
    """`far` centres start where no point goes."""
    x = normal(5, 40, 3)
    centres = x[:5].copy()
    centres[1:1 + far] = 100 + np.arange(far)[:, None]
    for iterations in (1, 2, 6):
        got = lloyd(x, centres, iterations, tile=tile)
        index, distance = nearest(x, got, tile=tile)
        expected, assignment, inertia = slow_dnc.lloyd(x, centres, iterations)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(index, assignment)
        np.testing.assert_allclose(distance.sum(), inertia, rtol=1e-5)
        assert (np.bincount(assignment, minlength=5) > 0).all()


def test_the_best_of_all_partitions():
    k, n = 3, 8
    member = np.eye(k)[np.array(list(itertools.product(range(k), repeat=n)))]  # [partition, n, k]
    for seed in range(4):
        x = normal(seed, n, 2)
        # the inertia of a partition is sum |x|^2 - sum over clusters of |sum x|^2 / size
        sums, size = np.einsum("pnk,nd->pkd", member, x), np.maximum(member.sum(1), 1)
        best = (x**2).sum() - ((sums**2).sum(2) / size).sum(1).max()
        inertia = kmeans(jax.random.key(seed), x, k, restarts=30)[1]
        np.testing.assert_allclose(inertia, best, rtol=1e-4)


def test_tiles_change_nothing():
    x = np.concatenate([normal(i, 15, 4) + 4 * normal(9 + i, 4) for i in range(3)]) + 50
    (centres, inertia), other = (kmeans(jax.random.key(2), x, 6, restarts=3, tile=tile)
                                 for tile in (4096, 7))
    np.testing.assert_allclose(other[0], centres, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(other[1], inertia, rtol=1e-4)


def test_clusters_are_the_same_far_from_the_origin():
    """In float32, where |c|^2 is 2^24 times what tells the points apart."""
    x = np.round(64 * normal(3, 60, 4)) / 64  # so that moving them loses nothing
    near, far = (kmeans(jax.random.key(3), x + np.float32(at), 5, restarts=3)
                 for at in (0, 4096))
    np.testing.assert_allclose(far[1], near[1], rtol=1e-4)
    np.testing.assert_allclose(far[0] - 4096, near[0], atol=2e-3)


def test_more_centres_than_different_points():
    x = np.repeat(normal(0, 2, 3), 5, axis=0)
    centres, inertia = kmeans(jax.random.key(0), x, 4, restarts=2)
    assert np.isfinite(centres).all() and float(inertia) < 1e-6


def test_points_in_bfloat16_are_clustered_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(500, 3)), jnp.bfloat16)
    for got, want in zip(*(dnc.kmeans(jax.random.key(0), y, 4, restarts=2)
                           for y in (x, x.astype(jnp.float32)))):
        np.testing.assert_array_equal(got, want)


def test_memory_is_a_tile_s_not_the_product_s():
    n, k = 20_000, 500
    compiled = jax.jit(lambda key, x: dnc.kmeans(key, x, k, restarts=1, tile=256)[1]).lower(
        jax.random.key(0), jax.ShapeDtypeStruct((n, 8), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * k * 4 / 4


def test_clusters_are_fitted_on_some_and_assigned_to_all():
    """Fitted on half of the points; and on as many as clusters, each of which is a centre then."""
    x = np.concatenate([normal(i, 30, 4) * 0.1 + 5 * normal(20 + i, 4) for i in range(3)])
    truth, how = np.repeat(np.arange(3), 30), dict(restarts=4, iterations=10, seed=0)
    cluster_N, seconds = dnc.cluster(jax.random.key(0), x, 3, examples=45, **how)
    assert probe.nmi(cluster_N, truth) == pytest.approx(1) and seconds > 0
    assert cluster_N.dtype == np.int32 and len(cluster_N) == 90
    few, _ = dnc.cluster(jax.random.key(0), x, 3, examples=3, **how)
    assert probe.nmi(few, truth) < 0.9


@pytest.mark.parametrize("cap", [0, 1, 5, 1000])
def test_the_balanced_twin(cap):
    source = data.open_source("toy", "train", image_size=8, need=("label",),
                              toy_knobs=dict(n=300, tail=1.5, seed=0))
    label = source.read(source.ids)["label"]
    pool, got = dnc.training_pool(source, label, 0, cap)
    assert np.array_equal(got, pool.read(pool.ids)["label"])
    whole, kept = np.bincount(label, minlength=30), np.bincount(got, minlength=30)
    assert np.array_equal(kept, np.minimum(whole, cap) if cap else whole)
    other, _ = dnc.training_pool(source, label, 1, cap)
    assert np.array_equal(pool.ids, other.ids) == (cap in (0, 1000))


def test_partitions():
    cluster_N = np.random.default_rng(0).integers(0, 4, 60).astype(np.int32)
    label_N = np.random.default_rng(1).choice(9, 60, p=np.arange(9) / 36)
    assert dnc.partition("dnc", cluster_N, label_N, 4, 0) is cluster_N
    random = dnc.partition("dnc_random", cluster_N, label_N, 4, 0)
    np.testing.assert_array_equal(np.bincount(random), np.bincount(cluster_N))
    assert (random != cluster_N).any() and probe.nmi(random, cluster_N) < 0.3
    assert (random != dnc.partition("dnc_random", cluster_N, label_N, 4, 1)).any()
    oracle = dnc.partition("dnc_oracle", cluster_N, label_N, 4, 0)
    assert all(len(np.unique(oracle[label_N == c])) == 1 for c in np.unique(label_N))
    assert np.ptp(np.bincount(oracle, minlength=4)) <= np.bincount(label_N).max()
    assert len(np.unique(oracle)) == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any), st.integers(0, 100))
def test_experts_share_the_steps(sizes, total):
    got = dnc.expert_steps(sizes, total)
    assert got == slow_dnc.expert_steps(sizes, total) and sum(got) == total
    assert all(abs(g - total * s / sum(sizes)) < 1 for g, s in zip(got, sizes))


def test_of_equal_centres_the_first_is_the_nearest():
    centres = jnp.array([[9.0] * 3, [1.0] * 3, [1.0] * 3])
    index = nearest(normal(0, 6, 3), centres)[0]
    np.testing.assert_array_equal(index, np.ones(6))


def test_lloyd_stops_where_no_centre_moves(monkeypatch):
    x, nearest, passes = normal(5, 40, 3), dnc.nearest, []

    def counted(*args):
        jax.debug.callback(lambda: passes.append(0))
        return nearest(*args)
    monkeypatch.setattr(dnc, "nearest", counted)
    centres = dnc.lloyd(jnp.array(x), jnp.array(x[:5]), 100)
    jax.effects_barrier()
    assert 2 < len(passes) < 50
    expected = slow_dnc.lloyd(x, x[:5], len(passes) - 1)[0]  # the last pass moved none
    np.testing.assert_allclose(centres, expected, rtol=1e-5, atol=1e-5)
    before = slow_dnc.lloyd(x, x[:5], len(passes) - 2)[0]
    assert np.abs(centres - before).max() > 1e-3


def test_the_oracle_places_the_largest_class_first():
    """Of 9, 7, 6, 5, 5, 4 the first three open a group each, then the smallest group grows."""
    label_N = np.random.default_rng(0).permutation(np.repeat(np.arange(6), [4, 5, 9, 6, 7, 5]))
    oracle = dnc.partition("dnc_oracle", None, label_N, 3, 0)
    assert sorted(np.bincount(oracle)) == [11, 12, 13]


# ------------------------------------------------------------------------------- distillation


@functools.cache
def frozen(seed):
    """An encoder with statistics of its own."""
    params, stats = resnet.resnet_init(jax.random.key(seed), MODEL.encoder)
    params = jax.tree.map(lambda x: x + 0.3 * normal(seed, *x.shape), params)
    stats = jax.tree.map(lambda x: x + 0.3 * np.abs(normal(seed, *x.shape)), stats)
    return {"params": params, "stats": stats}


def stacked(nets):
    return jax.tree.map(lambda *x: np.stack(x), *nets)


@pytest.mark.parametrize("n_experts", [0, 3])
def test_distil_loss(n_experts):
    base, to_base, to_own = (normal(i, 7, 5) for i in range(3))
    own, cluster = normal(3, 7, 3, 5), np.array([0, 2, 1, 1, 2, 0, 0])
    if not n_experts:
        got = dnc.distil_loss(base, None, to_base, None, None)
        expected = np.mean([2 - 2 * slow_dnc._cosine(a, b) for a, b in zip(base, to_base)])
    else:
        got = dnc.distil_loss(base, own, to_base, to_own, cluster)
        expected = slow_dnc.distil_loss(base, own, to_base, to_own, cluster)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


own_expert = jax.jit(dnc.own_expert, static_argnums=3)
represent = jax.jit(dnc.represent, static_argnums=2)


@pytest.mark.parametrize("cluster", [[0] * 41, [2] * 41, list(range(3)) * 13 + [1, 0],
                                     [2, 0] + [1] * 39])
def test_each_image_goes_through_its_own_expert(cluster):
    """In blocks of 3 rows, which the clusters do not fill."""
    nets, image, cluster = [frozen(s) for s in range(3)], normal(0, 41, 8, 8, 3), np.array(cluster)
    assert dnc.block_shape(41, 3)[0] == 3
    got = own_expert(stacked(nets), image, cluster, MODEL)
    every = np.stack([represent(net, image, MODEL) for net in nets])
    np.testing.assert_allclose(got, every[cluster, np.arange(41)], rtol=1e-3, atol=1e-4)
    assert np.std(every, axis=1).mean() > 0.02  # images differ
    changed = own_expert(stacked([nets[0], frozen(9), nets[2]]), image, cluster, MODEL)
    np.testing.assert_array_equal(changed[cluster != 1], got[cluster != 1])
    assert not (cluster == 1).any() or not np.allclose(changed[cluster == 1], got[cluster == 1])


@pytest.mark.parametrize("n, k", [(12, 3), (128, 5), (7, 9), (64, 1)])
def test_blocks_suffice_for_any_mix_and_are_what_runs(n, k):
    size, n_blocks = dnc.block_shape(n, k)
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = np.bincount(rng.choice(k, n, p=rng.dirichlet(np.full(k, 0.3))), minlength=k)
        assert sum(-(-c // size) for c in counts) <= n_blocks
    assert size * n_blocks <= 1.25 * n or size == 1
    shapes = jax.eval_shape(lambda: stacked_abstract(k))
    jaxpr = jax.make_jaxpr(lambda e, x, c: dnc.own_expert(e, x, c, MODEL))(
        shapes, jax.ShapeDtypeStruct((n, 8, 8, 3), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32))
    per_image = resnet.resnet_flops(MODEL.encoder)
    assert counted_flops(jaxpr.jaxpr, "conv") == size * n_blocks * per_image


def stacked_abstract(k):
    params, stats = resnet.resnet_init(jax.random.key(0), MODEL.encoder)
    return jax.tree.map(lambda x: jnp.stack([x] * k), {"params": params, "stats": stats})


def student(nets, n_experts=3):
    return devices.to_host(dnc.new_student(jax.random.key(0), MODEL, OPTIMISER, 10, frozen(7),
                                           nets[:n_experts]))


def test_distillation_on_four_devices_is_that_of_one():
    start = student([frozen(s) for s in range(3)])
    one, four = (in_steps(n, DISTIL, start) for n in (1, 4))
    assert_close(one, four, rtol=2e-3, atol=3e-4)
    for teacher in ("base", "experts"):  # no gradient, no batch statistics
        assert_close(one[0][teacher], start[teacher], rtol=0)


def test_an_expert_teaches_its_own_cluster_only():
    """Two experts differ; a batch without images of their clusters does not notice."""
    nets = [frozen(s) for s in range(3)]
    rows = batch() | {"cluster": np.array([0, 2] * 4, np.int32)}
    run = lambda nets, rows: one_step(1, DISTIL, student(nets), 5, rows)
    (a, _), (b, _) = (run(n, rows) for n in (nets, [nets[0], frozen(9), nets[2]]))
    assert_close(a["learner"], b["learner"], rtol=0)
    (a, _), (b, _) = (run(n, batch()) for n in (nets, [nets[0], frozen(9), nets[2]]))
    heads = a["learner"]["params"]["heads"], b["learner"]["params"]["heads"]
    assert not np.array_equal(heads[0]["expert1"]["down"]["b"], heads[1]["expert1"]["down"]["b"])
    # the other heads only notice later, through the encoder
    assert_close(heads[0]["expert0"], heads[1]["expert0"], rtol=0)


ENCODE = functools.partial(resnet.resnet_apply, config=MODEL.encoder, train=True)


def test_the_loss_of_a_step_is_the_slow_one_of_the_first_view():
    """Teachers see the view that the student sees."""
    start, rows = student([frozen(s) for s in range(3)]), batch()
    state, metrics = one_step(1, DISTIL, start, 3, rows)
    view, _ = two_views(jax.random.fold_in(jax.random.key(1), 3), jnp.arange(8), rows["image"],
                        VIEWS)
    params, experts = start["learner"]["params"], start["experts"]
    h, stats = devices.to_host(on(1, ENCODE, None, None, 0)(
        params["encoder"], start["stats"]["encoder"], sharded(np.asarray(view), 1)))
    heads = {k: np.asarray(dnc.head(p, h)) for k, p in params["heads"].items()}
    own = np.stack([heads[f"expert{j}"] for j in range(3)], 1)
    to_own = np.stack([represent(jax.tree.map(lambda x: x[j], experts), view, MODEL)
                       for j in range(3)])[rows["cluster"], np.arange(8)]
    expected = slow_dnc.distil_loss(heads["base"], own, represent(start["base"], view, MODEL),
                                    to_own, rows["cluster"])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    assert_close(state["stats"]["encoder"], stats, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["contrast", "distil"])
def test_a_stage_s_own_length_is_the_schedule_s(name):
    """The first step moves a bias by the rate: at step 3, before, at and after the warm-up."""
    step, start = {"contrast": (CONTRAST[True], contrast_start()),
                   "distil": (DISTIL, student([frozen(s) for s in range(3)]))}[name]
    bias = lambda state: state["learner"]["params"]["encoder"]["stem"]["norm"]["bias"]
    moved = {}
    for n_steps in (5, 10, 15, 40):
        state, _ = one_step(1, step, {**start, "total": np.int32(n_steps)}, 3, batch())
        moved[n_steps] = (bias(state) - bias(start)) / slow_dnc.warmup_cosine(
            3, n_steps, round(0.2 * n_steps), 2.0)
    assert np.abs(moved[5]).max() > 1e-3
    for n_steps in moved:
        np.testing.assert_allclose(moved[n_steps], moved[5], rtol=1e-3, atol=1e-5)


def test_a_given_start_is_taken_whole():
    given = dnc.new_state(jax.random.key(3), MODEL, OPTIMISER, 5)
    given["stats"] = jax.tree.map(lambda x: x + 0.5, given["stats"])
    given["target"] = jax.tree.map(lambda x: x + 0.5, given["target"])
    state = dnc.new_state(jax.random.key(0), MODEL, OPTIMISER, 10, given)
    for tree in (state["learner"]["params"], state["target"]):  # the momentum encoder starts anew
        assert_close(tree, given["learner"]["params"], rtol=0)
    assert_close(state["stats"], given["stats"], rtol=0)
    assert_close(dnc.encoder_of(given), {"params": given["learner"]["params"]["encoder"],
                                               "stats": given["stats"]["encoder"]}, rtol=0)
    base = frozen(7)
    for from_base in (False, True):
        state = dnc.new_student(jax.random.key(0), MODEL, OPTIMISER, 10, base, (), from_base)
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (
            dnc.encoder_of(state), base)))]
        assert all(same) if from_base else not any(same)


def test_every_head_starts_as_its_own():
    params, _ = dnc.student_init(jax.random.key(0), MODEL, 3)
    assert list(params["heads"]) == ["base", "expert0", "expert1", "expert2"]
    for layer in ("up", "down"):
        w = [p[layer]["w"] for p in params["heads"].values()]
        assert not any(np.array_equal(a, b) for a, b in itertools.combinations(w, 2))


# ----------------------------------------------------------------------------------- the bill


def test_a_visit_costs_what_the_paper_s_stages_do():
    F, b = resnet.resnet_flops(MODEL.encoder), 128
    F_projected = F + 2 * (MODEL.encoder.features * 8 + 8 * 6)
    assert dnc.contrast_flops(b, MODEL) == b * slow_dnc.visits_cost("moclr") * F_projected
    thin = dnc.Model(MODEL.encoder, 8, 6, head_hidden=0)
    # blocks of one slot: none is empty
    assert dnc.distil_flops(12, thin, 12) == 12 * slow_dnc.visits_cost("distil") * F
    assert dnc.distil_flops(b, thin, 0) == b * 4 * F  # without experts
    got = dnc.distil_flops(b, MODEL, 5) / (b * F)
    assert got < 1.3 * slow_dnc.visits_cost("distil")


CONFIG = flags.Namespace(
    arms=list(dnc.ARMS), steps=100, base_fraction=1 / 3, experts_fraction=1 / 2,
    batch_size=16, clusters=4, kmeans_examples=300, restarts=2,
    kmeans_iterations=5, weight_decay=0.0, expert_init="base", student_init="scratch")


def slow_bill(steps, arm):
    """{role: FLOPs} of a whole arm with these steps in its stages, on 500 images."""
    clusters = 500 * resnet.resnet_flops(MODEL.encoder) + dnc.kmeans_flops(
        300, 500, 4, MODEL.encoder.features, 2, 5)
    return {"base": steps["base"] * dnc.contrast_flops(16, MODEL),
            "clustering": clusters if arm in ("dnc", "dnc_random") else 0,
            "experts": steps["experts"] * dnc.contrast_flops(16, MODEL),
            "distillation": steps["distil"] * dnc.distil_flops(
                16, MODEL, 4 if steps["experts"] else 0)}


@pytest.mark.parametrize("arm", dnc.ARMS)
def test_visits_and_flops_add_up(arm):
    steps_of = dnc.budget(CONFIG, MODEL, 500)
    steps, bill = steps_of[arm], slow_bill(steps_of[arm], arm)
    if arm == "moclr_flops":
        base = dnc.contrast_flops(16, MODEL)
        assert abs(sum(bill.values()) - sum(slow_bill(steps_of["dnc"], "dnc").values())) <= base / 2
    else:
        assert sum(steps.values()) == 100
    assert bool(steps_of[arm]["experts"]) == (arm in dnc.DIVIDES)
    assert flops.total_flops(bill) == sum(bill.values())


def test_kmeans_flops_count_its_products():
    """The products of an assignment, by a walk over the jaxpr; times iterations and restarts."""
    n, K, D, iterations = 64, 5, 7, 3
    jaxpr = jax.make_jaxpr(lambda x, c: dnc.nearest(x, c, tile=16))(
        jnp.zeros((n, D)), jnp.zeros((K, D)))
    assert counted_flops(jaxpr.jaxpr, "dot") == 2 * n * K * D
    got = dnc.kmeans_flops(n, 2 * n, K, D, 2, iterations)
    candidates = 1 + (K - 1) * 3
    once = 3 * n * candidates * D + iterations * (2 * n * K * D + 4 * n * D) + n * D * (2 * K + 3)
    assert got == 2 * once + 2 * n * D * (2 * K + 3)


def test_every_head_is_billed():
    b, D = 12, MODEL.encoder.features
    thin = dnc.Model(MODEL.encoder, 8, 6, head_hidden=0)
    heads = [dnc.distil_flops(b, m, 5) for m in (MODEL, thin)]
    assert heads[0] - heads[1] == 3 * b * 6 * 2 * (D * 8 + 8 * D)


def test_programs_get_their_flags(monkeypatch):
    monkeypatch.setattr(devices, "pmap", lambda step, *_, **__: step.keywords)
    given = dict(weight_decay=0.5, warmup=0.1, crop_area=0.2, jitter=0.4, blur1=0.9, blur2=0.1,
                 solarise1=0.0, solarise2=0.2, batch_size=64, temperature=0.3, m0=0.9,
                 learning_rate=2.0,
                 distil_learning_rate=3.0, same_view_negatives=False, clusters=4)
    steps = dnc.make_programs(flags.Namespace(given), MODEL, 7)
    assert set(steps) == {"contrast", ("distil", 0), ("distil", 4)}
    w = {"w": normal(0, 3, 2)}
    for name, knobs in steps.items():
        assert knobs["views"] == augment.Views(0.2, 0.4, *(
            ((0.9, 0.1), (0.0, 0.2)) if name == "contrast" else ((0.5, 0.5), (0.1, 0.1))))
        assert knobs["peak"] == (2.0 if name == "contrast" else 3.0) / 4
        learner = {"params": w, "opt": knobs["optimiser"].init(w)}
        got = dnc.update(learner, {"w": 0 * w["w"]}, knobs["optimiser"], 1.0)
        np.testing.assert_allclose(got["params"]["w"], (1 - 1e-3) * w["w"], rtol=1e-5)  # decays
    assert (steps["contrast"]["temperature"], steps["contrast"]["m0"]) == (0.3, 0.9)
    assert steps["contrast"]["same_view_negatives"] is False


# ------------------------------------------------------------------------------------- probes


def test_nearest_neighbours():
    train, test, label = normal(0, 50, 4), normal(1, 20, 4), np.arange(50) % 6
    for k, temperature in ((20, 0.07), (3, 1.0), (70, 0.5)):
        got = probe.knn_predict(train, label, test, 6, k=k, temperature=temperature, block=8)
        np.testing.assert_array_equal(
            got, slow_dnc.knn_predict(train, label, test, k, temperature, 6))


def test_measures():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 60), rng.integers(0, 7, 60)
    assert probe.balanced_accuracy(a, b) == pytest.approx(slow_dnc.balanced_accuracy(a, b))
    assert probe.nmi(a, b) == pytest.approx(slow_dnc.nmi(a, b))
    assert probe.nmi(a, a) == pytest.approx(1) and probe.nmi([0, 0], [1, 1]) == 1
    label, count = np.array([0, 1, 2, 3, 4, 5]), np.array([5, 60, 1, 50, 7, 2])
    got = probe.by_frequency(np.array([0, 1, 0, 3, 0, 0]), label, count)
    assert got == {"head": 1.0, "middle": 0.5, "tail": 0.0}
    assert probe.by_frequency(label[:1], label[:1], count)["tail"] is None


def test_the_probe_is_at_the_minimum_of_its_loss():
    x, y = normal(0, 60, 4), np.arange(60) % 3
    w, b = probe.fit_probe(x, y, np.ones(60, np.float32), 0.01, 3)
    least = slow_dnc.linear_probe_loss(w, b, x, y, 0.01)
    np.testing.assert_allclose(probe.probe_loss({"w": w, "b": b}, x, y, np.ones(60), 0.01), least,
                               rtol=1e-5)
    for seed in range(20):
        moved = slow_dnc.linear_probe_loss(w + 0.02 * normal(seed, 4, 3),
                                           b + 0.02 * normal(seed + 50, 3), x, y, 0.01)
        assert moved > least
    some = np.arange(60) < 40  # weights leave rows out as if they were not there
    assert_close(probe.fit_probe(x, y, np.float32(some), 0.01, 3),
                 probe.fit_probe(x[some], y[some], np.ones(40, np.float32), 0.01, 3), atol=2e-3)


def test_the_probe_sees_no_test_label_and_any_scale():
    centres = 3 * normal(0, 4, 6)
    y, test_y = np.arange(200) % 4, np.arange(80) % 4
    x, test = centres[y] + normal(1, 200, 6), centres[test_y] + normal(2, 80, 6)
    got, decay = probe.linear_probe(x, y, test, 4)
    assert (got == test_y).mean() > 0.95 and decay in probe.DECAYS
    scaled, same = probe.linear_probe(1e3 * x + 7, y, 1e3 * test + 7, 4)
    assert same == decay and (scaled == got).mean() > 0.98


def test_the_decay_is_chosen_on_a_part_held_out_and_the_probe_fitted_on_all():
    """Labels that are half chance, so that every choice shows."""
    for seed in range(4):
        x, test, label = normal(seed, 80, 30), 1 + normal(seed + 50, 40, 30), np.arange(80) % 3
        x[:40, :3] += np.eye(3)[label[:40]]
        held, kept = np.split(np.random.default_rng(0).permutation(80), [16])
        z, z_test = ((v - x.mean(0)) / x.std(0) for v in (x, test))

        def says(rows, l2, at):
            w, b = probe.fit_probe(z[rows], label[rows], np.ones(len(rows), np.float32), l2, 3)
            return (at @ w + b).argmax(1)
        right = [(says(kept, l2, z[held]) == label[held]).mean() for l2 in probe.DECAYS]
        best = max(range(4), key=lambda i: (right[i], i))  # of equal ones the larger
        got, decay = probe.linear_probe(x, label, test, 3)
        assert decay == probe.DECAYS[best]
        assert (got == says(np.arange(80), decay, z_test)).mean() > 0.97


def test_metrics_are_of_the_test_pool_by_what_training_says():
    """Two of three classes change places in the test pool, which has the rare one most often."""
    label, test_label = (np.repeat(np.arange(3), n) for n in ([40, 30, 20], [5, 7, 9]))
    train = {"h": 4 * np.eye(3)[label] + 0.1 * normal(0, 90, 3), "label": label}
    test = {"h": 4 * np.eye(3)[[0, 2, 1]][test_label] + 0.1 * normal(1, 21, 3), "label": test_label}
    assert probe.knn_metrics(train, test, 3) == pytest.approx(
        {"knn": 5 / 21, "knn_balanced": 1 / 3})
    got = probe.linear_metrics(train, test, 3)
    assert got.pop("probe_decay") in probe.DECAYS
    assert got == pytest.approx({"linear_probe": 5 / 21, "balanced_accuracy": 1 / 3, "head": 1,
                                 "middle": 0, "tail": 0})


def toy(n, split="train"):
    return data.Pool(data.open_source("toy", split, image_size=8, need=("label",),
                                      toy_knobs=dict(n=n)))


def test_features_are_the_whole_image_s_in_evaluation_mode():
    """And an evaluation compares those of the training pool, the first, with the test pool's."""
    net, forward = frozen(0), dnc.make_forward(MODEL)
    pools = toy(64), toy(24).subset(np.arange(20))
    got = [reference.forward_all(net, forward, pool, 8)[0] for pool in pools]
    for pool, g in zip(pools, got):
        truth = pool.read(pool.ids)
        image = (np.float32(truth["image"]) / 255 - augment.MEAN) / augment.DEVIATION
        np.testing.assert_allclose(g["h"], represent(net, image, MODEL), rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(g["label"], truth["label"])
    one = types.SimpleNamespace(config=flags.Namespace(batch_size=8), forward=forward, n_classes=30,
                                pool=pools[0], test_pool=pools[1], label_N=got[0]["label"])
    state = {"learner": {"params": {"encoder": net["params"]}}, "stats": {"encoder": net["stats"]}}
    on_the_way, at_end, clustered = (dnc.Experiment.evaluate(one, state, *how) for how in (
        (False, one.label_N), (True, None), (True, one.label_N % 2)))
    assert on_the_way == probe.knn_metrics(*got, 30)
    assert at_end == on_the_way | probe.linear_metrics(*got, 30)
    assert clustered == at_end | {"nmi": probe.nmi(one.label_N % 2, one.label_N)}


def test_batches_seen_are_means_over_experts():
    rows = [{"arm": f"dnc_expert{j}", "hardness": h, "effective_classes": c}
            for j, h, c in ((0, 3.0, 6.0), (11, 5.0, 7.0))]
    assert dnc.batches_seen([{"arm": "dnc"}, *rows]) == (
        "dnc_expert: 6.5 effective classes in a batch, log sum exp of the negatives 4.00")


# ---------------------------------------------------------------------------- what a stage is given


class FakeStage:
    """In the place of `train.Stage`. It notes in `told[name]` what it is given. A stage that has
    ended before gives its last state again, as a checkpoint does."""

    def __init__(self, told, name, seed, steps, spent=None):
        self.note, self.name, self.steps, self.step = told.setdefault(name, {}), name, steps, 0
        self.note |= {"spent": spent, "totals": (spent or train.Totals()).plus(seconds=1.0)}
        self.totals = self.note["totals"]

    def resume(self, state):
        return self.note.get("end") or self.note.setdefault("start", state)

    def batches(self, load):
        if "end" not in self.note:
            self.note["batches"] = list(load(0))
            yield from enumerate(self.note["batches"])

    def count(self, metrics, **cost):
        self.note |= {"key": metrics, "cost": cost}
        self.step += 1

    ends = property(lambda self: self.step == self.steps)
    evaluates = property(lambda self: self.ends and self.name in ("dnc", "dnc_expert0"))

    def write(self, metrics):
        self.note["metrics"] = metrics

    def save(self, state):
        self.note["end"] = state


def fake_step(state, index, key, batch):
    """Moves what is trained, but not the momentum encoder, by an amount of its own."""
    by = 1e-3 * float(jax.random.uniform(key))
    learner, stats = jax.tree.map(lambda x: np.asarray(x) + by, (state["learner"], state["stats"]))
    return {**state, "learner": learner, "stats": stats}, jax.random.key_data(key).tolist()


def by_label(net, batch):
    """In the place of `make_forward`: representations in three directions, of any length."""
    rows = {k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items()}
    length = 10 ** (rows["image"][:, 0, 0, :1] / 128.0 - 1)
    return {"h": np.float32(length * np.eye(3)[rows["label"] % 3]),
            "label": rows["label"], "valid": rows["valid"]}


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """Of each of two seeds: pool, {stage: what it was given}, {arm: clusters}."""
    out = []
    for seed in (0, 1):
        told, pool, folder = {}, toy(120), tmp_path_factory.mktemp("experiment")
        one = dnc.Experiment(
            config=flags.Namespace(CONFIG, batch_size=8, clusters=3, steps=24), seed=seed,
            run=types.SimpleNamespace(path=lambda name: str(folder / name),
                                      stage=functools.partial(FakeStage, told)),
            model=MODEL, pool=pool, label_N=pool.read(pool.ids)["label"], test_pool=toy(8),
            n_classes=30, forward=by_label,
            programs={k: fake_step for k in ("contrast", ("distil", 0), ("distil", 3))})
        out.append((pool, told, {arm: one.run_arm(arm, steps) for arm, steps in
                                 dnc.budget(one.config, MODEL, 120).items()}))
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_experts_train_on_their_clusters_from_the_base(experiments, seed):
    pool, told, found = experiments[seed]
    place = {x.tobytes(): i for i, x in enumerate(pool.read(pool.ids)["image"])}
    assert len(place) == 120
    base = dnc.encoder_of(told["base"]["end"])
    for arm in dnc.DIVIDES:
        cluster_N, student = found[arm], told[arm]
        experts = [told[f"{arm}_expert{j}"] for j in range(3)]

        def clusters(stage):
            return [cluster_N[[place[x.tobytes()] for x in b["image"].reshape(-1, 8, 8, 3)]]
                    for b in stage["batches"]]
        for j, expert in enumerate(experts):
            assert (np.array(clusters(expert)) == j).all()
            assert_close(dnc.encoder_of(expert["start"]), base, rtol=0)
            assert expert["start"]["total"] == len(expert["batches"])
            assert expert["cost"]["flops"] == {"experts": dnc.contrast_flops(8, MODEL)}
        assert sum(len(expert["batches"]) for expert in experts) == 12
        np.testing.assert_array_equal([b["cluster"].ravel() for b in student["batches"]],
                                      clusters(student))
        assert_close(student["start"]["base"], base, rtol=0)
        assert_close(student["start"]["experts"], stacked([
            dnc.encoder_of(expert["end"]) for expert in experts]), rtol=0)
        assert not np.array_equal(jax.tree.leaves(dnc.encoder_of(student["start"]))[0],
                                  jax.tree.leaves(base)[0])
        assert len({str(s["key"]) for s in (told["base"], student, *experts)}) == 5
        for before, after in itertools.pairwise([*experts, student]):
            assert after["spent"] == before["totals"]
        assert student["cost"]["flops"] == {
            "distillation": dnc.distil_flops(8, MODEL, 3)}


@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_go_by_direction_and_are_made_and_charged_once(experiments, seed):
    pool, told, found = experiments[seed]
    label_N = pool.read(pool.ids)["label"]
    assert probe.nmi(found["dnc"], label_N % 3) == pytest.approx(1)
    for arm in dnc.DIVIDES:
        expected = dnc.partition(arm, found["dnc"], label_N, 3, seed)
        np.testing.assert_array_equal(found[arm], expected)
    first, again, oracle = (told[f"{arm}_expert0"]["spent"] for arm in dnc.DIVIDES)
    assert first == again and first.seconds > 1 and first.examples_scored == 120
    assert set(first.flops) == {"clustering"} and oracle == told["base"]["totals"]
    assert told["dnc"]["metrics"]["nmi"] == probe.nmi(found["dnc"], label_N)
    assert "linear_probe" in told["dnc"]["metrics"] and told["dnc_expert0"]["metrics"] == {}


def test_controls_have_no_experts(experiments):
    _, told, found = experiments[0]
    student, flops_steps = told["self_distil"], told["moclr_flops"]["start"]["total"]
    assert "experts" not in student["start"] and "cluster" not in student["batches"][0]
    assert_close(student["start"]["base"], dnc.encoder_of(told["base"]["end"]), rtol=0)
    assert len(student["batches"]) == len(told["dnc"]["batches"]) + 12
    assert student["spent"] == told["base"]["totals"]
    for arm, steps in (("moclr", 24), ("moclr_flops", flops_steps)):
        assert len(told[arm]["batches"]) == steps
        assert found[arm] is None and told[arm]["spent"] is None
        assert told[arm]["cost"] == {"trained": 8, "scored": 8,
                                     "flops": {"base": dnc.contrast_flops(8, MODEL)}}


@pytest.mark.parametrize("name", ["moclr", "base", "dnc_expert0", "dnc"])
def test_seeds_are_different_runs(experiments, name):
    one, two = (told[name] for _, told, _ in experiments)
    assert one["key"] != two["key"]
    assert not np.array_equal(*(x["batches"][0]["image"] for x in (one, two)))
    stem = lambda x: x["start"]["learner"]["params"]["encoder"]["stem"]["w"]
    assert not np.array_equal(stem(one), stem(two))


def test_no_stage_shares_a_key_with_another():
    """Nor a key that is made of one: split and fold_in make the same keys of one parent."""
    one = types.SimpleNamespace(seed=3)
    seen = set()
    for fold in range(5):  # base, student, three experts
        keys = list(dnc.Experiment.keys(one, fold))
        made = {jax.random.key_data(k).tobytes() for parent in keys
                for k in (parent, *(jax.random.fold_in(parent, i) for i in range(8)))}
        assert len(made) == 3 * 9 and not seen & made
        seen |= made
