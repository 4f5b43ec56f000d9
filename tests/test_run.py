"""A run's outside: flags and presets, work directory, clock and sums, stop, checkpoints, devices."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import checkpoint, devices, run
from processes import ROOT

N = jax.device_count()


def same(a, b):
    """Equal in structure, type and every bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


# -------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("given,name", [
    ("toy", "toy"), ("mnist", "mnist"), ("data/emoji/1.0.0", "emoji"), ("/a/emoji/1.0.0/", "emoji"),
    ("../sets/own", "own"), ("3.0.1", "3.0.1"), ("..", "..")])
def test_a_version_is_not_a_name(given, name):
    assert run.dataset_name(given) == name


PRESETS = {"toy": {}, "paper": {"eval_every": 7, "label_noise": 0.25, "arms": ["one"]}}


@pytest.fixture
def resolve(monkeypatch):
    """resolve('--a=b', ...) -> config, typed, with flags of its own that no other test sees."""
    def resolved(*typed, presets=PRESETS):
        values = flags.FlagValues()
        ours = types.SimpleNamespace(FLAGS=values, **{
            name: functools.partial(getattr(flags, name), flag_values=values)
            for name in dir(flags) if name.startswith("DEFINE_")})
        monkeypatch.setattr(run, "flags", ours)
        run.define_flags("script")
        ours.DEFINE_list("arms", "one,two", "")
        ours.DEFINE_integer("steps", 5, "")
        values(["script", *typed])
        return run.resolve(presets)
    return resolved


def test_a_typed_flag_beats_the_preset_and_that_beats_the_default(resolve):
    config, typed = resolve()
    assert typed == []
    assert (config.preset, config.eval_every, config.label_noise) == ("toy", 100, 0.0)
    assert config.arms == ["one", "two"] and config.workdir == "runs/script"
    config, typed = resolve("--preset=paper", "--eval_every=3")
    assert set(typed) == {"preset", "eval_every"}  # what the preset gave was not typed
    assert (config.eval_every, config.label_noise, config.arms) == (3, 0.25, ["one"])
    # typing what is the default anyway counts as typed
    assert resolve("--preset=paper", "--eval_every=100")[0].eval_every == 100
    assert PRESETS["paper"]["eval_every"] == 7


def test_the_config_holds_the_flags_and_only_ours(resolve):
    config, _ = resolve("--seeds=3,1", "--steps=9")
    assert config.seeds == [3, 1] and config["steps"] == config.steps == 9
    assert {"dataset", "workdir", "arms", "num_processes"} < set(config)
    assert not {"verbosity", "v", "help"} & set(config)
    assert run.toy_knobs(config) == {"n": 20_000, "tail": 1.0, "duplicates": 0.1, "hopeless": 0.05}


def test_presets_are_listed(resolve, capsys):
    with pytest.raises(SystemExit) as end:
        resolve("--preset=list")
    printed = capsys.readouterr().out.split()
    assert end.value.code == 0
    assert {"toy", "paper", "--eval_every=7", "--label_noise=0.25", "--arms=one"} == set(printed)


@pytest.mark.parametrize("typed", [
    "--preset=nonsense", "--seeds=0,x", "--seeds=1.5", "--seeds=1,4294967297", "--label_noise=1.01", "--label_noise=nan",
    "--caption_noise=-0.1", "--eval_every=0", "--checkpoint_every=-1", "--image_size=-1"])
def test_bad_flags_are_refused_by_name(resolve, typed):
    with pytest.raises(ValueError) as error:
        resolve(typed)
    assert str(error.value).startswith(typed + ": want ")


def test_the_ends_of_the_ranges_are_allowed(resolve):
    config, _ = resolve("--label_noise=1", "--caption_noise=0", "--eval_every=1",
                        "--checkpoint_every=0")
    assert (config.label_noise, config.eval_every) == (1.0, 1)


# ------------------------------------------------------------------------------- work directory


def config_for(tmp_path, **changed):
    return run.Namespace({
        "workdir": str(tmp_path / "new" / "run"), "arms": ["a"], "seeds": [0], "steps": 5, "lr": 1e-3,
        "augment": None, "data_dir": None, "checkpoint_every": 0, **changed})


def test_the_work_directory_says_what_made_it(tmp_path):
    config = config_for(tmp_path)
    run.open_workdir(config)
    assert sorted(os.listdir(config.workdir)) == ["config.json", "lock"]
    written = json.load(open(os.path.join(config.workdir, "config.json")))
    assert written["flags"] == config and written["jax"] == jax.__version__
    assert written["python"] == "%d.%d.%d" % sys.version_info[:3]
    assert len(written["devices"]) == N and written["hosts"] == 1
    assert written["commit"] == run.commit()
    assert written["commit"] is None or len(written["commit"].rstrip("+")) == 40


def test_a_work_directory_is_taken_up_with_the_same_flags(tmp_path):
    run.open_workdir(config_for(tmp_path))
    free = {"arms": ["a", "b"], "seeds": [0, 1], "checkpoint_every": 3, "data_dir": "there"}
    assert free.keys() < set(run.FREE)
    run.open_workdir(config_for(tmp_path, **free))
    path = os.path.join(config_for(tmp_path).workdir, "config.json")
    assert json.load(open(path))["flags"]["seeds"] == [0, 1]
    before = open(path).read()
    with pytest.raises(ValueError) as error:
        run.open_workdir(config_for(tmp_path, lr=2e-3, augment="flip", seeds=[9]))
    message = str(error.value)
    assert "--workdir=" in message and "\n" not in message
    assert "--lr (was 0.001, now 0.002)" in message and "--augment (was None, now flip)" in message
    assert "--seeds" not in message and "--steps" not in message
    assert open(path).read() == before


def test_a_flag_that_is_new_or_gone_differs_too(tmp_path):
    run.open_workdir(config_for(tmp_path, old=1))
    with pytest.raises(ValueError, match=r"--old \(was 1, now None\).*--new \(was None, now 2\)"):
        run.open_workdir(config_for(tmp_path, new=2))


def test_a_work_directory_of_another_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["there/one.py"])
    run.open_workdir(config_for(tmp_path, old=1))
    monkeypatch.setattr(sys, "argv", ["two.py"])
    with pytest.raises(ValueError) as error:
        run.open_workdir(config_for(tmp_path, new=2))
    message = str(error.value)
    assert "--workdir=" in message and "a run of one.py" in message and "--old" not in message


def test_a_work_directory_in_use_is_refused_until_its_process_is_gone(tmp_path):
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom common import run\n"
            f"run.lock({str(tmp_path)!r}); print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"--workdir=.* in use by process {holder.pid} on host"):
            run.lock(str(tmp_path))
    finally:
        holder.kill()
        holder.wait()
    run.lock(str(tmp_path))
    run.lock(str(tmp_path))  # its own lock does not stop a process


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"flags": 3}', "{"])
def test_a_config_that_cannot_be_read_is_said_in_one_line(tmp_path, text):
    config = config_for(tmp_path)
    os.makedirs(config.workdir)
    Path(config.workdir, "config.json").write_text(text)
    with pytest.raises(ValueError, match="^--workdir=.*config.json cannot be read[^\n]*$"):
        run.open_workdir(config)


@pytest.mark.parametrize("typed", [["--process_id=1"], ["--num_processes=2", "--process_id=1"]])
def test_several_processes_need_a_coordinator(resolve, typed):
    with pytest.raises(ValueError, match="--process_id=1: give --coordinator"):
        resolve(*typed)


def test_a_home_directory_in_a_path_is_filled_in(resolve, monkeypatch):
    monkeypatch.setenv("HOME", "/there")
    config, _ = resolve("--workdir=~/x", "--dataset=~/y/1.0.0")
    assert (config.workdir, config.dataset) == ("/there/x", "/there/y/1.0.0")


def test_only_the_seed_is_filled_into_a_path():
    assert run.for_seed("runs/{lr}/{seed}/{}", 7) == "runs/{lr}/7/{}"


# ---------------------------------------------------------------------------------- clock, sums


def test_rows_are_means_since_the_last_row():
    books = run.Books("a", 10, 4)
    for step in range(4):
        books.push(step, {"loss": jnp.float32(step), "score": np.float32(10 * step)})
    books.stop_clock()
    assert books.row() == {"loss": 1.5, "score": 15.0}
    assert books.row() == {}  # nothing since
    books.push(4, {"loss": jnp.float32(7)})
    books.stop_clock()
    assert books.row() == {"loss": 7.0}
    books.close()


def test_the_device_is_read_two_steps_late():
    books = run.Books("a", 10, 4)
    for step in range(3):
        books.push(step, {"loss": 1.0})
        assert books.count == max(0, step - 1)
    books.stop_clock()
    assert books.count == 3
    books.close()


def test_books_that_are_saved_in_mid_interval_give_the_same_row():
    losses = np.random.default_rng(0).normal(size=9)
    def push(books, some):
        for step in some:
            books.resume_clock(step)
            books.push(step, {"loss": losses[step], "other": -losses[step]})
        books.stop_clock()
    whole, first = run.Books("a", 9, 1), run.Books("a", 9, 1)
    push(whole, range(9))
    push(first, range(4))
    state = first.state()
    saved = json.dumps(state)
    second = run.Books("a", 9, 1, json.loads(saved))
    push(second, range(4, 9))
    assert second.row() == whole.row() and second.seconds > first.seconds > 0
    push(first, range(4, 9))
    assert json.dumps(state) == saved  # a copy: it is written while the run goes on
    for books in (whole, first, second):
        books.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_ends_the_run(bad):
    books = run.Books("learnability seed 0", 10, 4)
    with pytest.raises(FloatingPointError, match="learnability seed 0.*step 5 .*(nan|inf)"):
        for step in range(10):  # found late, but under its own step
            books.push(step, {"loss": jnp.float32(bad if step == 5 else 1.0)})
    books = run.Books("a", 10, 4)
    books.push(9, {"loss": jnp.float32(bad)})
    with pytest.raises(FloatingPointError, match="step 9"):
        books.stop_clock()
    books = run.Books("a", 10, 4)
    books.push(0, {"loss": 1.0, "other": bad})  # only the loss must be finite
    books.stop_clock()


def test_the_clock_counts_training_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    books = run.Books("a", 10, 4, {"seconds": 5.0, "sums": {}, "count": 0})
    now[0] += 1000  # compilation, before the clock runs
    for step in range(3):
        books.resume_clock(step)  # running already: no new start
        now[0] += 2
    books.stop_clock()
    assert books.seconds == 11.0
    now[0] += 1000  # evaluation
    books.stop_clock()
    assert books.seconds == 11.0
    books.resume_clock(3)
    now[0] += 0.5
    books.stop_clock()
    assert books.seconds == books.state()["seconds"] == 11.5
    books.close()


def test_the_clock_runs_until_the_device_is_done(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    class Slow:
        def __float__(self):  # reading it takes a second: the step was still under way
            now[0] += 1
            return 0.5
    monkeypatch.setattr(jax, "device_get", lambda x: x)
    books = run.Books("a", 10, 4)
    books.resume_clock(0)
    for step in range(4):
        books.push(step, {"loss": Slow()})
    books.stop_clock()
    assert books.seconds == 4.0
    books.close()


# ---------------------------------------------------------------------------------------- stop


@pytest.fixture
def handlers():
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in old.items():
        signal.signal(s, handler)


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGINT),
                                           (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_asks_for_a_stop_and_a_second_one_insists(handlers, first, second):
    stop = run.Stop()
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


# --------------------------------------------------------------------------------- checkpoints


@functools.partial(jax.jit, static_argnums=1)
def trained(steps, width=3):
    """A state as the scripts have it, optax's named tuples, counters and a bfloat16 included."""
    optimiser = optax.adamw(optax.linear_schedule(0.0, 0.1, 10), mask=lambda p: jax.tree.map(
        lambda x: x.ndim > 1, p))
    params = {"block": {"w": jnp.linspace(-1, 1, 2 * width).reshape(2, width), "b": jnp.zeros(width)},
              "half": jnp.asarray([0.1, 0.2], jnp.bfloat16), "log_t": jnp.log(10.0)}

    def step(i, state):
        updates, opt = optimiser.update(
            jax.tree.map(lambda x: jnp.sin(x + i).astype(x.dtype), state["params"]),
            state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}
    state = {"params": params, "opt": optimiser.init(params)}
    return {"learner": jax.lax.fori_loop(0, steps, step, state), "step": jnp.int32(steps)}


BOOKS = {"seconds": 0.1 + 0.2, "sums": {"loss": 1 / 3}, "count": 2, "flops": 1e18}


@pytest.fixture(scope="module")
def step_three(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "arm-0"
    checkpoints = checkpoint.Checkpoints(path)
    checkpoints.save(3, trained(3), BOOKS)
    checkpoints.close()
    return path


@pytest.fixture
def saved(step_three, tmp_path):
    """A directory with the checkpoint of step 3."""
    return str(shutil.copytree(step_three, tmp_path / "arm-0"))


def damage(directory):
    """Empties every file of the checkpoint, but for the marks that make it one."""
    for place, _, names in os.walk(directory):
        for name in names:
            if name != "_CHECKPOINT_METADATA":
                open(os.path.join(place, name), "w").close()


def test_a_checkpoint_comes_back_bit_for_bit(saved):
    again = checkpoint.Checkpoints(saved)
    assert again.latest() == 3
    for like in (trained(0), jax.eval_shape(trained, 0)):
        state, books = again.restore(like)
        same(state, jax.device_get(trained(3)))
        assert books == BOOKS
    again.close()


def test_only_the_last_checkpoint_is_kept(saved):
    checkpoints = checkpoint.Checkpoints(saved)
    for step in (4, 6):
        checkpoints.save(step, trained(step), {**BOOKS, "count": step})
    checkpoints.close()
    assert [name for name in os.listdir(saved) if name.isdigit()] == ["6"]
    again = checkpoint.Checkpoints(saved)
    assert again.latest() == 6
    state, books = again.restore(trained(0))
    same(state, jax.device_get(trained(6)))
    assert books["count"] == 6
    again.close()


def test_nothing_is_saved_yet(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "none")
    assert checkpoints.latest() is None
    checkpoints.close()


def test_saving_a_step_twice_changes_nothing(saved):
    checkpoints = checkpoint.Checkpoints(saved)
    checkpoints.save(3, trained(1), {"count": 99})  # saved by an earlier process
    checkpoints.save(5, trained(5), BOOKS)
    checkpoints.save(5, trained(1), {"count": 99})  # and while it is being written
    checkpoints.close()
    again = checkpoint.Checkpoints(saved)
    state, books = again.restore(trained(0))
    same(state, jax.device_get(trained(5)))
    assert books == BOOKS
    again.close()


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path):
    state = {"x": np.arange(4.0)}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    state["x"][:] = -1  # as donation does, while the writing goes on
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path)
    np.testing.assert_array_equal(again.restore(state)[0]["x"], np.arange(4.0))
    again.close()


@pytest.mark.parametrize("how", ["damaged", "other leaves", "other shape"])
def test_a_damaged_or_foreign_checkpoint_is_refused(saved, how):
    like = trained(0, width=4) if how == "other shape" else trained(0)
    if how == "damaged":
        damage(saved)
    if how == "other leaves":
        like["learner"]["params"]["more"] = jnp.zeros(2)
    with pytest.raises(ValueError) as error:
        checkpoints = checkpoint.Checkpoints(saved)
        checkpoints.restore(like)
    message = str(error.value)
    assert "\n" not in message and saved in message and "delete" in message


def test_params_are_restored_without_the_optimiser(saved):
    want = jax.device_get(trained(3)["learner"]["params"])
    like = jax.eval_shape(lambda: trained(0)["learner"]["params"])
    params, books = checkpoint.restore_params(saved, like, "reference")
    same(params, want)
    assert books == BOOKS


@pytest.mark.parametrize("how, word", [
    ("size", "size"), ("fewer", "size"), ("missing", "no such"), ("empty", "no checkpoint"),
    ("damaged", "damaged")])
def test_params_that_do_not_fit_are_refused_by_flag(saved, tmp_path, how, word):
    directory, like = saved, trained(0, width=4 if how == "size" else 3)["learner"]["params"]
    if how == "fewer":
        del like["half"]
    if how == "missing":
        directory = str(tmp_path / "nowhere")
    if how == "empty":
        directory = str(tmp_path / "empty")
        os.makedirs(directory)
    if how == "damaged":
        damage(saved)
    with pytest.raises(ValueError) as error:
        checkpoint.restore_params(directory, like, "reference")
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"--reference={directory}: ")
    assert word in message
    assert how != "missing" or not os.path.exists(directory)


# ------------------------------------------------------------------------------------- devices


def test_rows_are_sharded_in_order_and_gathered_back():
    batch = {"x": np.arange(6 * N).reshape(2 * N, 3), "y": np.arange(2 * N, dtype=np.float32)}
    sharded = devices.shard(batch)
    assert sharded["x"].shape == (N, 2, 3) and sharded["y"].shape == (N, 2)
    got = devices.pmap(lambda b: jax.tree.map(devices.gather, b), (0,))(sharded)
    for k in batch:
        np.testing.assert_array_equal(got[k], batch[k])


def test_a_gathered_gradient_is_the_whole_batch_s():
    x = np.random.default_rng(0).normal(size=(2 * N, 3)).astype(np.float32)
    def loss(w, rows, everyone):
        return jnp.tanh(jnp.einsum("sd,de,ae->sa", rows, w, everyone)).mean()
    def share(w, rows):
        local = lambda w: loss(w, rows, devices.gather(rows @ w))
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


def test_a_program_is_compiled_once_and_keeps_state_unreplicated():
    traced = []
    def step(state, index, batch):
        traced.append(index)
        state = {"w": state["w"] + devices.mean(batch.mean()), "n": state["n"] + 1}
        return state, {"loss": state["w"].sum() + index}
    program = devices.Program(step, (None, None, 0), donate=True)
    state, batch = {"w": jnp.zeros(3), "n": jnp.int32(0)}, devices.shard(np.ones(2 * N, np.float32))
    compiled = program.compile(state, np.int32(0), batch)
    assert len(traced) == 1 and float(state["w"].sum()) == 0  # compiling runs nothing
    for i in range(3):
        state, metrics = program(state, np.int32(i), batch)
    fresh = {"w": jnp.zeros(3), "n": jnp.int32(0)}  # as the next seed has it
    assert program.compile(fresh, np.int32(0), batch) is compiled and len(traced) == 1
    np.testing.assert_array_equal(state["w"], [3, 3, 3])
    assert state["n"] == 3 and metrics["loss"] == 9 + 2 and state["w"].shape == (3,)
    np.testing.assert_array_equal(program(fresh, np.int32(0), batch)[0]["w"], [1, 1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(bad, tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / "arm-0")
    state = {"w": np.ones(3, np.float32), "count": np.int32(1)}
    checkpoints.save(3, state, {"count": 3})
    with pytest.raises(FloatingPointError, match="arm-0: the update of step 4 "):
        checkpoints.save(5, {**state, "w": np.float32([1, bad, 1])}, {"count": 5})
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path / "arm-0")
    assert again.latest() == 3
    again.close()
