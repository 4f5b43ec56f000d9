"""A run's work directory, and a stage: its clock, sums, rows, checkpoints and stop."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import flags, train
from processes import ROOT


@pytest.fixture(autouse=True)
def handlers():
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in old.items():
        signal.signal(s, handler)


def config_for(tmp_path, **changed):
    return flags.Namespace({
        "workdir": str(tmp_path / "new" / "run"), "arms": ["a"], "seeds": [0], "steps": 5,
        "lr": 1e-3, "augment": None, "data_dir": None, "eval_every": 3, **changed})


@pytest.fixture
def new_run(tmp_path):
    """new_run(**flags) -> a Run in the same directory; it gives up the lock of the one before."""
    held = []
    def make(data=(), **changed):
        for run in held:
            run.lock.close()
        held[:] = [train.Run(config_for(tmp_path, **changed), data)]
        return held[0]
    return make


# ------------------------------------------------------------------------------- work directory


def test_the_work_directory_says_what_made_it(new_run):
    run = new_run({"split": "abc"})
    assert sorted(os.listdir(run.config.workdir)) == ["config.json", "lock"]
    written = json.load(open(run.path("config.json")))
    assert written["flags"] == run.config and written["jax"] == jax.__version__
    assert written["python"] == "%d.%d.%d" % sys.version_info[:3]
    assert written["data"] == {"split": "abc"}
    assert len(written["devices"]) == jax.device_count() and written["hosts"] == 1
    assert written["commit"] == train.commit()
    assert written["commit"] is None or len(written["commit"].rstrip("+")) == 40


def test_a_work_directory_is_used_again_with_the_same_flags(new_run):
    new_run()
    free = {"arms": ["a", "b"], "seeds": [0, 1], "data_dir": "there"}
    assert free.keys() < set(train.FREE)
    run = new_run(**free)
    before = Path(run.path("config.json")).read_text()
    assert json.loads(before)["flags"]["seeds"] == [0, 1]
    with pytest.raises(ValueError) as error:
        new_run(lr=2e-3, augment="flip", seeds=[9])
    message = str(error.value)
    assert "--workdir=" in message and "\n" not in message
    assert "--lr (was 0.001, now 0.002)" in message and "--augment (was None, now flip)" in message
    assert "--seeds" not in message and "--steps" not in message
    assert Path(run.path("config.json")).read_text() == before


def test_a_flag_that_is_new_or_gone_differs_too(new_run):
    new_run(old=1)
    with pytest.raises(ValueError, match=r"--old \(was 1, now None\).*--new \(was None, now 2\)"):
        new_run(new=2)


@pytest.mark.parametrize("changed", ["split", "eval_split"])
def test_records_that_have_changed_under_the_same_name_are_noticed(new_run, changed):
    data = {"split": "abc", "eval_split": "def"}
    new_run(data)
    new_run(data)
    with pytest.raises(ValueError, match=f"--workdir=.*records of {changed} have changed"):
        new_run({**data, changed: "xyz"})


def test_a_work_directory_of_another_script(new_run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["there/one.py"])
    new_run(old=1)
    monkeypatch.setattr(sys, "argv", ["two.py"])
    with pytest.raises(ValueError, match="--workdir=.* a run of one.py") as error:
        new_run(new=2)
    assert "--old" not in str(error.value)


def test_a_work_directory_in_use_is_refused_until_its_process_is_gone(tmp_path):
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom common import train\n"
            f"file = train.lock({str(tmp_path)!r}); print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"--workdir=.* in use by process {holder.pid} on host"):
            train.lock(str(tmp_path))
    finally:
        holder.kill()
        holder.wait()
    train.lock(str(tmp_path)).close()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"flags": 3}', "{"])
def test_a_config_that_cannot_be_read_is_said_in_one_line(tmp_path, text):
    config = config_for(tmp_path)
    os.makedirs(config.workdir)
    Path(config.workdir, "config.json").write_text(text)
    with pytest.raises(ValueError, match="^--workdir=.*config.json cannot be read[^\n]*$"):
        train.Run(config)


def test_a_directory_that_cannot_be_made_is_said_in_one_line(tmp_path):
    (tmp_path / "new").write_text("a file")
    with pytest.raises(ValueError, match="^--workdir=.*Not a directory$"):
        train.Run(config_for(tmp_path))


# --------------------------------------------------------------------------- rows, sums and clock


def loop(stage, losses, stop_after=None, state=None):
    """The loop of a script whose state is the sum of the losses. Returns the state."""
    state = stage.resume(state or {"sum": np.zeros(())})
    for index, batch in stage.batches(lambda start: iter(losses[start:])):
        state = {"sum": state["sum"] + batch}
        stage.count({"loss": jnp.float32(batch), "twice": 2 * batch}, trained=4, scored=8,
                    flops={"learner": 3, "actor": 1})
        if stage.evaluates:
            stage.write({"accuracy": float(state["sum"])})
        if stop_after == stage.step:
            stage._run.stop.came = True
        stage.save(state)
    return state


LOSSES = np.arange(1.0, 9.0)


def without_clocks(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_rows_hold_totals_and_means_since_the_row_before(new_run):
    run = new_run()
    spent = train.Totals(step=10, examples_trained=1, seconds=5.0, setup_seconds=2.0,
                         flops={"learner": 100, "reference": 7})
    stage = run.stage("a", 0, 8, spent=spent)
    loop(stage, LOSSES)
    rows = run.metrics.rows()
    assert [r["step"] for r in rows] == [13, 16, 18]  # every third, and the last
    assert [r["loss"] for r in rows] == [2.0, 5.0, 7.5]
    assert [r["twice"] for r in rows] == [4.0, 10.0, 15.0]
    assert [r["accuracy"] for r in rows] == [6.0, 21.0, 36.0]
    assert [r["examples_trained"] for r in rows] == [13, 25, 33]
    assert [r["examples_scored"] for r in rows] == [24, 48, 64]
    assert [r["flops"] for r in rows] == [
        {"learner": 100 + 3 * n, "reference": 7, "actor": n} for n in (3, 6, 8)]
    assert all(r["setup_seconds"] == 2.0 and r["arm"] == "a" and r["seed"] == 0 for r in rows)
    assert 5 < rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"]
    assert stage.totals == train.Totals(**{k: rows[2][k] for k in vars(stage.totals)})
    assert spent.step == 10 and spent.flops == {"learner": 100, "reference": 7}  # not changed


def test_a_finished_stage_trains_nothing_and_knows_its_totals(new_run):
    run = new_run()
    first = run.stage("a", 0, 8)
    state = loop(first, LOSSES)
    before = run.metrics.rows()
    again = new_run().stage("a", 0, 8)
    assert loop(again, LOSSES * np.nan) == state
    assert again.totals == first.totals and run.metrics.rows() == before


@pytest.mark.parametrize("stop_after", range(1, 8))
def test_a_stop_anywhere_changes_nothing(new_run, stop_after):
    whole = new_run()
    state = loop(whole.stage("whole", 0, 8), LOSSES)
    with pytest.raises(flags.Stopped, match=f"stopped after step {stop_after} of a, seed 0"):
        loop(new_run().stage("a", 0, 8), LOSSES, stop_after)
    run = new_run()
    assert loop(run.stage("a", 0, 8), LOSSES) == state
    mine, theirs = ([{**r, "arm": 0} for r in run.metrics.rows() if r["arm"] == arm]
                    for arm in ("a", "whole"))
    assert without_clocks(mine) == without_clocks(theirs)


def test_a_kill_after_a_row_and_before_its_checkpoint_drops_the_row(new_run, monkeypatch):
    run = new_run()
    monkeypatch.setattr(train.Stage, "save", lambda *_: None)
    loop(run.stage("a", 0, 8), LOSSES)
    monkeypatch.undo()
    run = new_run()
    loop(run.stage("a", 0, 8), LOSSES)
    assert [r["step"] for r in run.metrics.rows()] == [3, 6, 8]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("step", [4, 7])
def test_a_loss_that_is_not_finite_ends_the_run_under_its_own_step(new_run, bad, step):
    losses = LOSSES.copy()
    losses[step] = bad
    run = new_run()
    with pytest.raises(FloatingPointError, match=f"^a seed 0: the loss of step {step} is "):
        loop(run.stage("a", 0, 8), losses)
    assert [r["step"] for r in run.metrics.rows()] == [3, 6][:1 + (step > 5)]


def test_the_device_is_read_two_steps_late(new_run):
    stage = new_run(eval_every=100).stage("a", 0, 8)
    stage.resume({"sum": np.zeros(())})
    for index, loss in stage.batches(lambda start: iter(LOSSES)):
        stage.count({"loss": loss}, trained=1, scored=1, flops={})
        assert stage._n == max(0, index - 1) or index == 7


def test_the_clock_counts_training_only(new_run, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    class Slow:
        def __float__(self):  # reading it takes a second: the step was still under way
            now[0] += 1
            return 0.5
    monkeypatch.setattr(jax, "device_get", lambda x: x)
    run = new_run()
    stage = run.stage("a", 0, 6)
    state, seconds = stage.resume({"x": np.zeros(1)}), []
    now[0] += 1000  # before the loop
    for index, batch in stage.batches(lambda start: iter(range(6))):
        now[0] += 10  # a step
        if index == 0:  # which is compiled first
            now[0] += 500
            train.devices.compiling.seconds += 500
        stage.count({"loss": Slow()}, trained=1, scored=1, flops={})
        if stage.evaluates:
            seconds.append(stage.totals.seconds)
            now[0] += 1000  # evaluation
            stage.write({})
        stage.save(state)
    assert seconds == [33.0, 66.0] and stage.totals.seconds == 66.0


# ---------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGINT),
                                           (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_asks_for_a_stop_and_a_second_one_insists(first, second):
    stop = train.Stop()
    with stop.awaited():
        assert not stop
        os.kill(os.getpid(), first)
        for _ in range(200):
            if stop:
                break
            time.sleep(0.005)
        assert stop and bool(stop) is True
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), second)
            time.sleep(2)
    assert end.value.code == 128 + second


def test_a_signal_outside_a_training_loop_ends_the_program(new_run, capsys):
    """Nothing would ask for the stop there, for minutes if a probe is fitted."""
    run = new_run()
    stage = run.stage("a", 0, 8)
    loop(stage, LOSSES)
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)
    assert end.value.code == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().err
    assert run.stop  # where python swallows the exit, in a callback, the next loop stops


def test_once_a_command_has_ended_a_signal_is_nobody_s_business():
    code = """if True:
        import atexit, signal
        from common import flags, train
        atexit.register(lambda: print([signal.getsignal(s) for s in (2, 15)]))
        flags.run(train.Stop)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count("SIG_DFL") == 2, done.stdout + done.stderr


def test_a_stop_at_the_very_end_of_a_stage_is_no_later_one(new_run):
    with pytest.raises(flags.Stopped, match="stopped after step 8 of a, seed 0"):
        loop(new_run().stage("a", 0, 8), LOSSES, 8)
    run = new_run()
    loop(run.stage("a", 0, 8), LOSSES * np.nan)
    assert [r["step"] for r in run.metrics.rows()][-1] == 8


# --------------------------------------------------------------------------------- checkpoints


def same(a, b):
    """Equal in structure, type and every bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


@functools.partial(jax.jit, static_argnums=1)
def trained(steps, width=3):
    """A state as the scripts have it, optax's named tuples, counters and a bfloat16 included."""
    optimiser = optax.adamw(optax.linear_schedule(0.0, 0.1, 10), mask=lambda p: jax.tree.map(
        lambda x: x.ndim > 1, p))
    params = {"block": {"w": jnp.linspace(-1, 1, 2 * width).reshape(2, width),
                        "b": jnp.zeros(width)},
              "half": jnp.asarray([0.1, 0.2], jnp.bfloat16), "log_t": jnp.log(10.0)}

    def step(i, state):
        updates, opt = optimiser.update(
            jax.tree.map(lambda x: jnp.sin(x + i).astype(x.dtype), state["params"]),
            state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}
    state = {"params": params, "opt": optimiser.init(params)}
    return {"learner": jax.lax.fori_loop(0, steps, step, state), "step": jnp.int32(steps)}


RECORD = {"totals": {"seconds": 0.1 + 0.2, "flops": {"learner": 10**19}}, "sums": {"loss": 1 / 3},
         "n": 2, "about": {"heads": 3}}


@pytest.fixture(scope="module")
def step_three(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "arm-0"
    checkpoints = train.Checkpoints(path)
    checkpoints.save(3, trained(3), RECORD)
    checkpoints.close()
    return path


@pytest.fixture
def saved(step_three, tmp_path):
    """A directory with the checkpoint of step 3."""
    return str(shutil.copytree(step_three, tmp_path / "arm-0"))


def without_hash(record):
    return {k: v for k, v in record.items() if k != "sha256"}


def test_a_checkpoint_comes_back_bit_for_bit(saved):
    again = train.Checkpoints(saved)
    assert again.latest() == 3
    for template in (trained(0), jax.eval_shape(trained, 0)):
        state, record = again.restore(template)
        same(state, jax.device_get(trained(3)))
        assert without_hash(record) == RECORD
    again.close()


def test_only_the_last_checkpoint_is_kept_and_a_step_is_saved_once(saved):
    checkpoints = train.Checkpoints(saved)
    checkpoints.save(3, trained(1), {"n": 99})  # saved by an earlier process
    checkpoints.save(5, trained(5), RECORD)
    checkpoints.save(5, trained(1), {"n": 99})  # and while it is being written
    checkpoints.close()
    assert [name for name in os.listdir(saved) if name.isdigit()] == ["5"]
    state, record = train.Checkpoints(saved).restore(trained(0))
    same(state, jax.device_get(trained(5)))
    assert without_hash(record) == RECORD


def test_nothing_is_saved_and_nothing_is_made(tmp_path):
    checkpoints = train.Checkpoints(tmp_path / "none")
    assert checkpoints.latest() is None
    checkpoints.close()
    assert not (tmp_path / "none").exists()


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path):
    state = {"x": np.arange(4.0)}
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    state["x"][:] = -1  # as donation does, while the writing goes on
    checkpoints.close()
    restored, _ = train.Checkpoints(tmp_path).restore(state)
    np.testing.assert_array_equal(restored["x"], np.arange(4.0))


def damage(directory):
    """Empties every file of the checkpoint, but for the marks that make it one."""
    for path in Path(directory).rglob("*"):
        if path.is_file() and path.name != "_CHECKPOINT_METADATA":
            path.write_bytes(b"")


def flip_a_bit(directory):
    """Of the largest file of the state: in an array."""
    path = max((p for p in Path(directory).rglob("*") if p.is_file() and "state" in str(p)),
               key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["damaged", "a bit", "other leaves", "other shape"])
def test_a_damaged_or_foreign_checkpoint_is_refused(saved, how):
    template = trained(0, width=4) if how == "other shape" else trained(0)
    {"damaged": damage, "a bit": flip_a_bit}.get(how, lambda _: None)(saved)
    if how == "other leaves":
        template["learner"]["params"]["more"] = jnp.zeros(2)
    with pytest.raises(ValueError) as error:
        train.Checkpoints(saved).restore(template)
    message = str(error.value)
    assert "\n" not in message and saved in message and "delete" in message


def test_arrays_that_are_not_those_of_the_hash_are_refused(tmp_path, monkeypatch):
    """As where a disk flips a bit that no other check sees."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "digest", lambda tree: "0" * 64)
        checkpoints = train.Checkpoints(tmp_path / "arm-0")
        checkpoints.save(1, {"w": np.ones(3)}, {})
        checkpoints.close()
    with pytest.raises(ValueError, match="is damaged or of another model .its hash differs."):
        train.Checkpoints(tmp_path / "arm-0").restore({"w": np.ones(3)})


@pytest.mark.parametrize("value", [1, 0.5, -2.0])
def test_any_change_of_an_array_changes_its_hash(value):
    tree = train.devices.to_host(trained(3))
    before = train.digest(tree)
    assert before == train.digest(jax.tree.leaves(tree)[::-1])  # containers and order do not matter
    tree["learner"]["params"]["block"]["w"][1, 2] += value
    assert train.digest(tree) != before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(bad, tmp_path):
    checkpoints = train.Checkpoints(tmp_path / "arm-0")
    state = {"w": np.ones(3, np.float32), "count": np.int32(1)}
    checkpoints.save(3, state, {"n": 3})
    with pytest.raises(FloatingPointError, match="arm-0: the update of step 4 "):
        checkpoints.save(5, {**state, "w": np.float32([1, bad, 1])}, {"n": 5})
    checkpoints.close()
    assert train.Checkpoints(tmp_path / "arm-0").latest() == 3


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    checkpoints = train.Checkpoints(tmp_path / "arm-0")
    def full(*_, **__):
        raise RuntimeError("Event loop is\nclosed")
    monkeypatch.setattr(train.ocp.CheckpointManager, "save", full)
    with pytest.raises(flags.DiskError, match="arm-0: a checkpoint could not be .*Event loop is cl"):
        checkpoints.save(1, {"w": np.ones(3)}, {})
