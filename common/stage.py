"""A stage of training that can be stopped anywhere, and files of what a frozen model said.

`fit` is the flat loop of every stage of every script: the method is in the `step` that it is given.
"""

import hashlib
import json
import os
import time

from absl import logging
import jax
import numpy as np

from common import checkpoint, data, devices, report, run

TOTALS = ("step", "examples_trained", "examples_scored", "seconds")  # of a row, besides its FLOPs


def fit(name, seed, step, state, key, batches, *, steps, batch_size, n_scored, per_step, one_off,
        setup_seconds, metrics_of, config, metrics_file, stop, before=None, at_end=None):
    """Trains from the last checkpoint to the end: a flat loop. Returns the state.

    Args: `step(state, index, key, batch)` is a devices.Program; `batches(start)` yields sharded
      batches from step `start` on; per_step, one_off: FLOPs by role; `metrics_of(state)` evaluates,
      `at_end(state)` gives more metrics of the last state. before: the row at which the stage that
      this one follows on ended, if any: the rows count on from its totals.
    """
    before = before or {k: 0 for k in TOTALS} | {"flops": {}}
    saved = checkpoint.Checkpoints(os.path.join(config.workdir, "checkpoints", f"{name}-{seed}"))
    start, books = saved.latest() or 0, None
    if start:
        state, books = saved.restore(state)
    if start >= steps:
        saved.close()
        return state
    if jax.process_index() == 0:
        metrics_file.rewind(name, seed, before["step"] + start)
        if start:
            logging.info("%s seed %d: going on from its checkpoint of step %d", name, seed, start)
    state = devices.to_host(state)  # no two leaves share a buffer that is donated
    books = run.Books(f"{name} seed {seed}", steps, batch_size, books)
    save_every = config.checkpoint_every or config.eval_every

    try:
        for index, batch in enumerate(batches(start), start):
            step.compile(state, np.int32(index), key, batch)  # once, and off the clock
            books.resume_clock(index)
            state, metrics = step(state, np.int32(index), key, batch)
            books.push(index, metrics)
            done = index + 1
            flops = {k: before["flops"].get(k, 0) + one_off.get(k, 0) + done * per_step.get(k, 0)
                     for k in {**before["flops"], **per_step, **one_off}}
            evaluate_now = done % config.eval_every == 0 or done == steps
            stopping = bool(stop) if jax.process_count() == 1 or evaluate_now else False
            if evaluate_now:
                books.stop_clock()
                spent = {"step": done, "examples_trained": done * batch_size,
                         "examples_scored": done * n_scored, "seconds": books.seconds}
                row = {"arm": name, "seed": seed, **{k: before[k] + spent[k] for k in TOTALS},
                       "setup_seconds": setup_seconds, "flops": flops, **books.row(),
                       **metrics_of(state), **(at_end(state) if at_end and done == steps else {})}
                if jax.process_index() == 0:
                    metrics_file.append(row)
                    books.tell(done, row["loss"])
            if done % save_every == 0 or done == steps or stopping:
                books.stop_clock()
                saved.save(done, state, {**books.state(), "flops": report.total_flops(flops)})
            if stopping and done < steps:
                raise run.Stopped(f"stopped after step {done} of {name}, seed {seed}, which is "
                                  "saved: the same command goes on from there")
    finally:
        saved.close()
        books.close()
    return state


def forward_all(params, forward, pool, batch_size):
    """Yields (what `forward` gives for a batch, on the host; seconds on the device) over a pool.

    `forward(params, sharded batch)` is a devices.Program that returns its rows gathered, 'valid'
    among them."""
    for batch in data.sweep(pool, batch_size, devices.host()):
        fields = ("image", "label", "tokens", "caption_hash", "valid")
        batch = devices.shard({k: batch[k] for k in fields if k in batch})
        forward.compile(params, batch)
        begin = time.perf_counter()
        got = jax.device_get(forward(params, batch))
        seconds, valid = time.perf_counter() - begin, got.pop("valid")
        yield jax.tree.map(lambda x: x[valid], got), seconds


def digest(params):
    """sha256 of the weights."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(params)):
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def read_cache(path, made_by, flag="score_cache"):
    """(arrays by name, seconds) of an npz file that records what it was made by.

    Raises: ValueError if it is damaged, or differs from `made_by` in something.
    """
    try:
        with np.load(path) as f:
            arrays = {k: f[k] for k in f}
        theirs, seconds = json.loads(str(arrays.pop("made_by"))), float(arrays.pop("seconds"))
    except Exception as e:  # a zip file has many ways to be broken
        raise ValueError(
            f"--{flag}: {path} is damaged ({type(e).__name__}): delete it") from None
    differ = [k for k in made_by if theirs.get(k) != made_by[k]]
    if differ:
        raise ValueError(f"--{flag}: {path} was made with other {' and '.join(differ)}: "
                         "delete it, or name another")
    return arrays, seconds


def check_given(config, like, trains):
    """Looks at a given --reference and --score_cache before any work is done. like: the reference's
    parameters; trains: values of --reference for which the run trains its own.

    Raises: ValueError naming the flag if one is missing, damaged, or does not fit.
    """
    for seed in config.seeds:
        made_by, cache = {}, run.for_seed(config.score_cache or "", seed)
        if config.reference not in trains:
            made_by["weights"] = digest(checkpoint.restore_params(
                run.for_seed(config.reference, seed), like, "reference")[0])
        if os.path.exists(cache):
            read_cache(cache, made_by)


def cached(path, params, pool, make, flag="score_cache", **also):
    """What a frozen model says of a whole pool, in the order of its ids, cached in the file `path`.

    `make()` gives (arrays by name, seconds); it is called where the file is not there yet. The file
    is tied to the weights, the pool and its ids, and what else is named in `also`. Returns (arrays,
    seconds that making them took).
    """
    made_by = {"weights": digest(params), "view": "clean", **origin(pool), **also}
    if devices.agree(os.path.exists(path)):
        return read_cache(path, made_by, flag)
    arrays, seconds = make()
    if jax.process_index() == 0:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        np.savez(path + ".tmp.npz", made_by=json.dumps(made_by), id=pool.ids, seconds=seconds,
                 **arrays)
        os.replace(path + ".tmp.npz", path)
    return arrays, seconds


def origin(pool):
    """What ties a file to the examples of a pool."""
    return {"data": pool.identity(), "ids": hashlib.sha256(pool.ids.tobytes()).hexdigest()}
