"""The command as its user meets it: what it writes, what it refuses, what a kill leaves behind.

Every run is a process of its own, as small as it can be; those that do not need each other share
the work directory of a fixture, and all share one compilation cache.
"""

import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest

import rho_learnability
from common import data, flags, vit
from processes import (ROOT, Command, assert_close, assert_refused, gut, has_row, refusals, rows,
                       start_two, trained, without_clocks)

MODEL = ("--learner=16/1/32/2", "--proxy=8/1/16/1", "--patch=16")
TOY = ("--toy_examples=600", "--eval_split=train", "--image_size=32", "--toy_radius=0.25",
       "--toy_tail=1")
METHOD = ("--arms=uniform,learnability", "--ratio=2", "--score_gain=1", "--reference=in_domain",
          "--reference_steps=0", "--learning_rate=1e-3")
TINY = (*TOY, "--steps=9", "--batch_size=8", "--eval_every=3", "--staleness=2",
        *METHOD, *MODEL)  # staleness: so that old weights too must come back after a kill
TWIN = vit.ViT("16/1/32/2", 32, 16, 30)  # the learner, as the reference of one run
THREE = "--arms=uniform,learnability,hard_learner"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("command"), "rho_learnability.py")


def assert_same_run(workdir, other):
    """Rows and last checkpoints of seed 0, bit for bit; only the clocks may differ."""
    seed_0 = [[r for r in rows(w) if r["seed"] == 0] for w in (workdir, other)]
    assert seed_0[0] and without_clocks(seed_0[0]) == without_clocks(seed_0[1])
    names, theirs = (sorted(p.name for p in (w / "checkpoints").glob("*-0")) for w in (workdir, other))
    assert names == theirs and len(names) == 4
    for name in names:
        (step, mine), (other_step, theirs) = trained(workdir, name), trained(other, name)
        assert step == other_step and mine.keys() == theirs.keys()
        assert any("learner" in k for k in mine)
        for k in mine:
            np.testing.assert_array_equal(mine[k], theirs[k], err_msg=f"{name} {k}")


# ----------------------------------------------------------------- a run, and the same one again


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(work directory, Process) of the default arms, trained."""
    workdir = tmp_path_factory.mktemp("finished") / "deep" / "run"
    return workdir, command.good(*TINY, f"--workdir={workdir}")


def test_a_run_leaves_what_the_interface_says(finished):
    workdir, done = finished
    assert {p.name for p in workdir.iterdir()} >= {
        "config.json", "metrics.jsonl", "summary.json", "curves.png", "picks.png", "checkpoints"}
    assert not done.errors and "Traceback" not in done.stderr
    for arm in ("uniform", "reference", "learnability"):  # where there is no progress bar
        assert re.search(rf"\] {arm} seed 0: step 9 of 9, loss \d", done.stderr)
    assert "jax" not in done.stderr and "optax" not in done.stderr  # what they tell of themselves

    config = json.loads((workdir / "config.json").read_text())
    assert config["flags"]["steps"] == 9 and config["flags"]["label_noise"] == -1  # toy's own
    assert config["flags"]["seeds"] == [0] and config["flags"]["score_gain"] == 1.0
    assert {"python", "jax", "commit", "devices"} <= config.keys() and len(config["devices"]) == 1

    got = rows(workdir)
    assert [(r["arm"], r["step"]) for r in got] == [
        (arm, step) for arm in ("reference", "uniform", "learnability") for step in (3, 6, 9)]
    for row in got:
        assert {"arm", "seed", "step", "examples_trained", "examples_scored", "seconds",
                "setup_seconds", "flops"} <= row.keys()
        assert row["examples_trained"] == 8 * row["step"] and row["seconds"] > 0
        assert row["examples_scored"] == row["examples_trained"] * (
            2 if row["arm"] == "learnability" else 1)
        assert all(n >= 0 for n in row["flops"].values()) and np.isfinite(row["loss"])
        assert 0 <= row["accuracy"] <= 1
    for before, after in zip(got, got[1:]):
        if before["arm"] != after["arm"]:
            continue
        assert after["seconds"] > before["seconds"]
        assert sum(after["flops"].values()) > sum(before["flops"].values())

    for picture in ("curves.png", "picks.png"):
        data = (workdir / picture).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_the_summary_has_the_interface_s_form(finished):
    workdir, done = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == {"script", "dataset", "metric", "arms", "speedup"}
    assert (summary["script"], summary["dataset"], summary["metric"]) == (
        "rho_learnability", "toy", "accuracy")
    assert list(summary["arms"]) == ["uniform", "learnability"]
    last = {row["arm"]: row for row in rows(workdir)}
    for arm, entry in summary["arms"].items():
        assert entry.keys() >= {"final", "examples_trained", "examples_scored", "flops", "seconds"}
        assert entry["final"]["accuracy"] == {"mean": last[arm]["accuracy"], "sd": 0.0, "n": 1}
        assert entry["examples_scored"] == last[arm]["examples_scored"]
        assert entry["flops"] == last[arm]["flops"] and entry["seconds"] == last[arm]["seconds"]
    assert list(summary["speedup"]) == ["learnability"]
    entry = summary["speedup"]["learnability"]
    assert entry.keys() >= {"target", "reached", "iterations", "examples_scored", "seconds", "flops"}
    assert list(entry["flops"]) == ["fully_amortised", "foundation_dataset", "pretrained_reference",
                                    "no_amortisation"]
    assert entry["target"] == max(r["accuracy"] for r in rows(workdir) if r["arm"] == "uniform")
    assert re.search(r"^uniform +\d\.\d+ ", done.stdout, re.M)


@pytest.fixture(scope="module")
def again(command, finished):
    """(the files before, the same command's Process, the files after, its training clocks)."""
    workdir, _ = finished
    files = lambda: {str(p.relative_to(workdir)): (p.read_bytes(), p.stat().st_mtime_ns)
                     for p in workdir.rglob("*") if p.is_file()}
    before = files()
    return before, command.good(*TINY, f"--workdir={workdir}"), files()


def test_the_same_command_again_only_reports(finished, again):
    before, done, after = again
    assert before.keys() == after.keys()
    for name in before:  # the modification time too: nothing was trained, scored or rewritten
        if name == "metrics.jsonl" or name.startswith(("checkpoints", "scores")):
            assert before[name] == after[name], name
    for name in ("summary.json", "curves.png", "picks.png"):
        assert before[name][0] == after[name][0], f"{name} changed"
        assert before[name][1] < after[name][1], f"{name} was not made again"
    assert done.stdout == finished[1].stdout


def test_other_flags_in_the_same_directory_are_named(command, finished, again):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    done = command.run(*TINY, f"--workdir={workdir}", "--ratio=3", "--learning_rate=0.5")
    assert_refused(done, r"--ratio \(was 2.0, now 3.0\)", r"--learning_rate \(was 0.001, now 0.5\)",
                   "--workdir=")
    assert "--steps" not in done.errors[0]
    assert before == ((workdir / "config.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes())


@pytest.fixture(scope="module")
def extended(command, finished, tmp_path_factory):
    """A copy of the finished work directory, taken up with one more arm and one more seed."""
    workdir = tmp_path_factory.mktemp("extended") / "copy"
    shutil.copytree(finished[0], workdir)
    command.good(*TINY, f"--workdir={workdir}", THREE, "--seeds=0,1")
    return workdir


def test_more_seeds_and_arms_extend_a_directory(finished, extended):
    was, now = rows(finished[0]), rows(extended)
    assert now[:len(was)] == was
    assert {(r["arm"], r["seed"]) for r in now[len(was):]} == {
        ("hard_learner", 0), ("reference", 1), ("uniform", 1), ("learnability", 1),
        ("hard_learner", 1)}
    summary = json.loads((extended / "summary.json").read_text())
    assert list(summary["arms"]) == ["uniform", "learnability", "hard_learner"]
    assert all(entry["final"]["accuracy"]["n"] == 2 for entry in summary["arms"].values())


@pytest.fixture(scope="module")
def held_out(command, tmp_path_factory):
    """Work directory of the run with a reference of clean labels, which is the learner's twin and
    learns nothing, and fewer steps in the active arm. 72 of the 600 images are the reference's: its
    nine steps see each of them once."""
    workdir = tmp_path_factory.mktemp("held_out") / "run"
    command.good(*TINY, f"--workdir={workdir}", "--reference=held_out", "--held_out_fraction=0.12",
                 "--reference_noise=0", "--proxy=16/1/32/2", "--reference_learning_rate=1e-30",
                 "--active_steps=6")
    return workdir


def test_the_baseline_knows_nothing_of_the_reference(finished, held_out):
    baseline = [[r for r in rows(workdir) if r["arm"] == "uniform"]
                for workdir in (finished[0], held_out)]
    assert without_clocks(baseline[0]) == without_clocks(baseline[1])
    assert [r["step"] for r in rows(held_out) if r["arm"] == "learnability"] == [3, 6]
    assert trained(held_out, "learnability-0")[0] == 6


def test_a_held_out_reference_sees_what_the_arms_do_not_with_labels_as_told(held_out):
    toy = data.open_source("toy", "train", toy_knobs={"n": 600})
    whole = data.Pool(toy, noise=0.4, field="label", seed=0)
    ids, rest = data.split(whole.ids, 0.12, 0)
    reference = [r for r in rows(held_out) if r["arm"] == "reference"]
    for truth in ("duplicate", "hopeless"):
        part, others = (whole.read(some)[truth].mean() for some in (ids, rest))
        assert abs(part - others) > 1e-3
        np.testing.assert_allclose(np.mean([r[f"pool_{truth}"] for r in reference]), part, rtol=1e-5)
    assert len(ids) == 72 and all(r["pool_noisy"] == 0 for r in reference)
    assert all(r["pool_noisy"] > 0 for r in rows(held_out) if r["arm"] != "reference")
    with np.load(held_out / "scores-0.npz") as scores:
        assert len(scores["loss"]) == len(rest)


def test_a_reference_starts_from_weights_of_its_own(held_out):
    """From those of an online one, in fact; here it is as large as the learner."""
    model = rho_learnability.Model("cross_entropy", TWIN)
    key = jax.random.split(jax.random.key(0))[0]
    first = rho_learnability.initial_state("uniform", key, model, model, {
        "learner": optax.identity(), "reference": optax.identity()},
        reference_scores="online")
    _, after = trained(held_out, "reference-0")
    for role, same in (("learner", False), ("reference", True)):
        params = {"learner": {"params": first[role]["params"]}}
        got = [np.allclose(after[jax.tree_util.keystr(path)], x, atol=1e-5)
               for path, x in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "w"]
        assert len(got) > 4 and all(got) == same, role


def test_the_bill_of_a_run_is_the_sum_of_its_steps(held_out):
    F = vit.vit_flops(TWIN)
    last = {r["arm"]: r["flops"] for r in rows(held_out)}
    assert last["reference"]["reference_training"] == 9 * 3 * 8 * F
    assert last["uniform"]["learner"] == 9 * 3 * 8 * F
    bill = {k: v for k, v in last["learnability"].items() if k != "selection"}
    assert bill == {
        "learner": 6 * 3 * 8 * F, "actor_scoring": 6 * 16 * F, "actor_training": 6 * 3 * 8 * F,
        "reference_training": 9 * 3 * 8 * F, "reference_scoring": (600 - 72) * F}


# -------------------------------------------------------------------------- prepared data sets


FEW = ("--steps=4", "--batch_size=8", "--eval_every=2", *METHOD, *MODEL)


def test_a_prepared_set_trains_classification(command, prepared, tmp_path):
    """Images of several sizes, --image_size, noise in the labels, and sub-splits."""
    workdir = tmp_path / "run"
    command.good(*FEW, f"--dataset={prepared['labelled']}", "--image_size=16", "--arms=learnability",
                 "--eval_split=test[:12]", "--split=train[:40]", "--label_noise=0.5",
                 f"--workdir={workdir}")
    last = rows(workdir)[-1]
    assert last["arm"] == "learnability" and last["step"] == 4
    assert (last["accuracy"] * 12).is_integer() and np.isfinite(last["loss"])
    assert 0 < last["pool_noisy"] < 1
    assert (workdir / "picks.png").exists()
    with np.load(workdir / "scores-0.npz") as scores:
        assert scores["loss"].shape == (40,)


def test_a_prepared_set_trains_image_text(command, prepared, tmp_path):
    workdir = tmp_path / "run"
    command.good(*FEW, f"--dataset={prepared['captioned']}", "--task=image_text",
                 "--caption_noise=0.5", "--context=24", "--embed=8", "--arms=learnability",
                 f"--workdir={workdir}")
    last = rows(workdir)[-1]
    assert last["arm"] == "learnability" and last["step"] == 4 and np.isfinite(last["loss"])
    assert (last["recall@1"] * 32).is_integer()  # two ways over 16 test images
    assert 0 < last["pool_noisy"] < 1
    assert json.loads((workdir / "summary.json").read_text())["metric"] == "recall@10"


# --------------------------------------------------------------------------------- what is refused

IMAGE_TEXT = ("--task=image_text",)
REFUSED = {  # flags, then what the line must name: the flag or file, and the mend
    "unknown arm": (["--arms=uniform,magic"], "--arms", "'magic'", "learnability"),
    "an arm twice": (["--arms=uniform,uniform"], "--arms", "once"),
    "no arm": (["--arms="], "--arms"),
    "no seed": (["--seeds="], "--seeds"),
    "seed that is no number": (["--seeds=0,x"], "--seeds=0,x", "numbers"),
    "negative seed": (["--seeds=-1"], "--seeds"),
    "unknown preset": (["--preset=huge"], "--preset", "classact_L", "list"),
    "stray argument": (["steps=3"], "'steps=3'", "--name=value"),
    "set that is not prepared": (["--dataset=mnist", "--data_dir={empty}"], "--dataset=mnist",
                                 "not prepared", "pip install tensorflow", "--data_dir"),
    "path that is not there": (["--dataset={empty}/nowhere/1.0.0"], "--dataset=.*nowhere", "no such"),
    "directory that is no set": (["--dataset={empty}"], "--dataset="),
    "no captions": (["--dataset={labelled}", "--image_size=16", *IMAGE_TEXT], "--dataset",
                    "no feature 'caption'", "label", "--task"),
    "no labels": (["--dataset={captioned}"], "--dataset", "no feature 'label'", "caption", "--task"),
    "images of several sizes": (["--dataset={labelled}", "--image_size=0"], "--dataset", "--image_size"),
    "unknown split": (["--dataset={captioned}", *IMAGE_TEXT, "--split=trian"], "split.*trian",
                      "train"),
    "unknown split of toy": (["--eval_split=val"], "split.*val", "train, test"),
    "empty split": (["--dataset={captioned}", *IMAGE_TEXT, "--split=train[5:5]"],
                    r"split.*train\[5:5\]", "no example"),
    "devices do not divide b": (["--batch_size=6"], "--batch_size=6", "4 devices", "multiple of 4"),
    "devices do not divide B": (["--ratio=1.25"], "ratio", "4 devices", "multiple of 4"),
    "pool smaller than a super-batch": (["--toy_examples=7"], "--ratio=2", "16 examples", "only 7"),
    "ratio below 1": (["--ratio=0.5"], "--ratio=0.5", r"\[1, inf\)"),
    "part of an example": (["--ratio=1.2"], "--ratio=1.2", "batch_size", "whole"),
    "held-out part of no example": (
        ["--reference=held_out", "--held_out_fraction=0.0005"], "--held_out_fraction=0.0005",
        "0 of the 600 examples"),
    "arm held_out without such a part": (["--arms=uniform,held_out"], "--reference=in_domain",
                                         "name --arms without it"),
    "captions of flipped images": ([*IMAGE_TEXT, "--augment=shift_flip"], "--augment=shift_flip",
                                   "'left' and 'right' false"),
    "no gain": (["--score_gain=0"], "--score_gain=0", r"\(0, inf\)"),
    "proxy learning rate": (["--proxy_learning_rate=-1"], "--proxy_learning_rate=-1", r"\[0, inf\)"),
    "weight decay": (["--weight_decay=-1"], "--weight_decay=-1", r"\[0, inf\)"),
    "patch": (["--patch=12"], "--patch=12", "32"),
    "model size": (["--proxy=huge"], "--proxy", "'huge'", "toy"),
    "model size in numbers": (["--learner=16/1/32/3"], "--learner", "heads", "width"),
    "reference noise": (["--reference_noise=-0.5"], "--reference_noise=-0.5",
                        r"\[0, 1\] or -1"),
    "label noise": (["--label_noise=1.5"], "--label_noise=1.5", r"\[0, 1\] or -1"),
    "noise of the other task": (["--caption_noise=0.5"], "--caption_noise", "--task=classification"),
    "noise of the other task, text": (["--task=image_text", "--label_noise=0.5"],
                                      "--label_noise", "--task=image_text"),
    "no reference": (["--reference={empty}/nowhere"], "--reference=.*nowhere", "no such"),
    "empty reference": (["--reference={empty}"], "--reference=", "no checkpoint"),
    "reference of another size": (["--reference={reference}", "--proxy=16/1/16/1"], "--reference=",
                                  "another size"),
    "reference of other heads": (["--reference={reference}", "--proxy=8/1/16/2"], "--reference=",
                                 "another model"),
    "a view that changes": (["--score_view=train", "--augment=shift"], "--reference_scores",
                            "'computed'", "--score_view=train"),
    "nothing after the warm-up": (["--warmup=0.99"], "--warmup=0.99", "less than all"),
    "unknown flag": (["--nonsense=1"], "nonsense"),
    "reference in part": (["--reference={gutted}"], "--reference=.*gutted", "damaged"),
    "reference cut short": (["--reference={cut}"], "--reference=.*cut", "damaged"),
}


@pytest.fixture(scope="module")
def refused(finished, prepared, tmp_path_factory):
    """name in REFUSED -> (how it ended, its work directory)."""
    place = tmp_path_factory.mktemp("refused")
    (place / "empty").mkdir()
    reference = finished[0] / "checkpoints" / "reference-0"
    for name, how in (("gutted", "gone"), ("cut", "cut")):
        shutil.copytree(reference, place / name)
        gut(place / name, how)
    paths = {**prepared, "reference": reference,
             **{name: place / name for name in ("empty", "gutted", "cut")}}
    fill = lambda flag: re.sub(r"\{(\w+)\}", lambda m: str(paths[m[1]]), flag)
    workdirs = [place / f"workdir-{i}" for i in range(len(REFUSED))]
    ended = refusals("rho_learnability", [
        [*TINY, f"--workdir={workdir}", *map(fill, given)]
        for workdir, (given, *_) in zip(workdirs, REFUSED.values())])
    return dict(zip(REFUSED, zip(ended, workdirs)))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(refused, name):
    done, workdir = refused[name]
    assert_refused(done, *REFUSED[name][1:])
    # nor is the directory taken: the command with its flag mended may use it
    assert not workdir.exists(), sorted(p.name for p in workdir.rglob("*"))


def test_a_damaged_checkpoint_of_the_run_itself(command, finished, again, tmp_path):
    old, _ = finished
    workdir = tmp_path / "copy"
    shutil.copytree(old, workdir)
    gut(workdir / "checkpoints" / "learnability-0", "cut")
    before = (workdir / "metrics.jsonl").read_bytes()
    assert_refused(command.run(*TINY, f"--workdir={workdir}"), "learnability-0", "damaged", "delete")
    assert (workdir / "metrics.jsonl").read_bytes() == before

    shutil.rmtree(workdir / "checkpoints" / "learnability-0")  # what the line says
    command.good(*TINY, f"--workdir={workdir}")
    assert without_clocks(rows(workdir)) == without_clocks(rows(old))


def test_cached_scores_of_another_reference_are_noticed(command, finished, tmp_path):
    """A reference that was trained again, over the scores of the one before."""
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    for name in ("reference-0", "learnability-0"):
        shutil.rmtree(workdir / "checkpoints" / name)
    other = tmp_path / "other"
    command.good(*TINY, f"--workdir={other}", "--arms=learnability", "--seeds=1", "--steps=3")
    shutil.copytree(other / "checkpoints" / "reference-1", workdir / "checkpoints" / "reference-0")
    done = command.run(*TINY, f"--workdir={workdir}")
    assert_refused(done, "scores-0.npz", "other weights", "delete it")


# --------------------------------------------------------------------------------- cut short

def test_kills_change_nothing(command, extended, tmp_path):
    """kill -9 while the reference saves, in the baseline, right after a row, and in the last arm."""
    workdir = tmp_path / "run"
    saving = lambda: (any("tmp" in p.name for p in workdir.glob("checkpoints/reference-0/*"))
                      or has_row(workdir, "reference", 9)())
    for moment in (saving, has_row(workdir, "uniform", 3), has_row(workdir, "learnability", 6),
                   has_row(workdir, "hard_learner", 3)):
        running = command.start(*TINY, THREE, f"--workdir={workdir}")
        running.wait_for(moment)
        running.process.kill()
        running.finish()
        assert running.code == -signal.SIGKILL
    assert not has_row(workdir, "hard_learner", 9)()
    command.good(*TINY, THREE, f"--workdir={workdir}")
    assert_same_run(workdir, extended)


def test_signals_save_and_say_how_to_go_on(command, extended, tmp_path):
    """SIGTERM in the one arm, SIGINT in the next; both between two evaluations."""
    workdir = tmp_path / "run"
    for number, arm in ((signal.SIGTERM, "learnability"), (signal.SIGINT, "hard_learner")):
        running = command.start(*TINY, THREE, f"--workdir={workdir}")
        # the row of step 3 is written before its checkpoint: a signal in between would stop there
        running.wait_for((workdir / "checkpoints" / f"{arm}-0" / "3").is_dir)
        running.process.send_signal(number)
        running.finish()
        assert running.code == 130, running.stderr
        assert "Traceback" not in running.stderr and not running.errors
        (line,) = (line for line in running.stderr.splitlines() if "stopped after step" in line)
        assert "same command" in line
        step, = re.search(r"after step (\d+) of " + arm, line).groups()
        assert 3 < int(step) < 9 and trained(workdir, f"{arm}-0")[0] == int(step)
        assert not (workdir / "summary.json").exists()
    done = command.good(*TINY, THREE, f"--workdir={workdir}")
    assert f"hard_learner seed 0: going on from its checkpoint of step {step}" in done.stderr
    assert_same_run(workdir, extended)


def test_a_loss_that_is_not_finite(command, tmp_path):
    workdir = tmp_path / "run"
    # the first step of the warm-up has rate 0, so step 1 is sound; the second ruins the weights
    flags = (*TINY, f"--workdir={workdir}", "--learning_rate=1e30", "--warmup=0.5", "--eval_every=1",
             "--arms=uniform")
    done = command.run(*flags)
    assert_refused(done, "uniform", r"update of step \d left weights that are not finite", code=3)
    failed = int(re.search(r"step (\d)", done.errors[0])[1])
    assert [r["step"] for r in rows(workdir)] == list(range(1, failed + 2))
    step, arrays = trained(workdir, "uniform-0")
    assert 1 <= step <= failed and all(np.isfinite(x).all() for x in arrays.values())
    assert_refused(command.run(*flags), *[re.escape(done.errors[0])], code=3)  # goes on, and ends, there


# --------------------------------------------------------------------------------- several hosts


def test_two_hosts_are_one(command, prepared, tmp_path):
    """Two processes of two devices give what one of four gives."""
    flags = (*FEW, f"--dataset={prepared['labelled']}", "--image_size=16", "--label_noise=0.5",
             "--ratio=2.5", "--batch_size=8")
    one, two = tmp_path / "one", tmp_path / "two"
    command.good(*flags, f"--workdir={one}", devices=4)
    hosts = [p.finish() for p in start_two(command, (*flags, f"--workdir={two}"))]
    assert [p.code for p in hosts] == [0, 0], hosts[0].stderr + hosts[1].stderr
    assert "examples trained" in hosts[0].stdout  # the table; the connections are on stdout too
    assert "examples trained" not in hosts[1].stdout

    def layout(workdir):
        inner = {f"checkpoints/{p.name}" for p in (workdir / "checkpoints").iterdir()}
        return {p.name for p in workdir.iterdir()} | inner
    assert layout(one) == layout(two)
    assert json.loads((two / "config.json").read_text())["hosts"] == 2
    assert_close(rows(two), rows(one), 1e-5)
    for name in ("uniform-0", "learnability-0"):
        (_, mine), (_, theirs) = trained(two, name), trained(one, name)
        assert mine.keys() == theirs.keys()
        for k in mine:
            np.testing.assert_allclose(mine[k], theirs[k], rtol=1e-3, atol=1e-4, err_msg=k)


def test_a_bad_flag_on_one_host_ends_both(command, prepared, tmp_path):
    """The host that refuses says why; the other does not wait for it for minutes."""
    flags = (*FEW, f"--dataset={prepared['labelled']}", "--image_size=16",
             f"--workdir={tmp_path / 'run'}")
    hosts = start_two(command, flags, ((), ("--ratio=1.2",)))
    begin = time.monotonic()
    assert_refused(hosts[1].finish(60), "--ratio=1.2")
    hosts[0].finish(90)
    assert hosts[0].code != 0 and time.monotonic() - begin < 90
    assert not rows(tmp_path / "run")


# --------------------------------------------------------------------------------- --help and presets


def test_help_mentions_every_flag(command):
    done = command.good("--help")
    source = (ROOT / "rho_learnability.py").read_text() + (ROOT / "common" / "flags.py").read_text()
    names = re.findall(r"\bf\.\w+\(\"(\w+)\"", source)
    assert len(names) > 45 and len(set(names)) == len(names)
    missing = [n for n in [*names, "label_noise"] if not re.search(rf"^ +--{n} ", done.stdout, re.M)]
    assert not missing
    assert "super-batch" in done.stdout and "Traceback" not in done.stderr


def test_presets_are_printed_and_their_values_are_valid(command):
    done = command.good("--preset=list")
    printed = re.split(r"^(?=\S)", done.stdout, flags=re.M)[1:]
    assert [p.split()[0] for p in printed] == list(rho_learnability.PRESETS)
    lists = [p.split()[1:] for p in printed]
    for typed, preset in zip(lists, rho_learnability.PRESETS.values()):
        assert typed == flags.as_typed(preset)
    # as typed flags they are parsed, which presets are not; this is refused only after all of them
    for done in refusals("rho_learnability", [
            [*typed, "--dataset=nowhere/at/all"] for typed in lists]):
        assert_refused(done, "--dataset=nowhere/at/all", "no such directory")
