"""What a run is on the outside: shared flags, presets, the work directory, its clock, its end.

Flags are defined here for the three scripts alike; a script adds its own and reads all in `main`.
"""

import collections
import fcntl
import json
import logging as py_logging
import os
import platform
import signal
import subprocess
import sys
import time
import traceback

from absl import app, flags, logging
import jax
import numpy as np
import tqdm

from common import report

# flags that may differ when a work directory is taken up again: they change no number in it
PATHS = {"dataset", "data_dir", "workdir", "reference", "reference_dataset", "score_cache",
         "assignment", "tokenizer"}  # flags that are, or may be, a path
FREE = ("workdir", "arms", "seeds", "checkpoint_every", "coordinator", "num_processes",
        "process_id", "data_dir")


LOCKS = {}  # work directory -> its lock file, open until the process ends


def define_flags(script):
    """The flags that every script has (data, run), before its own."""
    flags.DEFINE_string("dataset", "toy", "'toy' (procedural), a TFDS name, or the path of a "
                        "prepared TFDS directory such as data/fashion_mnist/3.0.1")
    flags.DEFINE_string("data_dir", None, "where TFDS keeps its prepared data sets")
    flags.DEFINE_string("split", "train", "training pool, TFDS syntax: 'train[:90%]'")
    flags.DEFINE_string("eval_split", "test", "split to evaluate on, TFDS syntax")
    flags.DEFINE_integer("image_size", 0, "side in pixels; 0: the data set's own")
    flags.DEFINE_float("label_noise", 0.0, "fraction of the training pool whose label is another "
                       "example's")
    flags.DEFINE_float("caption_noise", 0.0, "fraction of the training pool whose caption is "
                       "another example's")
    flags.DEFINE_integer("toy_examples", 20_000, "toy: size of the training pool")
    flags.DEFINE_float("toy_tail", 1.0, "toy: Zipf exponent of the class sizes; 0 is balanced")
    flags.DEFINE_float("toy_duplicates", 0.1, "toy: fraction of near-duplicates")
    flags.DEFINE_float("toy_hopeless", 0.05, "toy: fraction of pure noise images")
    flags.DEFINE_list("seeds", "0", "comma list; each arm runs once per seed")
    flags.DEFINE_string("preset", "toy", "'toy' or a named setting; other flags override it; "
                        "'list' prints them")
    flags.DEFINE_string("workdir", f"runs/{script}", "everything is written here; run again with "
                        "the same flags to go on")
    flags.DEFINE_integer("eval_every", 100, "steps between evaluations (and rows of metrics)")
    flags.DEFINE_integer("checkpoint_every", 0, "steps between checkpoints; 0: at evaluations")
    flags.DEFINE_string("coordinator", None, "several hosts: address:port of process 0")
    flags.DEFINE_integer("num_processes", None, "several hosts: how many")
    flags.DEFINE_integer("process_id", None, "several hosts: which one this is")


def toy_knobs(config):
    return dict(n=config.toy_examples, tail=config.toy_tail, duplicates=config.toy_duplicates,
                hopeless=config.toy_hopeless)


def dataset_name(dataset):
    """What a data set is called in reports: 'emoji' of 'data/emoji/1.0.0', the last folder that is
    no version."""
    parts = [part for part in dataset.split("/") if part.strip(".")] or [dataset]
    return next((p for p in reversed(parts) if not p.replace(".", "").isdigit()), parts[-1])


def main(script_main):
    """`app.run`, where bad input (ValueError), a loss that is not finite (FloatingPointError) and a
    stop that was asked for (Stopped) end with one line on stderr; DEBUG=1 shows the traceback."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    logging.get_absl_handler().addFilter(  # what jax and optax tell of themselves
        lambda record: record.levelno > py_logging.INFO or record.pathname.startswith(ours))

    def guarded(argv):
        codes = {ValueError: 2, FloatingPointError: 3, Stopped: 130}
        try:
            if len(argv) > 1:
                raise ValueError(f"stray argument {argv[1]!r}: flags are written --name=value")
            script_main()
        except tuple(codes) as e:
            if os.environ.get("DEBUG"):
                raise
            print(e if type(e) is Stopped else f"error: {e}", file=sys.stderr, flush=True)
            code = codes.get(type(e), 2)
            # jax's exit barrier would keep this host waiting for the others, for minutes
            os._exit(code) if jax.distributed.is_initialized() else sys.exit(code)
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            os._exit(1)
    app.run(guarded)


def resolve(presets):
    """(flags as a namespace, names of those that were typed): what was typed, else the preset's
    value, else the default.

    `presets`: name -> {flag: value}. `--preset=list` prints them and leaves.
    """
    values = flags.FLAGS
    as_typed = lambda preset: [f"--{k}={','.join(v) if isinstance(v, list) else v}"
                               for k, v in preset.items()]
    if values.preset == "list":
        for name, preset in presets.items():
            print(name, *as_typed(preset), sep="\n    ")
        sys.exit(0)
    if values.preset not in presets:
        raise ValueError(f"--preset={values.preset}: want one of {', '.join(presets)} or list")
    typed = [name for name in values if values[name].present]
    preset = {k: v for k, v in presets[values.preset].items() if not values[k].present}
    for name, value in preset.items():
        values[name].value = value
    logging.info("--preset=%s sets %s", values.preset, " ".join(as_typed(preset)))
    ours = {values.find_module_defining_flag(name) for name in ("dataset", "arms")}
    config = Namespace({name: values[name].value for name in values
                        if values.find_module_defining_flag(name) in ours})
    try:
        seeds = [int(s) for s in config.seeds]
    except ValueError:
        seeds = []
    # jax.random.key takes 32 bits: seeds that differ by 2^32 would be the same run twice
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(config.seeds)}: want a comma list of different "
                         f"whole numbers from 0 to {2**32 - 1}")
    config.seeds = seeds
    several = [f"--{k}={config[k]}" for k in ("num_processes", "process_id")
               if config[k] is not None]
    if several and config.coordinator is None:
        raise ValueError(f"{' '.join(several)}: give --coordinator=address:port of process 0 too")
    for name in PATHS & config.keys():  # the shell leaves --workdir=~/x as it is
        config[name] = config[name] and os.path.expanduser(config[name])
    for name in ("label_noise", "caption_noise"):
        want(config, 0 <= config[name] <= 1, name, "a fraction from 0 to 1")
    for name, least in (("eval_every", 1), ("checkpoint_every", 0), ("image_size", 0)):
        want(config, config[name] >= least, name, f"at least {least}")
    return config, typed


def for_seed(path, seed):
    """The path with '{seed}' filled in, and no other braces."""
    return path.replace("{seed}", str(seed))


def want(config, ok, flag, what):
    """Raises ValueError that names the flag, its value and what it should be, where not `ok`."""
    if not ok:
        raise ValueError(f"--{flag}={config[flag]}: want {what}")


class Namespace(dict):
    """A dict whose keys are attributes too."""
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def open_workdir(config):
    """Makes the work directory, or checks that it was made with the same flags.

    Raises: ValueError naming the flags that differ (those in FREE may), or the other script.
    """
    path, script = os.path.join(config.workdir, "config.json"), os.path.basename(sys.argv[0])
    mine = {k: v for k, v in config.items() if k not in FREE}
    if os.path.exists(path):
        try:
            with open(path) as f:
                old = json.load(f)
            old["flags"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"--workdir={config.workdir}: its config.json cannot be read, so that "
                             "what the rest was made with is unknown: name another --workdir, or "
                             "delete this one") from None
        if old.get("script", script) != script:
            raise ValueError(f"--workdir={config.workdir} belongs to a run of {old['script']}: "
                             "name another --workdir")
        theirs = old["flags"]
        differ = [f"--{k} (was {theirs.get(k)}, now {mine.get(k)})" for k in {**theirs, **mine}
                  if k not in FREE and theirs.get(k) != mine.get(k)]
        if differ:
            raise ValueError(f"--workdir={config.workdir} belongs to a run with other flags: "
                             f"{', '.join(differ)}; name another --workdir")
    if jax.process_index() == 0:
        try:
            os.makedirs(config.workdir, exist_ok=True)
            lock(config.workdir)
        except OSError as e:
            raise ValueError(f"--workdir={config.workdir}: {e.strerror}") from None
        report.write_json(path, {
            "script": script, "flags": dict(config), "command": " ".join(sys.argv),
            "python": platform.python_version(),
            "jax": jax.__version__, "commit": commit(), "machine": platform.machine(),
            "hosts": jax.process_count(),
            "devices": [str(d.device_kind) for d in jax.devices()]})


def lock(workdir):
    """Refuses a work directory that another process writes to. The system drops the lock when this
    process ends, however it ends.

    Raises: ValueError naming the process that holds it.
    """
    if os.path.abspath(workdir) in LOCKS:
        return
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
    LOCKS[os.path.abspath(workdir)] = file  # closing the file would drop the lock


def commit():
    """The project's git commit, with '+' where files differ from it; None outside a checkout."""
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, check=True,
                                    cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Stopped(Exception):
    """Leaves a run that was asked to stop, after its checkpoint; the message says how to go on."""


class Stop:
    """True once SIGINT or SIGTERM came; the second one ends the program at once."""

    def __init__(self):
        self.came = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._handle)

    def _handle(self, number, frame):
        if self.came:
            sys.exit(128 + number)
        self.came = True

    def __bool__(self):
        """On several hosts: whether it came to any; then every host must ask at the same step."""
        if jax.process_count() == 1:
            return self.came
        from jax.experimental import multihost_utils
        return bool(multihost_utils.process_allgather(np.array(self.came)).any())


class Books:
    """Clock, progress bar and sums of one training run; reads the device two steps late.

    `push(step, metrics)` after each step; `row()` at an evaluation gives the means since the last
    row. `state()` goes into the checkpoint. A loss that is not finite raises FloatingPointError
    that names the step.
    """

    def __init__(self, name, steps, examples_per_step, saved=None):
        saved = saved or {"seconds": 0.0, "sums": {}, "count": 0}
        self.seconds, self.sums, self.count = saved["seconds"], saved["sums"], saved["count"]
        self._late, self._since = collections.deque(), None
        self._bar = tqdm.tqdm(
            total=steps * examples_per_step, desc=name, unit="ex", unit_scale=True, leave=False,
            mininterval=0.5, disable=None if jax.process_index() == 0 else True)
        self.per_step, self.name = examples_per_step, name

    def resume_clock(self, step):
        if self._since is None:
            self._bar.update(step * self.per_step - self._bar.n)
            self._since = time.perf_counter()

    def push(self, step, metrics):
        self._late.append((step, metrics))
        if len(self._late) > 2:
            self._take()

    def stop_clock(self):
        """Waits for the device and stops the clock: evaluation and saving are not training."""
        while self._late:
            self._take()
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def _take(self):
        step, metrics = self._late.popleft()
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not np.isfinite(metrics["loss"]):
            self._bar.close()
            raise FloatingPointError(f"{self.name}: the loss of step {step} is {metrics['loss']}")
        for k, v in metrics.items():
            self.sums[k] = self.sums.get(k, 0.0) + v
        self.count += 1
        self._bar.update(self.per_step)

    def state(self):
        return {"seconds": self.seconds, "sums": dict(self.sums), "count": self.count}

    def row(self):
        means = {k: v / max(self.count, 1) for k, v in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def tell(self, step, loss):
        """A line in the log where no progress bar is drawn: stderr is no terminal."""
        if self._bar.disable:
            logging.info("%s: step %d of %d, loss %.4g, %.0f s", self.name, step,
                         self._bar.total // self.per_step, loss, self.seconds)

    def close(self):
        self._bar.close()
