"""A frozen model: its weights from a checkpoint, and what it says of a pool, computed once."""

import hashlib
import json
import os
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from common import data, devices, files, train


def load(directory, template, about, flag="reference"):
    """(the learner's params, `train.Totals`) that a finished stage left in `directory`.

    template: params of the same shapes. about: what the stage must have been told as its `about`;
    the sizes of arrays cannot tell another number of heads or another tokenizer.
    Raises: ValueError naming the flag if the checkpoint is missing, damaged, or of another model.
    """
    where = f"--{flag}={directory}"
    if not os.path.isdir(directory):
        raise ValueError(f"{where}: no such checkpoint directory")
    checkpoints = train.Checkpoints(directory)
    step = checkpoints.latest()
    if step is None:
        raise ValueError(f"{where}: holds no checkpoint")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(f"{checkpoints.directory}/{step}/state")
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            record = checkpointer.restore(f"{checkpoints.directory}/{step}/record")
        params, totals = state["learner"]["params"], train.Totals(**record["totals"])
        if train.digest(state) != record["sha256"]:
            raise TypeError("its hash differs")
    except Exception as e:
        why = str(e) if type(e) is TypeError else type(e).__name__
        raise ValueError(f"{where}: damaged ({why}): train it again or name another") from None
    theirs, ours = ({jax.tree_util.keystr(k): tuple(x.shape) for k, x in
                     jax.tree_util.tree_leaves_with_path(tree)} for tree in (params, template))
    for k in {**ours, **theirs}:
        if theirs.get(k) != ours.get(k):
            raise ValueError(f"{where}: of another size (params{k} is {theirs.get(k)}, here it is "
                             f"{ours.get(k)}): give the model flags it was trained with")
    for k, value in json.loads(json.dumps(files.plain(about))).items():
        if record["about"].get(k) != value:
            raise ValueError(f"{where}: was trained with another {k} ({record['about'].get(k)}, "
                             f"here {value}): give the flags it was trained with")
    return params, totals


def forward_all(params, forward, pool, batch_size):
    """(what `forward` gives for every example of a pool, in the order of its ids; seconds).

    forward: `devices.pmap` of (params, sharded batch) -> a dict of rows, gathered from all devices,
    'valid' among them. Results are on the host. The time to compile does not count.
    """
    parts, seconds = [], 0.0
    for batch in data.sweep(pool, batch_size, devices.host()):
        batch = devices.shard({k: v for k, v in batch.items() if k not in ("id", *data.TRUTHS)})
        begin = time.perf_counter() - devices.compiling.seconds
        got = jax.device_get(forward(params, batch))
        seconds += time.perf_counter() - devices.compiling.seconds - begin
        valid = got.pop("valid")
        parts.append(jax.tree.map(lambda x: x[valid], got))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts), seconds


def made_by(params, pool, **more):
    """What an array of a pool's examples depends on: the weights, the data, the ids."""
    return {"weights": train.digest(params), "data": pool.identity(),
            "ids": hashlib.sha256(pool.ids.tobytes()).hexdigest(), **more}


def cached(path, source, make):
    """(arrays by name, seconds that making them took) from the file `path`, or, where there is
    none, from `make()`, which gives both; then they are written there. source: `made_by`.

    Raises: ValueError naming the file if it is damaged, or was made by something else.
    """
    if not devices.agree(os.path.exists(path)):
        arrays, seconds = make()
        if jax.process_index() == 0:
            np.savez(path + ".tmp.npz", made_by=json.dumps(source), seconds=seconds,
                     sha256=train.digest(arrays), **arrays)
            os.replace(path + ".tmp.npz", path)
        return arrays, seconds
    try:
        with np.load(path) as f:
            arrays = {k: f[k] for k in f}
        theirs, seconds = json.loads(str(arrays.pop("made_by"))), float(arrays.pop("seconds"))
        if str(arrays.pop("sha256")) != train.digest(arrays):
            raise TypeError("its hash differs")
    except Exception as e:  # a zip file has many ways to be broken
        why = str(e) if type(e) is TypeError else type(e).__name__
        raise ValueError(f"{path} is damaged ({why}): delete it, and it is made again") from None
    differ = [k for k in source if theirs.get(k) != source[k]]
    if differ:
        raise ValueError(f"{path} was made with other {' and '.join(differ)}: delete it, and it is "
                         "made again")
    return arrays, seconds
