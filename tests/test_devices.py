"""Sharding, collectives, and programs over all devices."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import devices

N = jax.device_count()
gather = lambda x: jax.lax.all_gather(x, devices.AXIS, tiled=True)


def test_rows_are_sharded_in_order_and_gathered_back():
    batch = {"x": np.arange(6 * N).reshape(2 * N, 3), "y": np.arange(2 * N, dtype=np.float32)}
    sharded = devices.shard(batch)
    assert sharded["x"].shape == (N, 2, 3) and sharded["y"].shape == (N, 2)
    got = devices.pmap(lambda b: jax.tree.map(gather, b), (0,))(sharded)
    for k in batch:
        np.testing.assert_array_equal(got[k], batch[k])


def test_a_gathered_gradient_is_the_whole_batch_s():
    x = np.random.default_rng(0).normal(size=(2 * N, 3)).astype(np.float32)
    def loss(w, rows, everyone):
        return jnp.tanh(jnp.einsum("sd,de,ae->sa", rows, w, everyone)).mean()
    def share(w, rows):
        local = lambda w: loss(w, rows, gather(rows @ w))
        return devices.mean(jax.value_and_grad(local)(w))
    w = np.eye(3, dtype=np.float32)
    got = devices.pmap(share, (None, 0))(w, devices.shard(x))
    want = jax.jit(jax.value_and_grad(lambda w: loss(w, x, x @ w)))(w)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_mean_over_devices_keeps_tree_shapes_and_types():
    x = np.random.default_rng(0).normal(size=(N, 2, 3)).astype(np.float32)
    tree = lambda x: {"a": x, "b": (x[0], x.sum()), "half": x.astype(jnp.bfloat16)}
    got = devices.pmap(lambda x: devices.mean(tree(x[0])), (0,))(x[:, None])
    assert jax.tree.structure(got) == jax.tree.structure(tree(x[0]))
    np.testing.assert_allclose(got["a"], x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["b"][0], x[:, 0].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["b"][1], x.sum((1, 2)).mean(), rtol=1e-5, atol=1e-6)
    assert got["half"].dtype == jnp.bfloat16
    np.testing.assert_allclose(got["half"].astype(np.float32), x.mean(0), atol=0.02)


def test_no_service_of_jax_swallows_the_signals_that_the_scripts_save_on():
    before = jax.config.jax_enable_preemption_service
    try:
        jax.config.update("jax_enable_preemption_service", True)
        devices.start(types.SimpleNamespace(coordinator=None))
        assert not jax.config.jax_enable_preemption_service
    finally:
        jax.config.update("jax_enable_preemption_service", before)


def test_the_devices_must_divide_a_batch():
    devices.divides(batch_size=3 * N, other=N)
    for bad in {0, -N, *([N + 1] if N > 1 else [])}:
        with pytest.raises(ValueError, match=f"--super_batch={bad} .*multiple of {N}"):
            devices.divides(batch_size=N, super_batch=bad)


def test_a_host_copy_is_no_view():
    x = {"x": np.arange(3)}
    copy = devices.to_host(x)
    x["x"][:] = 0
    np.testing.assert_array_equal(copy["x"], [0, 1, 2])
    assert type(devices.to_host(jnp.ones(2))) is np.ndarray


def test_a_program_is_compiled_once_off_the_clock_and_keeps_state_unreplicated():
    traced, before = [], devices.compiling.seconds
    def step(state, index, batch):
        traced.append(index)
        state = {"w": state["w"] + devices.mean(batch.mean()), "n": state["n"] + 1}
        return state, {"loss": state["w"].sum() + index}
    program = devices.pmap(step, (None, None, 0), donate=True)
    state, batch = {"w": np.zeros(3, np.float32), "n": np.int32(0)}, devices.shard(
        np.ones(2 * N, np.float32))
    for i in range(3):  # the first state is numpy's, the next ones are the program's own
        state, metrics = program(state, np.int32(i), batch)
        spent = devices.compiling.seconds - before
    assert len(traced) == 1 and spent > 0
    np.testing.assert_array_equal(state["w"], [3, 3, 3])
    assert state["n"] == 3 and metrics["loss"] == 9 + 2 and state["w"].shape == (3,)
    fresh = {"w": jnp.zeros(3), "n": jnp.int32(0)}  # as the next seed has it
    np.testing.assert_array_equal(program(fresh, np.int32(0), batch)[0]["w"], [1, 1, 1])
    assert len(traced) == 1 and devices.compiling.seconds - before == spent


def test_a_program_is_compiled_once_for_each_set_of_shapes():
    double = devices.pmap(lambda batch: jax.tree.map(lambda x: gather(2 * x), batch), (0,))
    rows = lambda n, *names: devices.shard({k: np.arange(n * N, dtype=np.float32) for k in names})
    times = []
    for n, names in ((1, "x"), (3, "x"), (1, "xy"), (1, "x"), (3, "x")):
        begin = devices.compiling.seconds
        got = double(rows(n, *names))
        times.append(devices.compiling.seconds - begin)
        for k in names:
            np.testing.assert_array_equal(got[k], 2.0 * np.arange(n * N))
    assert all(times[:3]) and times[3:] == [0, 0]
