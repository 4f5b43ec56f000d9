"""Checkpoints through orbax: the whole state and the run's books, atomic, restored bit for bit."""

import logging
import os

import jax
import numpy as np
import orbax.checkpoint as ocp

from common import devices

logging.getLogger("absl").addFilter(lambda r: "orbax" not in r.pathname or r.levelno > 30)


class Checkpoints:
    """The last checkpoint of one training run, under `directory`.

    A tree of numpy or jax arrays and a `books` dict of JSON values (examples, seconds, sums since
    the last row) are written together, in the background, under a temporary name that is renamed
    when all is on disk. A kill at any moment leaves this one or the one before.
    """

    def __init__(self, directory):
        self.directory = os.path.abspath(directory)  # orbax accepts nothing else
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=1))

    def latest(self):
        """The number of completed steps in the last checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step, state, books):
        """Call with the number of completed steps. A step that is already saved is left alone.

        Raises: FloatingPointError if a weight is not finite: the checkpoint before is kept.
        """
        if step == self.latest():
            return
        state = devices.to_host(state)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(state) if x.dtype.kind == "f"):
            raise FloatingPointError(f"{os.path.basename(self.directory)}: the update of step "
                                     f"{step - 1} left weights that are not finite")
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), books=ocp.args.JsonSave(books)))

    def restore(self, like):
        """(state, books) of the last checkpoint; `like` is a tree of the same shapes and types.

        Raises: ValueError, in one line, if it is damaged or of another shape.
        """
        step = self.latest()
        like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        try:
            got = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), books=ocp.args.JsonRestore()))
            if [x.shape for x in jax.tree.leaves(got.state)] != [
                    x.shape for x in jax.tree.leaves(like)]:  # orbax does not look
                raise TypeError("other shapes")
        except Exception as e:  # orbax raises whatever its layers raise, with pages of text
            raise ValueError(
                f"checkpoint {self.directory}/{step} is damaged or of another model "
                f"({type(e).__name__}): delete {self.directory} to train it again") from None
        return got.state, got.books

    def close(self):
        """Waits for the save that is under way."""
        self._manager.close()


def restore_params(directory, like, flag):
    """(learner's params, books) that a finished run left in `directory`, checked against `like`.

    Raises: ValueError naming `flag` if nothing is there, if it is damaged, or of another size.
    """
    if not os.path.isdir(directory):
        raise ValueError(f"--{flag}={directory}: no such checkpoint directory")
    checkpoints = Checkpoints(directory)
    if checkpoints.latest() is None:
        raise ValueError(f"--{flag}={directory}: holds no checkpoint")
    path = f"{checkpoints.directory}/{checkpoints.latest()}/state"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path)["learner"]["params"]
        books = checkpoints._manager.restore(checkpoints.latest(), args=ocp.args.Composite(
            books=ocp.args.JsonRestore())).books
    except Exception as e:
        raise ValueError(f"--{flag}={directory}: damaged ({type(e).__name__}): train it again or "
                         "name another") from None
    theirs, ours = ({jax.tree_util.keystr(k): tuple(x.shape) for k, x in
                     jax.tree_util.tree_leaves_with_path(tree)} for tree in (params, like))
    if theirs != ours:
        k = next(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
        raise ValueError(f"--{flag}={directory}: of another size (params{k} is {theirs.get(k)}, "
                         f"here it is {ours.get(k)}): give the model flags it was trained with")
    checkpoints.close()
    return params, books
