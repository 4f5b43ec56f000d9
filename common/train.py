"""A run and its stages: work directory, checkpoints, the training clock, rows of metrics.

A script holds its own training loop around its own step:

    state = stage.resume(state)                            # the last checkpoint, or as given
    for index, batch in stage.batches(load):               # from here the clock runs ...
        state, metrics = step(state, index, key, batch)
        stage.count(metrics, trained=b, scored=B, flops=bill)
        if stage.evaluates:                                # ... and here it stands still
            stage.write(evaluate(state))
        stage.save(state)                                  # at evaluations, or to stop
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm

from common import devices, files, flags

logging.get_absl_handler().addFilter(lambda r: "orbax" not in r.pathname or r.levelno > 30)

# flags that may differ when a work directory is used again: they change no number in it
FREE = ("workdir", "arms", "seeds", "coordinator", "num_processes", "process_id", "data_dir")


# ----------------------------------------------------------------------------- the work directory


class Run:
    """The work directory of a command, locked against other processes. `stop` is true once the user
    has asked for a stop.

    data: {split: fingerprint of its records}. Together with the flags it must be what the directory
    was made with.
    Raises: ValueError, in one line, if the directory was made by something else, is in use, or
    cannot be written.
    """

    def __init__(self, config, data=()):
        self.config, self.data, self.stop = config, dict(data), Stop()
        self.metrics = files.MetricsFile(os.path.join(config.workdir, "metrics.jsonl"))
        self._check()
        self.lock = None
        if jax.process_index() == 0:
            self._write()

    def stage(self, name, seed, steps, **more):
        return Stage(self, name, seed, steps, **more)

    def path(self, name):
        return os.path.join(self.config.workdir, name)

    def _check(self):
        where = f"--workdir={self.config.workdir}"
        if not os.path.exists(self.path("config.json")):
            return
        try:
            with open(self.path("config.json")) as f:
                old = json.load(f)
            theirs, script, data = old["flags"], old["script"], old["data"]
            mine = json.loads(json.dumps(files.plain(self.config)))
            differ = [f"--{k} (was {theirs.get(k)}, now {mine.get(k)})" for k in {**theirs, **mine}
                      if k not in FREE and theirs.get(k) != mine.get(k)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{where}: its config.json cannot be read, so that what the rest was "
                             "made with is unknown: name another --workdir, or delete this one"
                             ) from None
        if script != os.path.basename(sys.argv[0]):
            raise ValueError(f"{where} belongs to a run of {script}: name another --workdir")
        if differ:
            raise ValueError(f"{where} belongs to a run with other flags: {', '.join(differ)}; "
                             "name another --workdir")
        changed = [k for k in self.data if data.get(k) != self.data[k]]
        if changed:
            raise ValueError(f"{where} belongs to a run on other data: the records of "
                             f"{' and '.join(changed)} have changed since; name another --workdir")

    def _write(self):
        try:
            os.makedirs(self.config.workdir, exist_ok=True)
            self.lock = lock(self.config.workdir)
            files.write_json(self.path("config.json"), {
                "script": os.path.basename(sys.argv[0]), "flags": dict(self.config),
                "command": " ".join(sys.argv), "data": self.data,
                "python": platform.python_version(), "jax": jax.__version__, "commit": commit(),
                "machine": platform.machine(), "hosts": jax.process_count(),
                "devices": [str(d.device_kind) for d in jax.devices()]})
        except OSError as e:
            if not os.path.exists(self.path("config.json")):
                raise ValueError(f"--workdir={self.config.workdir}: {e.strerror}") from None
            logging.warning("--workdir=%s: %s; a finished run is reported all the same",
                            self.config.workdir, e.strerror)


def lock(workdir):
    """The open lock file of a directory that no other process writes to. The system drops the lock
    when the file is closed or the process ends, however it ends.

    Raises: ValueError naming the process that holds it.
    """
    file = open(os.path.join(workdir, "lock"), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"--workdir={workdir} is in use by {file.read().strip()}: wait for it, or "
                         "name another --workdir") from None
    except OSError as e:  # not every file system has locks
        logging.warning("--workdir=%s cannot be locked (%s): start no second run in it", workdir,
                        e.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on host {platform.node()}\n")
    file.flush()
    return file


def commit():
    """The project's git commit, with '+' where files differ from it; None outside a checkout."""
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, check=True,
                                    cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Stop:
    """True once SIGINT or SIGTERM came. The second one ends the program at once. So does the first
    one outside `awaited`: everything that is done is on the disk there."""

    def __init__(self):
        self.came, self._awaited = False, False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._handle)

    @contextlib.contextmanager
    def awaited(self):
        """A loop that asks for the stop, saves what it has, and ends."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False

    def _handle(self, number, frame):
        first, self.came = not self.came, True
        if self._awaited and first:
            return
        print("stopped: the same command goes on from what is saved", file=sys.stderr, flush=True)
        flags.leave(128 + number)

    def __bool__(self):
        """With several hosts: whether a signal came to any of them. All must ask at the same
        step."""
        if jax.process_count() == 1:
            return self.came
        from jax.experimental import multihost_utils
        return bool(multihost_utils.process_allgather(np.array(self.came)).any())


# ------------------------------------------------------------------------------------- a stage


@dataclasses.dataclass
class Totals:
    """What has been spent. `seconds` are of training alone, without evaluation. `setup_seconds`
    were spent before: on the reference's training and scoring. `examples_scored` are all that were
    drawn from the pool; a uniform arm trains on them and scores none. flops: {role: operations}."""
    step: int = 0
    examples_trained: int = 0
    examples_scored: int = 0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    flops: dict = dataclasses.field(default_factory=dict)

    def plus(self, **more):
        """The totals once these are spent too."""
        flops = dict(self.flops)
        for role, n in more.pop("flops", {}).items():
            flops[role] = flops.get(role, 0) + n
        sums = {k: getattr(self, k) + v for k, v in more.items()}
        return dataclasses.replace(self, **sums, flops=flops)


class Stage:
    """One training run of an arm, or of a part of it, with checkpoints that it resumes from.

    spent: `Totals` before this stage; its rows count on from there. about, of a reference: what its
    weights mean beyond their shapes (sizes, tokenizer), for `reference.load`. counts: a
    `picks.Counts`, for a stage whose metrics hold the step's picks as 'pick'. `totals` and `counts`
    are kept up to date.
    """

    def __init__(self, run, name, seed, steps, *, spent=None, about=(), counts=None):
        self.name, self.seed, self.steps, self.about = name, seed, steps, dict(about)
        self.totals, self.step, self.counts = spent or Totals(), 0, counts
        self._run, self._sums, self._n = run, {}, 0  # sums over the _n steps since the last row
        self._late, self._since = collections.deque(), None
        self._bar = None
        self._saved = Checkpoints(run.path(f"checkpoints/{name}-{seed}"))

    @property
    def evaluates(self):
        return self.step % self._run.config.eval_every == 0 or self.ends

    @property
    def ends(self):
        return self.step >= self.steps

    def resume(self, state):
        """The state of the last checkpoint, if there is one, and otherwise `state`."""
        if self._saved.latest() is not None:
            state, record = self._saved.restore(self._with_counts(state))
            if self.counts:
                self.counts.arrays = state.pop("counts")
            self.step, self.totals = self._saved.latest(), Totals(**record["totals"])
            self._sums, self._n = record["sums"], record["n"]
        if self.ends:
            logging.info("%s seed %d: already trained", self.name, self.seed)
            self._saved.close()
        elif jax.process_index() == 0:
            self._run.metrics.rewind(self.name, self.seed, self.totals.step)
            if self.step:
                logging.info("%s seed %d: going on from its checkpoint of step %d", self.name,
                             self.seed, self.step)
        return devices.to_host(state)  # copies: a donated state must not hold a buffer twice

    def _with_counts(self, state):
        return {**state, "counts": self.counts.arrays} if self.counts else state

    def batches(self, load):
        """Yields (index of the step, batch) up to the end. load(start) yields the sharded batches
        from step `start` on."""
        if self.ends:
            return
        self._bar = tqdm.tqdm(
            total=self.steps, initial=self.step, desc=f"{self.name} seed {self.seed}", unit="ex",
            leave=False, mininterval=0.5, disable=None if jax.process_index() == 0 else True)
        with self._run.stop.awaited():
            for index, batch in enumerate(load(self.step), self.step):
                if self._since is None:
                    self._since = devices.clock()
                yield np.int32(index), batch
            self._saved.close()
            self._bar.close()

    def count(self, metrics, *, trained, scored, flops):
        """Call after each step, with what it cost. Metrics are read two steps late, so that the
        device never waits for the host. At an evaluation they are all read, and the clock stops.

        Raises: FloatingPointError if a loss is not finite.
        """
        self._late.append((self.step, metrics))
        self._bar.unit_scale = trained  # the bar counts steps and shows examples
        self.step += 1
        self.totals = self.totals.plus(step=1, examples_trained=trained, examples_scored=scored,
                                       flops=flops)
        if self.evaluates:
            self._stop_clock()
        elif len(self._late) > 2:
            self._read()

    def write(self, metrics):
        """Appends a row: the totals, means over the steps since the last row, and `metrics`."""
        row = {"arm": self.name, "seed": self.seed, **dataclasses.asdict(self.totals),
               **{k: v / self._n for k, v in self._sums.items()}, **metrics,
               **(self.counts.metrics() if self.counts else {})}
        self._sums, self._n = {}, 0
        if jax.process_index() == 0:
            self._run.metrics.append(row)
            if self._bar.disable:  # stderr is no terminal
                logging.info("%s seed %d: step %d of %d, loss %.4g, %.0f s", self.name, self.seed,
                             self.step, self.steps, row["loss"], row["seconds"])

    def save(self, state):
        """Saves at evaluations, and when a stop was asked for. Several hosts agree on a stop, and
        do so at evaluations only.

        Raises: flags.Stopped after the checkpoint of a stop.
        """
        stops = (self.evaluates or jax.process_count() == 1) and bool(self._run.stop)
        if not (self.evaluates or stops):
            return
        self._stop_clock()
        self._saved.save(self.step, self._with_counts(state), {
            "totals": dataclasses.asdict(self.totals), "steps": self.steps, "sums": self._sums,
            "n": self._n, "about": self.about})
        if stops:
            self._saved.close()
            self._bar.close()
            raise flags.Stopped(f"stopped after step {self.step} of {self.name}, seed {self.seed}, "
                                "which is saved: the same command goes on from there")

    def _stop_clock(self):
        while self._late:
            self._read()
        if self._since is not None:
            self.totals = self.totals.plus(seconds=devices.clock() - self._since)
            self._since = None

    def _read(self):
        step, metrics = self._late.popleft()
        metrics = jax.device_get(metrics)
        if self.counts:
            self.counts.add(step, metrics["pick"])
        metrics = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
        if not np.isfinite(metrics["loss"]):
            self._saved.close()
            self._bar.close()
            raise FloatingPointError(f"{self.name} seed {self.seed}: the loss of step {step} is "
                                     f"{metrics['loss']}")
        for k, v in metrics.items():
            self._sums[k] = self._sums.get(k, 0.0) + v
        self._n += 1
        self._bar.update(1)


# ---------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The last checkpoint of a stage, through orbax, in `directory`.

    A tree of arrays and `record`, a dict of JSON values, are written together, in the background,
    under a temporary name that is renamed when all is on disk. A kill at any moment leaves this
    checkpoint or the one before. The record holds a hash of the arrays.
    """

    def __init__(self, directory):
        self.directory = os.path.abspath(directory)  # orbax accepts nothing else
        self._manager = None

    def _open(self):
        """Only a stage that saves makes the directory."""
        self._manager = self._manager or ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=1))
        return self._manager

    def latest(self):
        """The number of completed steps in the last checkpoint, or None."""
        return self._open().latest_step() if os.path.isdir(self.directory) else None

    def save(self, step, state, record):
        """Call with the number of completed steps. A step that is already saved is left alone.

        Raises: FloatingPointError if a weight is not finite: the checkpoint before is kept.
        """
        if step == self.latest():
            return
        state = devices.to_host(state)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(state) if x.dtype.kind == "f"):
            self.close()
            raise FloatingPointError(f"{os.path.basename(self.directory)}: the update of step "
                                     f"{step - 1} left weights that are not finite")
        try:
            self._open().save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                record=ocp.args.JsonSave({**files.plain(record), "sha256": digest(state)})))
        except Exception as e:  # a full disk has many faces in orbax
            raise self._disk_error(e) from None

    def restore(self, template):
        """(state, record) of the last checkpoint. template: a tree of the same shapes and types.

        Raises: ValueError, in one line, if it is damaged or of another shape.
        """
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
        try:
            return self.read(template)
        except Exception as e:  # orbax raises whatever its layers raise, with pages of text
            why = str(e) if type(e) is TypeError and len(str(e)) < 40 else type(e).__name__
            raise ValueError(f"checkpoint {self.directory}/{self.latest()} is damaged or of "
                             f"another model ({why}): delete {self.directory} to train it again"
                             ) from None

    def read(self, *template):
        """`restore` without its error; without a template the containers become dicts and lists.

        Raises: TypeError if the shapes or the hash differ, and whatever orbax's layers raise.
        """
        got = self._open().restore(self.latest(), args=ocp.args.Composite(
            state=ocp.args.StandardRestore(*template), record=ocp.args.JsonRestore()))
        shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (got.state, *template)]
        if shapes[0] != shapes[-1]:  # orbax does not look
            raise TypeError("other shapes")
        if digest(got.state) != got.record["sha256"]:
            raise TypeError("its hash differs")
        return got.state, got.record

    def close(self):
        """Waits for the save that is under way."""
        if self._manager is not None:
            try:
                self._manager.close()
            except Exception as e:
                raise self._disk_error(e) from None
            self._manager = None

    def _disk_error(self, e):
        return flags.DiskError(f"{self.directory}: a checkpoint could not be written "
                               f"({type(e).__name__}: {flags.one_line(e)[:200]})")


def digest(tree):
    """A hash of the arrays of a tree. Their order does not matter: a tree that is restored without
    a template has other containers."""
    leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(jax.device_get(tree))]
    each = sorted(hashlib.sha256(f"{x.dtype} {x.shape}".encode() + x.tobytes()).hexdigest()
                  for x in leaves)
    return hashlib.sha256("".join(each).encode()).hexdigest()
