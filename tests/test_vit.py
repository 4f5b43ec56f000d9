"""common/vit.py: the gradients that are written by hand, the ways to run the blocks, and the parts
that only the published SigLIP needs."""

import dataclasses
import functools
import math

import jax
import jax.extend
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


# What the published SigLIP needs: see also test_siglip.py, which has its outputs.
OTHERS = {"no head": vit.ViT("8/3/12/2", 8, 4, 0, pool="map"),
          "rest cut off": vit.ViT("8/3/12/2", 11, 4, 5),
          "last token": vit.Text("8/3/12/2", 9, 6, 5, pool="last", mask_padding=False),
          "padding seen": vit.Text("8/3/12/2", 9, 6, 0, mask_padding=False)}


def dot_flops(jaxpr):
    """FLOPs of the matrix products of a program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(
                eqn.invars[0].aval.shape[axis] for axis in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(dot_flops, jax.extend.core.jaxprs_in_params(eqn.params)))
    return total


@pytest.mark.parametrize("name", OTHERS)
def test_closed_form_flops_are_those_of_the_program(name):
    config = OTHERS[name]
    if isinstance(config, vit.ViT):
        init, apply, flops = vit.vit_init, vit.vit_apply, vit.vit_flops
        x = np.zeros((3, config.image_size, config.image_size, 3), np.float32)
    else:
        init, apply, flops = vit.text_init, vit.text_apply, vit.text_flops
        x = np.zeros((3, config.context), np.int32)
    params = jax.eval_shape(lambda: init(jax.random.key(0), config))
    program = jax.make_jaxpr(lambda p: apply(p, x, config))(params)
    assert program.out_avals[0].shape == (3, config.n_out or 8)
    assert dot_flops(program.jaxpr) == 3 * flops(config)


def test_the_rest_that_the_patch_does_not_divide_is_not_seen():
    config = OTHERS["rest cut off"]
    params = vit.vit_init(jax.random.key(0), config)
    image = np.random.default_rng(0).normal(size=(2, 11, 11, 3)).astype(np.float32)
    want = vit.vit_apply(params, image, config)
    image[:, 8:], image[:, :, 8:] = 7, 7
    np.testing.assert_array_equal(vit.vit_apply(params, image, config), want)
    np.testing.assert_array_equal(vit.vit_apply(params, image[:, :8, :8], config), want)
    with pytest.raises((TypeError, ValueError)):  # one more patch than there are positions
        vit.vit_apply(params, np.zeros((2, 12, 12, 3), np.float32), config)


def test_the_last_token_sees_padding_and_is_what_is_pooled():
    config = OTHERS["last token"]
    params = vit.text_init(jax.random.key(0), config)
    tokens = np.array([[3, 4, 5, 0, 0, 2]])
    want = vit.text_apply(params, tokens, config)
    params["embed"] = params["embed"].at[0].set(params["embed"][1])
    assert abs(vit.text_apply(params, tokens, config) - want).max() > 1e-3
    whole = dataclasses.replace(config, pool="gap")
    assert abs(vit.text_apply(params, tokens, whole) - want).max() > 1e-3


def test_without_a_head_the_output_is_what_the_head_would_get():
    config = OTHERS["no head"]
    params = vit.vit_init(jax.random.key(0), config)
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    assert "head" not in params
    same = params | {"head": {"w": np.eye(8, dtype=np.float32), "b": np.zeros(8, np.float32)}}
    np.testing.assert_allclose(vit.vit_apply(params, image, config), vit.vit_apply(
        same, image, dataclasses.replace(config, n_out=8)), rtol=1e-6)
