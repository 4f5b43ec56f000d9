"""Joint selection does what the paper prints, streaming or dense, on any number of devices."""

import functools
import math

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import devices, report, run, vit
import jest
import slow_jest
from test_rho_learnability import dot_flops, sharded

KINDS = tuple(jest.SCORES)


def side(rng, B, E=6, t=7.0, b=-2.0):
    z = lambda: rng.normal(size=(B, E)).astype(np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    image = unit(z())
    return {"image": image, "text": unit(image + z()), "log_t": np.float32(np.log(t)),
            "b": np.float32(b)}


def two_sides(seed, B):
    """Learner and reference with different embeddings, temperatures and biases."""
    rng = np.random.default_rng(seed)
    return side(rng, B), side(rng, B, t=4.0, b=-1.0)


def slow(s):
    return (np.float64(s["image"]), np.float64(s["text"]), float(np.exp(np.float64(s["log_t"]))),
            float(s["b"]))


def noise(key, n_chunks, B):
    """The Gumbel noise that `jest.draw` adds, chunk by chunk."""
    return [np.float64(jax.random.gumbel(jax.random.fold_in(key, k), (B,)))
            for k in range(n_chunks)]


# ------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_losses_and_their_gradients_are_the_whole_batch_s(on_devices, loss, n):
    s, _ = two_sides(0, 8)

    def step(shift, rows):
        def local(shift):
            return jest.contrastive_loss({**rows, "image": rows["image"] + shift,
                                          "log_t": s["log_t"], "b": s["b"]}, loss,
                                         devices.AXIS)
        return devices.mean(jax.value_and_grad(local)(shift))
    rows = sharded({k: s[k] for k in ("image", "text")}, n)
    got, grad = on_devices(n, step, np.zeros(6, np.float32), rows, in_axes=(None, 0))

    def expected(shift):
        z_im, z_txt, t, b = slow(s)
        return (slow_jest.sigmoid_loss(z_im + shift, z_txt, t, b) if loss == "sigmoid" else
                slow_jest.softmax_loss(z_im + shift, z_txt, t))
    np.testing.assert_allclose(got, expected(0), rtol=1e-5)
    h = 1e-5
    finite = [(expected(h * d) - expected(-h * d)) / (2 * h) for d in np.eye(6)]
    np.testing.assert_allclose(grad, finite, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("B,tile", [(9, 4), (130, 50)])  # 130: three groups of 64 at most, padded
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_loss_of_each_pair_in_its_batch(loss, B, tile):
    s, _ = two_sides(1, B)
    got = jest.losses_in_batch(s, loss, tile=tile)
    z_im, z_txt, t, b = slow(s)
    if loss == "sigmoid":
        np.testing.assert_allclose(got, slow_jest.pair_losses(z_im, z_txt, t, b).sum(1), rtol=1e-5)
    np.testing.assert_allclose(got.mean(), slow_jest.sigmoid_loss(z_im, z_txt, t, b)
                               if loss == "sigmoid" else slow_jest.softmax_loss(z_im, z_txt, t),
                               rtol=1e-5)


# ------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("kind", KINDS)
def test_score_matrix(kind):
    learner, reference = two_sides(2, 7)
    got = jest.score_matrix(kind, learner, reference)
    expected = slow_jest.score_matrix(kind, slow(learner), slow(reference))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["self", "uniform"])
@pytest.mark.parametrize("n_chunks", [1, 3, 8])
def test_dense_is_the_slow_algorithm(n_chunks, first):
    S = np.random.default_rng(3).normal(size=(20, 20)).astype(np.float32)
    key = jax.random.key(3)
    got = jest.jointly_sample_dense(key, jnp.array(S), 8, n_chunks, first=first)
    sizes = jest.chunk_sizes(8, n_chunks)
    expected = slow_jest.joint_sample(np.float64(S), noise(key, n_chunks, 20), sizes, first)
    np.testing.assert_array_equal(got, np.concatenate(expected))


streaming = jax.jit(jest.jointly_sample, static_argnums=(3, 4),
                    static_argnames=("kind", "loss", "first", "temperature", "tile"))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_streaming_is_dense(data):
    B = data.draw(st.integers(2, 24))
    b = data.draw(st.integers(1, B))
    n_chunks = data.draw(st.integers(1, b))
    knobs = dict(first=data.draw(st.sampled_from(["self", "uniform"])),
                 temperature=data.draw(st.sampled_from([1.0, 0.3])))
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(0, 99))
    learner, reference = two_sides(seed, B)
    key = jax.random.key(seed)
    dense = jest.jointly_sample_dense(key, jest.score_matrix(kind, learner, reference), b,
                                      n_chunks, **knobs)
    got = streaming(key, learner, reference, b, n_chunks, kind=kind, tile=5, **knobs)
    np.testing.assert_array_equal(got, dense)
    assert len(set(got.tolist())) == b and 0 <= got.min() and got.max() < B


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_chunks", [1, 3, 7])
def test_softmax_draws_by_its_conditional_score(kind, n_chunks):
    B, b, key = 15, 7, jax.random.key(5)
    learner, reference = two_sides(5, B)
    got = streaming(key, learner, reference, b, n_chunks, kind=kind, loss="softmax")
    gumbel, expected = noise(key, n_chunks, B), []
    for k, size in enumerate(jest.chunk_sizes(b, n_chunks)):
        logits = np.array([slow_jest.softmax_conditional(
            i, list(expected), slow(learner), slow(reference), kind) for i in range(B)])
        logits += gumbel[k]
        logits[expected] = -np.inf
        expected += np.argsort(-logits)[:size].tolist()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_picks_are_the_same_on_any_number_of_devices(on_devices, loss):
    learner, reference = two_sides(6, 32)

    def picks(key, rows):
        sides = [{**r, "log_t": s["log_t"], "b": s["b"]}
                 for r, s in zip(rows, (learner, reference))]
        joint = jest.jointly_sample(key, *sides, 13, 4, loss=loss, axis=devices.AXIS)
        alone = jest.independently_sample(key, *sides, 13, loss=loss, score="super_batch",
                                          axis=devices.AXIS)
        return joint, alone
    rows = [{k: s[k] for k in ("image", "text")} for s in (learner, reference)]
    key = jax.random.key(6)
    one, eight = (on_devices(n, picks, key, sharded(rows, n), in_axes=(None, 0)) for n in (1, 8))
    for a, b in zip(one, eight):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one[0], streaming(key, learner, reference, 13, 4, loss=loss))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_independent_scores(temperature):
    learner, reference = two_sides(7, 12)
    key = jax.random.key(7)

    def expected(scores):
        return np.argsort(-(scores / temperature + noise(key, 1, 12)[0]))[:5]
    got = jest.independently_sample(key, learner, reference, 5, score="super_batch",
                                    temperature=temperature)
    scores = sum(sign * slow_jest.pair_losses(*slow(s)).sum(1)
                 for sign, s in ((1, learner), (-1, reference)))
    np.testing.assert_array_equal(got, expected(scores))
    alone = jest.independently_sample(key, learner, reference, 5, temperature=temperature)
    S = slow_jest.score_matrix("learnability", slow(learner), slow(reference))
    np.testing.assert_array_equal(alone, expected(np.diag(S)))


@given(st.integers(1, 10**6), st.data())
def test_quotas_are_exact(b, data):
    n_chunks = data.draw(st.integers(1, min(b, 64)))
    sizes = jest.chunk_sizes(b, n_chunks)
    assert len(sizes) == n_chunks and sum(sizes) == b
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert sorted(sizes) == sorted(slow_jest.quotas(b, n_chunks))


def test_the_paper_s_quotas():
    assert jest.chunk_sizes(163_840 - 163_840 * 8 // 10, 16) == [2048] * 16


def test_numbers_that_are_not_are_drawn_last():
    learner, reference = two_sides(8, 10)
    learner["image"][[2, 5]] = np.nan
    for seed in range(20):
        got = streaming(jax.random.key(seed), learner, reference, 8, 1)
        assert not set(got.tolist()) & {2, 5}


def test_planted_pairs_are_found_and_by_the_right_models():
    """Pairs that the reference knows and the learner does not; one that mixed the two models up
    would take the others."""
    B, planted = 64, np.arange(0, 64, 4)
    rng = np.random.default_rng(9)
    learner, reference = side(rng, B, E=16), side(rng, B, E=16)
    knows = np.isin(np.arange(B), planted)  # the reference; the learner knows all the others
    for s, good in ((learner, ~knows), (reference, knows)):
        s["text"] = s["image"] * np.where(good, 1, -1)[:, None].astype(np.float32)
    picks = {kind: np.stack([streaming(jax.random.key(i), learner, reference, 16, 4, kind=kind)
                             for i in range(5)]) for kind in KINDS}
    hit = {kind: np.isin(p, planted).mean() for kind, p in picks.items()}
    assert min(hit.values()) > 0.8, hit
    learner, reference = reference, learner
    swapped = np.stack([streaming(jax.random.key(i), learner, reference, 16, 4) for i in range(5)])
    assert np.isin(swapped, planted).mean() < 0.1


def test_sampling_follows_the_softmax():
    """One chunk of one: the picks of many keys, against their probabilities."""
    learner, reference = two_sides(10, 6)
    S = slow_jest.score_matrix("learnability", slow(learner), slow(reference))
    expected = slow_jest.chunk_probabilities(S, [])
    keys = jax.random.split(jax.random.key(10), 20_000)
    picks = jax.vmap(lambda k: jest.jointly_sample(k, learner, reference, 1, 1))(keys)
    counted = np.bincount(np.ravel(picks), minlength=6)
    chi2 = ((counted - 20_000 * expected)**2 / (20_000 * expected)).sum()
    assert chi2 < 25.7  # the 1e-4 quantile for 5 degrees of freedom


def test_more_chunks_are_worth_more():
    """The curve of the paper's Fig. 2: batch learnability rises with the number of chunks and is
    flat from 16 on, near what single-site Gibbs sampling of the same distribution settles at."""
    B, b = 320, 64
    learner, reference = two_sides(11, B)
    S = slow_jest.score_matrix("learnability", slow(learner), slow(reference))
    value = lambda T: S[np.ix_(T, T)].sum() / b
    mean = {n: np.mean([value(np.asarray(streaming(jax.random.key(i), learner, reference, b, n)))
                        for i in range(10)]) for n in (1, 2, 4, 16, 32)}
    uniform = np.mean([value(np.random.default_rng(i).permutation(B)[:b]) for i in range(10)])
    rng, plateau = np.random.default_rng(0), []
    T = list(rng.permutation(B)[:b])
    for i in range(2000):
        T = slow_jest.gibbs_step(S, T, T[rng.integers(b)], rng.gumbel(size=B))
        if i >= 1000 and i % 20 == 0:
            plateau.append(value(T))
    gain = {n: (m - uniform) / (np.mean(plateau) - uniform) for n, m in mean.items()}
    assert 0 < gain[1] < gain[2] < gain[4] < gain[16], gain
    assert gain[16] > 0.97 * gain[32] and 0.8 < gain[16] < 1.05, gain


# ------------------------------------------------------------------------------------ Flexi-JEST


@pytest.mark.parametrize("old,new", [(4, 8), (8, 4), (4, 6), (5, 5)])
def test_pi_resize(old, new):
    w = np.random.default_rng(12).normal(size=(old, old))
    m = jest.pi_resize(old, new)
    np.testing.assert_allclose(m @ w @ m.T, slow_jest.pi_resize_kernel(w, new), atol=1e-5)


def tiny(loss="sigmoid", size="16/1/32/2", patch=4, side=16):
    return jest.Model(loss, vit.ViT(size, side, patch, 6, channels=2, pool="map"),
                      vit.Text(size, 20, 5, 6, pool="map"))


def params_of(model, seed=0):
    rng = np.random.default_rng((7, seed))
    shapes = jax.eval_shape(lambda: jest.init(jax.random.key(0), model))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32((path[-1].key == "scale") + 0.4 * rng.normal(size=x.shape)),
        shapes)


def pairs(n, side=16, seed=0):
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(0, 256, (n, side, side, 2)).astype(np.uint8),
            "tokens": rng.integers(1, 20, (n, 5)).astype(np.int32),
            "noisy": rng.random(n) < 0.5, **{f"at{i}": np.arange(n) == i for i in range(n)}}


def coarse_side(params, batch):
    """At patch 8, twice the stored one."""
    params, model = jest.at_patch(params, tiny(), 8)
    return jest.embed(params, batch, model)


def test_an_upsampled_image_gives_the_same_tokens():
    model = tiny()
    params = params_of(model)
    coarse, cut = jest.at_patch(params, model, 8)
    patch = np.random.default_rng(13).normal(size=(4, 4, 2))
    large = np.stack([slow_jest.resize_image(patch[..., c], 8) for c in range(2)], -1)
    tokens = [vit.dense(p["image"]["embed"], x.reshape(1, -1).astype(np.float32))
              for p, x in ((params, patch), (coarse, large))]
    np.testing.assert_allclose(*tokens, atol=1e-4)
    assert cut.image.patch == 8 and cut.image.tokens == 4
    assert coarse["image"]["position"].shape == (4, 16)


def test_the_stored_patch_changes_nothing():
    model = tiny()
    params = params_of(model)
    same, cut = jest.at_patch(params, model, 4)
    assert cut == model
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), same, params)


def test_positions_are_resized_bilinearly():
    model = tiny()
    params = params_of(model)
    got = jest.at_patch(params, model, 8)[0]["image"]["position"].reshape(2, 2, 16)
    old = params["image"]["position"].reshape(4, 4, 16)
    for d in range(16):
        np.testing.assert_allclose(got[..., d], slow_jest.resize_image(old[..., d], 2), atol=1e-5)


def test_flexi_batch_is_half_coarse():
    model = tiny()
    params, batch = params_of(model), pairs(8)
    got = jest.embed_flexi(params, batch, model, 8)
    fine = jest.embed(params, batch, model)
    coarse = coarse_side(params, batch)
    np.testing.assert_allclose(got["image"][:4], fine["image"][0::2], atol=1e-5)
    np.testing.assert_allclose(got["image"][4:], coarse["image"][1::2], atol=1e-5)
    np.testing.assert_allclose(got["text"], fine["text"][np.r_[0:8:2, 1:8:2]], atol=1e-5)
    assert abs(coarse["image"] - fine["image"]).max() > 1e-2


def test_spearman():
    x, y = np.random.default_rng(14).normal(size=(2, 30))
    y = y + x
    np.testing.assert_allclose(jest.spearman(jnp.array(x), jnp.array(y)),
                               slow_jest.spearman(x, y), rtol=1e-5)
    assert jest.spearman(jnp.array(x), jnp.array(np.exp(x))) == pytest.approx(1)


# -------------------------------------------------------------------------------------- the step

OPTIMISER = optax.sgd(0.1, momentum=0.5)  # not Adam: it would hide a gradient that is too large


@functools.cache
def program(method, n=1, kind="learnability", loss="sigmoid", **knobs):
    step = functools.partial(
        jest.jest_step, method=method, kind=kind, n_select=8, model=tiny(loss),
        reference_model=tiny(loss, "8/1/16/1"), optimiser=OPTIMISER, n_chunks=3,
        low_patch=8 if method == "flexi_jest" else 0, **knobs)
    return jax.pmap(step, axis_name=devices.AXIS, in_axes=(None, None, None, 0),
                    out_axes=None, devices=jax.devices()[:n])


def first_state(loss="sigmoid"):
    params = params_of(tiny(loss))
    return {"learner": {"params": params, "opt": OPTIMISER.init(params)},
            "reference": params_of(tiny(loss, "8/1/16/1"), 1)}


def run_steps(method, n, *, steps=3, **knobs):
    state = first_state(knobs.get("loss", "sigmoid"))
    for i in range(steps):
        state, metrics = devices.to_host(program(method, n, **knobs)(
            state, np.int32(i), jax.random.key(0), sharded(pairs(16, seed=i), n)))
    return state, metrics


def picked(metrics, n=16):
    return np.flatnonzero([metrics[f"picked_at{i}"] > 0 for i in range(n)])


@pytest.mark.parametrize("method,loss", [("jest", "sigmoid"), ("jest", "softmax"),
                                         ("flexi_jest", "sigmoid"), ("independent", "sigmoid")])
def test_one_device_is_four(method, loss):
    one, four = (run_steps(method, n, loss=loss) for n in (1, 4))
    np.testing.assert_array_equal(picked(one[1]), picked(four[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), *[
        x[0]["learner"]["params"] for x in (one, four)])


@pytest.mark.parametrize("method,kind", [("jest", "learnability"), ("jest", "easy_reference"),
                                         ("jest", "hard_learner"), ("independent", "learnability")])
def test_the_step_picks_by_both_models_and_trains_on_the_picks(method, kind):
    state, batch, key = first_state(), pairs(16), jax.random.key(0)
    after, metrics = run_steps(method, 1, steps=1, kind=kind)
    sides = (jest.embed(state["learner"]["params"], batch, tiny()),
             jest.embed(state["reference"], batch, tiny(size="8/1/16/1")))
    sizes = (8, 3) if method == "jest" else (8, 1)
    picks = np.sort(jest.jointly_sample(jax.random.fold_in(key, 0), *sides, *sizes, kind=kind))
    np.testing.assert_array_equal(picked(metrics), picks)

    def loss_of(params):
        s = jest.embed(params, {k: batch[k][picks] for k in ("image", "tokens")}, tiny())
        return jest.sigmoid_loss(s["image"], s["text"], s["log_t"], s["b"])
    loss, grads = jax.value_and_grad(loss_of)(state["learner"]["params"])
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state["learner"]["params"], grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 after["learner"]["params"], expected)
    jax.tree.map(np.testing.assert_array_equal, after["reference"], state["reference"])


@pytest.mark.parametrize("method,knobs", [
    ("jest", {"temperature": 0.05}), ("jest", {"first": "uniform", "temperature": 0.1}),
    ("independent", {"temperature": 0.05}), ("independent", {"independent_score": "super_batch"})])
def test_the_step_draws_as_it_is_told(method, knobs):
    state, batch, key = first_state(), pairs(16, seed=2), jax.random.fold_in(jax.random.key(0), 0)
    _, metrics = program(method, **knobs)(state, np.int32(0), jax.random.key(0), sharded(batch, 1))
    sides = (jest.embed(state["learner"]["params"], batch, tiny()),
             jest.embed(state["reference"], batch, tiny(size="8/1/16/1")))

    def draw(independent_score="self", **knobs):
        return set((jest.jointly_sample(key, *sides, 8, 3, **knobs) if method == "jest" else
                    jest.independently_sample(key, *sides, 8, score=independent_score, **knobs)
                    ).tolist())
    assert set(picked(metrics).tolist()) == draw(**knobs)
    assert draw(**dict(list(knobs.items())[1:])) != draw(**knobs)  # the first is seen in the picks


def test_flexi_scores_coarsely_and_trains_half_and_half():
    state, batch = first_state(), pairs(16)
    _, metrics = run_steps("flexi_jest", 1, steps=1)
    learner = coarse_side(state["learner"]["params"], batch)
    reference = jest.embed(state["reference"], batch, tiny(size="8/1/16/1"))
    picks = np.sort(jest.jointly_sample(jax.random.fold_in(jax.random.key(0), 0), learner,
                                        reference, 8, 3))
    np.testing.assert_array_equal(picked(metrics), picks)
    rows = {k: batch[k][picks] for k in ("image", "tokens")}
    s = jest.embed_flexi(state["learner"]["params"], rows, tiny(), 8)
    np.testing.assert_allclose(metrics["loss"], jest.sigmoid_loss(
        s["image"], s["text"], s["log_t"], s["b"]), rtol=1e-5)
    _, plain = run_steps("flexi_jest", 1, steps=1, cotrain=False)
    s = jest.embed(state["learner"]["params"], rows, tiny())
    np.testing.assert_allclose(plain["loss"], jest.sigmoid_loss(
        s["image"], s["text"], s["log_t"], s["b"]), rtol=1e-5)


def test_cached_reference_is_the_computed_one():
    state, batch = first_state(), pairs(16)
    reference = jest.embed(state["reference"], batch, tiny(size="8/1/16/1"))
    cached = {**state, "reference": jest.affine(state["reference"])}
    given = {**batch, "reference_image": np.array(reference["image"]),
             "reference_text": np.array(reference["text"])}
    results = [program("jest")(s, np.int32(0), jax.random.key(0), sharded(x, 1))
               for s, x in ((state, batch), (cached, given))]
    np.testing.assert_array_equal(picked(results[0][1]), picked(results[1][1]))
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-5)


def test_uniform_trains_on_the_batch_as_it_comes():
    state, batch = first_state(), {k: v[:8] for k, v in pairs(16).items()}
    _, metrics = program("uniform")(state, np.int32(0), jax.random.key(0), sharded(batch, 1))
    s = jest.embed(state["learner"]["params"], batch, tiny())
    np.testing.assert_allclose(metrics["loss"], jest.sigmoid_loss(
        s["image"], s["text"], s["log_t"], s["b"]), rtol=1e-5)


def test_adam_clips_decays_linear_maps_and_ends_at_zero():
    params = {"x": {"w": jnp.array([1.0, 2.0]), "b": jnp.array([1.0])}}
    rule = jest.adam(0.1, 10, warmup=0.2, weight_decay=0.5, clip_norm=1.0)
    opt, grads = rule.init(params), jax.tree.map(lambda x: 100 * x, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    first, opt = rule.update(grads, opt, params)
    assert all(abs(x).max() == 0 for x in jax.tree.leaves(first))  # warm-up starts at 0
    second, opt = rule.update(zero, opt, params)
    m, v, norm = 0.1, 0.05, math.sqrt(1 + 4 + 1)  # the clipped gradient, seen once of two times
    g = np.array([1.0, 2.0]) / norm
    adam = (0.9 * m * g / (1 - 0.9**2)) / np.sqrt(0.95 * v * g**2 / (1 - 0.95**2))
    np.testing.assert_allclose(second["x"]["w"], -0.05 * (adam + 0.5 * np.array([1.0, 2.0])),
                               rtol=1e-4)
    np.testing.assert_allclose(second["x"]["b"], -0.05 * adam[:1], rtol=1e-4)
    for _ in range(8):
        last, opt = rule.update(grads, opt, params)
    assert abs(rule.update(grads, opt, params)[0]["x"]["w"]).max() < 1e-6


@pytest.mark.parametrize("low_patch", [0, 8])
def test_the_diagnosis_of_a_super_batch_is_the_slow_one(on_devices, low_patch):
    """Picks and self-scores as they were drawn (coarse if flexi); their values at the full patch."""
    state, batch, key = first_state(), pairs(16), jax.random.key(3)
    small = tiny(size="8/1/16/1")
    look = functools.partial(
        jest.diagnose, kind="learnability", n_select=8, model=tiny(), reference_model=small,
        n_chunks=3, first="self", temperature=1.0, low_patch=low_patch, independent_score="self")
    metrics, self_B, pick_S = on_devices(1, look, state, key, sharded(batch, 1),
                                         in_axes=(None, None, 0))
    params, reference = state["learner"]["params"], jest.embed(state["reference"], batch, small)
    full = used = jest.embed(params, batch, tiny()), reference
    if low_patch:
        used = coarse_side(params, batch), reference
    S, S_used = (slow_jest.score_matrix("learnability", *map(slow, x)) for x in (full, used))
    joint = {name: jest.jointly_sample(key, *x, 8, 3)
             for name, x in (("used", used), ("full", full))}
    for name, picks in (("uniform", np.arange(8)), ("joint", joint["used"]),
                        ("independent", jest.independently_sample(key, *used, 8))):
        value = S[np.ix_(picks, picks)].sum() / 8
        np.testing.assert_allclose(metrics[f"score_{name}"], value, rtol=1e-3)
    np.testing.assert_array_equal(pick_S, joint["used"])
    np.testing.assert_allclose(self_B, np.diag(S_used), rtol=1e-3, atol=1e-4)
    assert ("rank_correlation" in metrics) == bool(low_patch)
    if low_patch:
        np.testing.assert_allclose(metrics["rank_correlation"], slow_jest.spearman(
            np.diag(S_used), np.diag(S)), atol=1e-5)
        overlap = np.isin(joint["used"], joint["full"]).mean()
        assert metrics["pick_overlap"] == overlap < 1


# -------------------------------------------------------------------------------------- the bill


def relative(method, f, A, reuse):
    b = 32_768
    B = round(b / (1 - f))
    bill = jest.step_flops(method, "learnability", b, B, 1.0, F_low=A, reuse=reuse)
    return (bill["learner"] + bill["actor_scoring"]) / (3 * b)


def test_the_paper_s_iteration_costs():
    assert relative("jest", 0.8, 0, True) == pytest.approx(7 / 3)  # 233 %
    assert relative("jest", 0.8, 0, False) == pytest.approx(8 / 3)  # 267 %
    assert relative("flexi_jest", 0.8, 0.28, False) == pytest.approx(1.107, abs=1e-3)  # 110 %
    assert relative("uniform", 0.8, 0, False) == 1
    for f in (0.5, 0.8, 0.9):
        for reuse in (True, False):
            assert relative("jest", f, 0, reuse) == pytest.approx(
                slow_jest.iteration_cost(f, reuse=reuse))
        assert relative("flexi_jest", f, 0.3, True) == pytest.approx(
            slow_jest.iteration_cost(f, A=0.3))


def test_a_coarse_forward_is_computed_not_quoted():
    """The paper's 0.28 holds for 16 text tokens; with 64 it is 0.39."""
    A = {}
    for context in (16, 64):
        model = jest.Model("sigmoid", vit.ViT("B", 256, 16, 768, pool="map"),
                           vit.Text("B", 32_000, context, 768, pool="map"))
        A[context] = jest.forward_flops(jest.cut_at(model, 32)) / jest.forward_flops(model)
    assert A[16] == pytest.approx(0.28, abs=0.01) and A[64] == pytest.approx(0.39, abs=0.01)


def test_every_role_is_charged_where_it_is_spent():
    args = dict(batch_size=10, B=50, F=7.0)
    bill = lambda method, kind="learnability", **k: jest.step_flops(method, kind, **args, **k)
    assert {k: v for k, v in bill("uniform").items() if v} == {"learner": 210}
    assert bill("jest", F_reference=2.0)["reference_scoring"] == 100
    assert bill("jest", "hard_learner", F_reference=2.0)["reference_scoring"] == 0
    assert bill("jest", "easy_reference")["actor_scoring"] == 0
    assert bill("jest")["actor_scoring"] == 350
    flexi = bill("flexi_jest", F_low=3.0)
    assert flexi["learner"] == 150 and flexi["actor_scoring"] == 150
    assert bill("flexi_jest", F_low=3.0, cotrain=False)["learner"] == 210
    assert bill("jest", n_chunks=5)["selection"] > bill("independent", n_chunks=5)["selection"]
    assert set(bill("jest")) <= set(report.LEVELS["no_amortisation"])


@pytest.mark.parametrize("n_chunks", [3, 1, "super_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_s_products_are_those_of_its_bill(kind, n_chunks):
    """Matrix products of the traced sampler, loops included, against 2 E per element."""
    B, b, E = 40, 12, 8
    side = {"image": np.ones((B, E), np.float32), "text": np.ones((B, E), np.float32),
            "log_t": np.float32(1), "b": np.float32(0)}
    if n_chunks == "super_batch":
        draw, added, n_chunks = functools.partial(jest.independently_sample, score=n_chunks), B, 1
        billed = jest.sampler_flops(kind, b, B, 1, E, "super_batch")
    else:
        draw = functools.partial(jest.jointly_sample, n_chunks=n_chunks, tile=10)
        added, billed = b - b // n_chunks, jest.sampler_flops(kind, b, B, n_chunks, E)
    traced = jax.make_jaxpr(lambda key: draw(key, side, side, n_select=b, kind=kind))(
        jax.random.key(0))
    models = len(jest.SCORES[kind])
    counted = dot_flops(traced.jaxpr)
    assert counted == models * (2 * B * added * 2 * E + B * 2 * E)
    rest = models * 5 * (2 * B * added + B) + n_chunks * B * (3 + B.bit_length())
    assert billed == counted + rest


# ---------------------------------------------------------------------------------- main's pieces


def test_arms_are_a_method_and_a_score():
    assert jest.split_arm("jest") == ("jest", "learnability")
    assert jest.split_arm("flexi_jest_hard_learner") == ("flexi_jest", "hard_learner")
    with pytest.raises(ValueError, match="--arms"):
        jest.split_arm("uniform_easy_reference")
    with pytest.raises(ValueError, match="--arms"):
        jest.split_arm("jest_magic")


@pytest.mark.parametrize("f,b,B", [(0.8, 128, 640), (0.9, 64, 640), (0.5, 32, 64), (0.0, 7, 7),
                                   (0.8, 32_768, 163_840), (0.9, 32_768, 327_680)])
def test_super_batches_are_whole(f, b, B):
    assert jest.super_batch_size(run.Namespace(batch_size=b, filter_ratio=f)) == B


def test_no_super_batch_in_parts():
    with pytest.raises(ValueError, match="--filter_ratio=0.7"):
        jest.super_batch_size(run.Namespace(batch_size=10, filter_ratio=0.7))


def test_first_weights():
    params = jest.init(jax.random.key(0), tiny())
    assert float(params["b"]) == -10 and float(jnp.exp(params["log_t"])) == pytest.approx(10)
    assert "b" not in jest.init(jax.random.key(0), tiny("softmax"))
