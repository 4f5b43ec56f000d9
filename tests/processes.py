"""The scripts as a user types them: processes, what they print, what they leave behind."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from conftest import COMPILE_FAST

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".pytest_cache" / "jax"  # of compiled programs, shared by all tests and test runs
CLOCKS = ("seconds", "setup_seconds")
LIMIT = 600  # seconds that any one process may take; none comes near on an idle machine


class Process:
    """The command, started; its output goes to files, so that no pipe can fill up."""

    def __init__(self, script, flags, environment, out):
        self.out, self.err = out.with_suffix(".out"), out.with_suffix(".err")
        with open(self.out, "wb") as stdout, open(self.err, "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, script, *map(str, flags)], cwd=ROOT, env=environment,
                stdout=stdout, stderr=stderr)

    def wait_for(self, condition):
        """Returns as soon as `condition()` is true; the process must not have ended before."""
        end = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.stderr}"
            assert time.monotonic() < end, f"nothing came:\n{self.stderr}"
            time.sleep(0.002)

    def finish(self, timeout=LIMIT):
        try:
            self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        self.code = self.process.returncode
        return self

    @property
    def stdout(self):
        return self.out.read_text()

    @property
    def stderr(self):
        return self.err.read_text(errors="replace")

    @property
    def errors(self):
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Command:
    def __init__(self, directory, script):
        self.directory, self.script, self.count = directory, script, 0

    def start(self, *flags, devices=1, **environment):
        """A Process. Logs and warnings may be on stderr; `devices` are forced CPU devices."""
        self.count += 1
        kept = {k: v for k, v in os.environ.items()
                if k not in ("XLA_FLAGS", "DEBUG") and not k.startswith(("JAX_", "SLURM_"))}
        return Process(self.script, flags, {
            **kept, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PJRT_NPROC": "16",
            # programs this small compile longer than they run
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": COMPILE_FAST,
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", **environment},
            self.directory / f"{self.count:03d}")

    def run(self, *flags, **kwargs):
        return self.start(*flags, **kwargs).finish()

    def good(self, *flags, **kwargs):
        done = self.run(*flags, **kwargs)
        assert done.code == 0, done.stderr
        return done


def start_two(command, common, per_process=((), ())):
    """The command on two hosts of two devices each, which are processes here."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [command.start(*common, f"--coordinator=localhost:{port}", "--num_processes=2",
                          f"--process_id={i}", *per_process[i], devices=2) for i in range(2)]


def assert_close(got, want, tolerance):
    """The same rows of metrics, but for the clocks; floats up to `tolerance`, absolute or relative,
    except fractions of what was picked, which are equal."""
    assert [(r["arm"], r["step"]) for r in got] == [(r["arm"], r["step"]) for r in want]
    for mine, theirs in zip(got, want):
        assert mine.keys() == theirs.keys()
        for k in mine.keys() - set(CLOCKS):
            if isinstance(mine[k], float) and not k.startswith(("picked_", "pool_")):
                assert mine[k] == pytest.approx(theirs[k], rel=tolerance, abs=tolerance), (
                    mine["arm"], k)
            else:
                assert mine[k] == theirs[k], (mine["arm"], k)


def refusals(script, lists_of_flags, devices=4):
    """[Process-like with `code` and `stderr`] of the script's main with each list of flags, one
    after the other in a single process (see refuse.py)."""
    done = subprocess.run(
        [sys.executable, "tests/refuse.py", script], cwd=ROOT, text=True, capture_output=True,
        input=json.dumps([list(map(str, flags)) for flags in lists_of_flags]), timeout=LIMIT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
             "XLA_FLAGS": "", "DEBUG": ""})
    assert done.returncode == 0, done.stderr
    out = []
    for code, stderr in json.loads(done.stdout):
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        out.append(types.SimpleNamespace(code=code, stderr=stderr, errors=errors))
    return out


def assert_refused(done, *words, code=2):
    """One line that says `error: ` and all of `words`; no traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    assert len(done.errors) == 1, done.stderr
    for word in words:
        assert re.search(word, done.errors[0]), f"{word!r} is not in: {done.errors[0]}"
    assert len(done.errors[0]) < 600
    assert done.code == code, done.stderr


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def has_row(workdir, arm, step):
    def condition():
        path = workdir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return f'"arm": "{arm}", "seed": 0, "step": {step},' in text
    return condition


def without_clocks(some_rows):
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in some_rows]


def trained(workdir, name):
    """Arrays of the last checkpoint of an arm or stage (parameters, optimiser, stale weights)."""
    import jax
    import orbax.checkpoint as ocp
    (last,) = (p for p in (workdir / "checkpoints" / name).iterdir() if p.name.isdigit())
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(last.resolve() / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return int(last.name), {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves}


def gut(checkpoint, how):
    """Damages the state of the one checkpoint in a directory: half its files 'gone' or all 'cut'."""
    (last,) = (p for p in checkpoint.iterdir() if p.name.isdigit())
    files = sorted(p for p in (last / "state").rglob("*") if p.is_file())
    for path in files[::2] if how == "gone" else files:
        if how == "gone":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)
