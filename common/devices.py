"""One program over all devices of all hosts: start-up, the pmap wrapper, shapes on the way in.

State is never replicated by hand: it goes in and comes out without a device axis (`in_axes` and
`out_axes` None), so that a checkpoint of eight devices is the checkpoint of one.
"""

import os
import time
import types

from absl import logging
import einops
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

AXIS = "devices"  # the name of the mapped axis, for the collectives


def start(config, timeout=300):
    """Joins the hosts of a job: those that the flags --coordinator, --num_processes, --process_id
    name, or those of a TPU pod or of SLURM, which jax finds by itself. Call this before anything
    touches a device.

    Scripts save on SIGTERM themselves. jax's own preemption service swallows that signal, so it is
    switched off.
    Raises: ValueError, in one line, if the other hosts do not come within `timeout` seconds.
    """
    jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_num_cpu_devices > 1:  # before jax 0.12 they can starve each other of threads
        os.environ.setdefault("PJRT_NPROC", str(2 * jax.config.jax_num_cpu_devices))
    flags = {"coordinator_address": config.coordinator, "num_processes": config.num_processes,
             "process_id": config.process_id} if config.coordinator else {}
    slurm_tasks = os.environ.get("SLURM_NTASKS", "1")
    step_of_slurm = "SLURM_STEP_ID" in os.environ  # started by srun; salloc alone sets SLURM_NTASKS
    if slurm_tasks != "1" and not step_of_slurm and not flags:
        logging.warning("SLURM_NTASKS=%s, but this process was not started by srun: it runs alone. "
                        "For several hosts: srun python ...", slurm_tasks)
    on_cluster = step_of_slurm and slurm_tasks != "1" or "," in os.environ.get(
        "TPU_WORKER_HOSTNAMES", "")
    if not flags and not on_cluster:
        return
    logging.info("waiting for the other hosts, for up to %d seconds", timeout)
    try:  # a host that is gone is noticed after 30 seconds, not after 100
        jax.distributed.initialize(**flags, initialization_timeout=timeout,
                                   heartbeat_timeout_seconds=30)
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"the hosts of this job could not be joined ({str(e).splitlines()[0]}): "
                         "give --coordinator, --num_processes and --process_id on each, or run on "
                         "one host without them") from None


compiling = types.SimpleNamespace(seconds=0.0)  # how long this process has compiled programs for


def clock():
    """Seconds, to measure with. It stands still while this process compiles."""
    return time.perf_counter() - compiling.seconds


class pmap:
    """`jax.pmap` over AXIS, compiled once for each set of shapes, when it is first called with it.

    What `fn` returns must be equal on all devices (reduced or gathered): outputs are unreplicated,
    pmap does not check it and hands back the first device's. `donate`: the first argument, the
    state, is used up. (Called as it is, a jax.pmap would compile twice, for a state in numpy and
    then for its own output.)
    """

    def __init__(self, fn, in_axes, donate=False):
        self._fn = jax.pmap(fn, axis_name=AXIS, in_axes=in_axes, out_axes=None,
                            donate_argnums=(0,) if donate else ())
        self._donate, self._compiled = donate, {}

    def __call__(self, *args):
        leaves, structure = jax.tree.flatten(args)
        shapes = structure, *((x.shape, x.dtype) for x in leaves)
        if shapes not in self._compiled:
            begin = time.perf_counter()
            self._compiled[shapes] = self._compile(args)
            compiling.seconds += time.perf_counter() - begin
        return self._compiled[shapes](*args)

    def _compile(self, args):
        if jax.process_count() == 1:
            return self._fn.lower(*args).compile()
        # lowering knows this host's rows only: compile by running on a copy
        copy = to_host(args[0]) if self._donate else args[0]
        jax.block_until_ready(self._fn(copy, *args[1:]))
        return self._fn


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


def agree(value):
    """Process 0's bool, whole number or int32 array, on every host. A file may change between two
    hosts' looks at it. No host goes on before process 0 is here."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils
    got = np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))
    return got if isinstance(value, np.ndarray) else type(value)(got)


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


def take(x_N, index_S):
    """Rows `index_S` (global) of an array that is sharded [N, ...] over the devices; each device
    gets its S/n of them. Only the rows that were picked travel. Inside `pmap`."""
    row_S = index_S - jax.lax.axis_index(AXIS) * len(x_N)
    mine_S = (row_S >= 0) & (row_S < len(x_N))
    x_S = x_N[jnp.clip(row_S, 0, len(x_N) - 1)]
    x_S = jnp.where(mine_S.reshape(-1, *[1] * (x_N.ndim - 1)), x_S, 0)
    return jax.lax.psum_scatter(x_S, AXIS, tiled=True)


def places(x_N):
    """Where this device's rows stand in the whole batch: int [N]."""
    return jax.lax.axis_index(AXIS) * len(x_N) + jnp.arange(len(x_N))
