"""common/vit.py: the gradients that are written by hand, and the ways to run the blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import vit


def plain_layer_norm(p, x, eps=1e-6):
    """The definition, for autodiff to differentiate."""
    z = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps)
    return z * p["scale"] + p["bias"]


def norm_example(shape, dtype=np.float64):
    rng = np.random.default_rng(len(shape))
    p = {"scale": rng.normal(1, 0.5, shape[-1]), "bias": rng.normal(size=shape[-1])}
    x = rng.normal(3, 2, shape) * rng.uniform(0.1, 10, (*shape[:-1], 1))
    return p, x.astype(dtype), rng.normal(size=shape)  # the last weighs the outputs in a loss


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 7)])
def test_layer_norm_and_its_gradients_are_those_of_the_definition(shape):
    p, x, weight = norm_example(shape)
    with jax.enable_x64(True):
        values = [fn(p, jnp.asarray(x)) for fn in (vit.layer_norm, plain_layer_norm)]
        np.testing.assert_allclose(*values, rtol=1e-12, atol=1e-12)
        ours, autodiff = (
            jax.grad(lambda p, x: (fn(p, x) * weight).sum(), (0, 1))(p, jnp.asarray(x))
            for fn in (vit.layer_norm, plain_layer_norm))
        assert jax.tree.structure(ours) == jax.tree.structure(autodiff)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(autodiff)):
            assert one.dtype == np.float64
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


def test_layer_norm_of_bfloat16_is_computed_in_float32():
    p, x, weight = norm_example((3, 4, 64))
    p, x = jax.tree.map(jnp.float32, p), jnp.asarray(x, jnp.bfloat16)
    loss = lambda fn, p, x: (fn(p, x).astype(jnp.float32) * weight).sum()
    assert vit.layer_norm(p, x).dtype == jnp.bfloat16
    grads = jax.grad(functools.partial(loss, vit.layer_norm), (0, 1))(p, x)
    exact = jax.grad(functools.partial(loss, plain_layer_norm), (0, 1))(p, x.astype(jnp.float32))
    assert grads[0]["scale"].dtype == jnp.float32 and grads[1].dtype == jnp.bfloat16
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(exact)):
        # The gradient that arrives is float32 here, so that only the rounding of the inputs, of the
        # outputs and of the result itself is left: 2^-8 of each number.
        tolerance = 2**-7 * abs(other).max()
        np.testing.assert_allclose(np.float32(one), other, rtol=2**-7, atol=tolerance)


TOWERS = {"image": (vit.vit_init, vit.vit_apply, vit.ViT("8/3/12/2", 8, 4, 5, pool="map")),
          "text": (vit.text_init, vit.text_apply, vit.Text("8/3/12/2", 9, 6, 5))}


def example(tower):
    """apply, config, parameters and inputs."""
    init, apply, config = TOWERS[tower]
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), config))
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    x = (rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32) if tower == "image" else
         rng.integers(0, 9, (3, 6)))
    return apply, config, params, x


@pytest.mark.parametrize("tower", TOWERS)
def test_every_way_to_run_the_blocks_gives_the_gradients_of_autodiff(tower, monkeypatch):
    apply, config, params, x = example(tower)

    def grads(max_unrolled, remat):
        monkeypatch.setattr(vit, "MAX_UNROLLED", max_unrolled)
        run = dataclasses.replace(config, remat=remat)
        loss = jax.value_and_grad(lambda p: jnp.sin(apply(p, x, run)).sum())
        assert f"unroll={3 if max_unrolled >= 3 else 1}" in str(jax.make_jaxpr(loss)(params))
        return jax.jit(loss)(params)

    ways = [grads(max_unrolled, remat) for max_unrolled in (2, 3) for remat in (False, True)]
    monkeypatch.setattr(vit, "layer_norm", plain_layer_norm)
    monkeypatch.setattr(jax, "checkpoint", lambda fn: fn)
    plain = grads(0, False)
    for way in ways:
        for one, other in zip(jax.tree.leaves(way), jax.tree.leaves(plain)):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
