"""One program over all devices of all hosts: start-up, the pmap wrapper, shapes on the way in.

State is never replicated by hand: it goes in and comes out without a device axis (`in_axes` and
`out_axes` None), so that a checkpoint of eight devices is the checkpoint of one.
"""

import os

import einops
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

AXIS = "devices"  # the name of the mapped axis, for the collectives


def start(coordinator=None, num_processes=None, process_id=None):
    """Joins the hosts of a job. On TPU pods and SLURM the three are found by jax itself.

    Call before anything touches a device. Scripts save on SIGTERM themselves, so jax's own
    preemption service, which swallows that signal, is switched off.
    """
    os.environ.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "0")
    if jax.config.jax_num_cpu_devices > 1:  # before jax 0.12 they can starve each other of threads
        os.environ.setdefault("PJRT_NPROC", str(2 * jax.config.jax_num_cpu_devices))
    on_cluster = any(v in os.environ for v in ("SLURM_NTASKS", "TPU_WORKER_HOSTNAMES"))
    several = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or os.environ.get(
        "SLURM_NTASKS", "1") != "1"
    # a host that is gone is noticed after 30 seconds, not after 100
    if coordinator is not None:
        jax.distributed.initialize(coordinator, num_processes, process_id,
                                   heartbeat_timeout_seconds=30)
    elif on_cluster and several:
        jax.distributed.initialize(heartbeat_timeout_seconds=30)


def pmap(fn, in_axes, donate_argnums=()):
    """`jax.pmap` over AXIS with unreplicated outputs: what `fn` returns must be equal on all
    devices (reduced or gathered); pmap does not check it and hands back the first device's."""
    return jax.pmap(fn, axis_name=AXIS, in_axes=in_axes, out_axes=None,
                    donate_argnums=donate_argnums)


def shard(batch):
    """This host's rows [R, ...] of every array as [local devices, R / local devices, ...]."""
    return jax.tree.map(
        lambda x: einops.rearrange(x, "(n r) ... -> n r ...", n=jax.local_device_count()), batch)


def divides(**batch_sizes):
    """Raises ValueError, naming the flag, where the devices do not divide a batch."""
    n = jax.device_count()
    for flag, batch_size in batch_sizes.items():
        if batch_size < 1 or batch_size % n:
            raise ValueError(f"--{flag}={batch_size} does not divide over {n} devices: "
                             f"give a positive multiple of {n}")


def host():
    """(index of this host, number of hosts)."""
    return jax.process_index(), jax.process_count()


def agree(flag):
    """Process 0's answer on every host, where a file may appear between two hosts' looks at it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def to_host(tree):
    """A copy in numpy: donation may overwrite the buffer that a mere view would show."""
    return jax.tree.map(np.array, tree)


def mean(tree):
    """Mean over the devices, inside `pmap`: one all-reduce for the whole tree, not one a leaf
    (25 to 40 times faster between processes)."""
    if jax.lax.axis_size(AXIS) == 1:
        return tree
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, AXIS))


def gather(x):
    """Every device's rows [R, ...] in order, [n R, ...], on every device; differentiable."""
    return jax.lax.all_gather(x, AXIS, tiled=True)


def take(x_N, index_S):
    """Rows `index_S` (global) of an array that is sharded [N, ...] over the devices; each device
    gets its S/n of them. Only the rows that were picked travel. Inside `pmap`."""
    row_S = index_S - jax.lax.axis_index(AXIS) * len(x_N)
    mine_S = (row_S >= 0) & (row_S < len(x_N))
    x_S = x_N[jnp.clip(row_S, 0, len(x_N) - 1)]
    x_S = jnp.where(mine_S.reshape(-1, *[1] * (x_N.ndim - 1)), x_S, 0)
    return jax.lax.psum_scatter(x_S, AXIS, tiled=True)


def places(batch_N):
    """Where this device's rows stand in the whole batch: int [N]."""
    n = len(batch_N["image"])
    return jax.lax.axis_index(AXIS) * n + jnp.arange(n)


class Program:
    """A pmapped function that is compiled, off the training clock and once for all seeds, when
    `compile` is first shown its arguments. `donate`: the first of them, the state, is used up."""

    def __init__(self, fn, in_axes, donate=False):
        self._fn, self._compiled = pmap(fn, in_axes, (0,) if donate else ()), None
        self._kept = to_host if donate else lambda first: first

    def compile(self, *args):
        if self._compiled is None and jax.process_count() == 1:
            self._compiled = self._fn.lower(*args).compile()
        elif self._compiled is None:  # lowering knows this host's rows only: compile by running
            jax.block_until_ready(self._fn(self._kept(args[0]), *args[1:]))
            self._compiled = self._fn

    def __call__(self, *args):
        self.compile(*args)
        return self._compiled(*args)
