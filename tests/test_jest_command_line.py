"""jest.py as its user meets it: what it writes, what it refuses, what a kill leaves behind."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest

import jest
from processes import (ROOT, Command, assert_close, assert_refused, gut, has_row, rows, start_two,
                       trained, without_clocks)

TINY = ("--toy_examples=600", "--steps=9", "--active_steps=0", "--reference_steps=6",
        "--batch_size=8", "--eval_every=3", "--model=16/1/32/1", "--patch=8", "--low_patch=16",
        "--context=24", "--embed=8", "--n_chunks=3", "--filter_ratio=0.5", "--curated_fraction=0.2",
        "--learning_rate=1e-3", "--arms=uniform,independent,jest,flexi_jest")
ARMS = ("uniform", "independent", "jest", "flexi_jest")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("command"), "jest.py")


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(work directory, Process) of the default arms, trained."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, command.good(*TINY, f"--workdir={workdir}")


def test_a_run_leaves_what_the_interface_says(finished):
    workdir, done = finished
    names = {p.name for p in workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "curves.png", "picks.png",
            "checkpoints"} <= names
    summary = json.loads((workdir / "summary.json").read_text())
    assert list(summary["arms"]) == list(ARMS) and summary["metric"] == "recall@10"
    assert set(summary["speedup"]) == set(ARMS[1:])
    for row in rows(workdir):
        assert {"arm", "seed", "step", "examples_trained", "examples_scored", "seconds",
                "flops", "recall@1", "recall@5", "recall@10", "zero_shot"} <= set(row)
        assert row["examples_scored"] == row["step"] * (8 if row["arm"] in (
            "uniform", "reference") else 16)
    last = {r["arm"]: r for r in rows(workdir)}
    assert {"score_uniform", "score_independent", "score_joint"} <= set(last["jest"])
    assert {"rank_correlation", "pick_overlap"} <= set(last["flexi_jest"])
    assert 0 <= last["flexi_jest"]["pick_overlap"] <= 1
    for arm in ARMS:  # the table, the bill and the cost of an iteration
        assert re.search(rf"^{arm} ", done.stdout, re.M)
    assert "an iteration of jest costs 167 % of uniform's; 133 %" in done.stdout
    assert "are longer than 23 tokens and are cut" in done.stderr


def test_the_bill_of_a_run_is_the_sum_of_its_steps(finished):
    last = {r["arm"]: r["flops"] for r in rows(finished[0])}
    model = jest.Model("sigmoid", jest.vit.ViT("16/1/32/1", 32, 8, 8, pool="map"),
                       jest.vit.Text("16/1/32/1", jest.data.VOCAB, 24, 8, pool="map"))
    F, F_low = (jest.forward_flops(m) for m in (model, jest.cut_at(model, 16)))
    assert last["reference"]["reference_training"] == 6 * 3 * 8 * F
    assert last["uniform"] == {"learner": 9 * 3 * 8 * F, "actor_scoring": 0, "selection": 0,
                               "reference_scoring": 0}
    assert last["jest"]["actor_scoring"] == 9 * 16 * F
    assert last["jest"]["reference_scoring"] == 480 * F  # the pool without the curated fifth
    assert last["flexi_jest"]["actor_scoring"] == 9 * 16 * F_low
    assert last["flexi_jest"]["learner"] == 9 * 3 * 8 * (F + F_low) / 2


@pytest.fixture(scope="module")
def curated(command, tmp_path_factory):
    """Work directory of two seeds, whose references and active arms learn nothing, with fewer
    steps in the active arm and a larger curated part."""
    workdir = tmp_path_factory.mktemp("curated") / "run"
    command.good(*TINY, f"--workdir={workdir}", "--arms=uniform,jest", "--seeds=0,1",
                 "--curated_fraction=0.4", "--reference_learning_rate=1e-30",
                 "--active_learning_rate=1e-30", "--active_steps=6")
    return workdir


def test_the_baseline_knows_nothing_of_the_curated_part(finished, curated):
    baseline = [[r for r in rows(workdir) if (r["arm"], r["seed"]) == ("uniform", 0)]
                for workdir in (finished[0], curated)]
    assert without_clocks(baseline[0]) == without_clocks(baseline[1])


def test_the_active_arms_have_their_own_length_and_rate(curated):
    assert [r["step"] for r in rows(curated) if (r["arm"], r["seed"]) == ("jest", 0)] == [3, 6]
    model = jest.Model("sigmoid", jest.vit.ViT("16/1/32/1", 32, 8, 8, pool="map"),
                       jest.vit.Text("16/1/32/1", jest.data.VOCAB, 24, 8, pool="map"))
    first = jest.init(jax.random.split(jax.random.key(0), 3)[0], model)
    # with a rate of 1e-30 only the decay is left, which follows the schedule and not the rate
    decayed = np.prod([1 - 1e-4 * (1 + np.cos(np.pi * step / 6)) / 2 for step in range(6)])
    for name, same in (("jest-0", True), ("uniform-0", False), ("jest-1", False)):
        _, after = trained(curated, name)
        got = [np.allclose(after[jax.tree_util.keystr(path)], decayed * x, atol=1e-6, rtol=0)
               for path, x in
               jax.tree_util.tree_leaves_with_path({"learner": {"params": first}})
               if path[-1].key == "w"]
        assert len(got) > 8 and all(got) == same, name


def test_a_reference_has_right_captions_and_first_weights_of_its_seed(curated):
    for row in rows(curated):
        assert (row["pool_noisy"] == 0) == (row["arm"] == "reference")
    (_, one), (_, two) = (trained(curated, f"reference-{seed}") for seed in (0, 1))
    _, learner = trained(curated, "jest-0")
    weights = [k for k in one if "params" in k and k.endswith("['w']")]
    for k in weights:
        assert abs(one[k] - two[k]).max() > 1e-3, k
        assert abs(one[k] - learner[k]).max() > 1e-3, k
    assert len(weights) > 8


def test_the_same_command_again_only_reports(command, finished):
    workdir, done = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = command.good(*TINY, f"--workdir={workdir}")
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert again.stdout == done.stdout


def test_kills_change_nothing(command, finished, tmp_path):
    workdir = tmp_path / "run"
    for moment in (has_row(workdir, "independent", 3), has_row(workdir, "flexi_jest", 6)):
        running = command.start(*TINY, f"--workdir={workdir}")
        running.wait_for(moment)
        running.process.kill()
        running.finish()
        assert running.code == -signal.SIGKILL
    command.good(*TINY, f"--workdir={workdir}")
    assert without_clocks(rows(workdir)) == without_clocks(rows(finished[0]))
    for name in ("reference-0", *(f"{arm}-0" for arm in ARMS)):
        (step, mine), (other_step, theirs) = trained(workdir, name), trained(finished[0], name)
        assert step == other_step and mine.keys() == theirs.keys()
        for k in mine:
            np.testing.assert_array_equal(mine[k], theirs[k], err_msg=f"{name} {k}")


def test_four_devices_are_one(command, finished, tmp_path):
    workdir = tmp_path / "run"
    command.good(*TINY, f"--workdir={workdir}", "--arms=jest,flexi_jest", devices=4)
    mine = {(r["arm"], r["step"]): r for r in rows(workdir)}
    theirs = {(r["arm"], r["step"]): r for r in rows(finished[0])}
    for k in mine:
        np.testing.assert_allclose(mine[k]["loss"], theirs[k]["loss"], rtol=1e-3)
        for name in ("picked_noisy", "pool_noisy"):
            if name in mine[k]:
                np.testing.assert_allclose(mine[k][name], theirs[k][name], atol=1e-6)


def test_given_reference_and_computed_scores(command, finished, tmp_path):
    """The checkpoint of a reference, its forward in every step: the picks of the cached one."""
    workdir = tmp_path / "run"
    command.good(*TINY, f"--workdir={workdir}", "--arms=jest", "--reference_scores=computed",
                 f"--reference={finished[0]}/checkpoints/reference-{{seed}}")
    mine = [r for r in rows(workdir) if r["arm"] == "jest"]
    theirs = [r for r in rows(finished[0]) if r["arm"] == "jest"]
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
    assert mine[-1]["flops"]["reference_training"] == theirs[-1]["flops"]["reference_training"]
    assert mine[-1]["flops"]["reference_scoring"] == 9 * 16 / 480 * theirs[-1]["flops"][
        "reference_scoring"]


def test_other_scores_softmax_and_another_reference_set(command, prepared, tmp_path):
    workdir = tmp_path / "run"
    arms = ("uniform", "jest_easy_reference", "independent_hard_learner")
    flags = [f for f in TINY if "toy" not in f and "patch" not in f]
    command.good(*flags, "--patch=8", f"--dataset={prepared['captioned']}", "--loss=softmax",
                 f"--reference_dataset={prepared['captioned']}", "--caption_noise=0.5",
                 "--score_gain=10",
                 f"--arms={','.join(arms)}", f"--workdir={workdir}")
    last = {r["arm"]: r for r in rows(workdir)}
    assert set(last) == {"reference", *arms}
    assert all(np.isfinite(r["loss"]) for r in last.values())
    assert "reference_training" not in last["independent_hard_learner"]["flops"]
    assert "zero_shot" not in last["uniform"]  # this set has no labels


REFUSED = {
    "unknown arm": (["--arms=uniform,magic"], "--arms", "'magic'", "flexi_jest"),
    "an arm twice": (["--arms=jest,jest"], "--arms", "once"),
    "f of 1": (["--filter_ratio=1"], "--filter_ratio=1", r"\[0, 1\)"),
    "f below 0": (["--filter_ratio=-0.1"], "--filter_ratio", r"\[0, 1\)"),
    "part of an example": (["--filter_ratio=0.7"], "--filter_ratio=0.7", "whole"),
    "pool smaller than a super-batch": (["--toy_examples=12"], "--filter_ratio", "smaller"),
    "gain of 0": (["--score_gain=0"], "--score_gain=0", "more than 0"),
    "chunks above the quota": (["--n_chunks=9"], "--n_chunks=9", "8"),
    "patch": (["--patch=12"], "--patch=12", "32"),
    "low patch": (["--low_patch=12"], "--low_patch=12", "32"),
    "odd halves": (["--batch_size=7", "--n_chunks=2"], "--batch_size=7", "multiple of 2"),
    "model size": (["--model=huge"], "--model", "'huge'", "toy"),
    "label noise": (["--label_noise=0.5"], "--label_noise", "--caption_noise"),
    "no captions": (["--dataset={labelled}", "--image_size=16"], "--dataset",
                    "no feature 'caption'"),
    "tokenizer": (["--tokenizer={empty}/none.model"], "--tokenizer"),
    "no reference": (["--reference={empty}/nowhere"], "--reference=.*nowhere", "no such"),
    "reference of another size": (["--reference={reference}", "--reference_model=8/1/16/1"],
                                  "--reference=", "another size"),
    "damaged reference": (["--reference={gutted}"], "--reference=.*gutted", "damaged"),
    "damaged cache": (["--score_cache={cache}"], "--score_cache=|--score_cache:", "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(command, finished, prepared, tmp_path, name):
    flags, *words = REFUSED[name]
    reference = finished[0] / "checkpoints" / "reference-0"
    shutil.copytree(reference, tmp_path / "gutted")
    gut(tmp_path / "gutted", "cut")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cache.npz").write_bytes(b"no zip file")
    paths = {**prepared, "reference": reference, "gutted": tmp_path / "gutted",
             "cache": tmp_path / "cache.npz", "empty": tmp_path / "empty"}
    workdir = tmp_path / "workdir"
    given = [re.sub(r"\{(\w+)\}", lambda m: str(paths[m[1]]), f) for f in flags]
    assert_refused(command.run(*TINY, f"--workdir={workdir}", *given), *words)
    assert not workdir.exists()


def test_a_cache_of_other_weights(command, finished, tmp_path):
    """Embeddings of one reference under the flag of another."""
    other = tmp_path / "other"
    command.good(*TINY, f"--workdir={other}", "--arms=jest", "--seeds=1")
    done = command.run(*TINY, f"--workdir={tmp_path / 'run'}", "--arms=jest",
                       f"--score_cache={other}/embeddings-1.npz",
                       f"--reference={finished[0]}/checkpoints/reference-{{seed}}")
    assert_refused(done, "--score_cache", "other weights", "delete")


def test_two_hosts_are_one(command, tmp_path):
    """Two processes of two devices give what one of four gives."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = (*TINY, "--steps=3", "--reference_steps=3", "--arms=uniform,flexi_jest")
    command.good(*flags, f"--workdir={one}", devices=4)
    hosts = [p.finish() for p in start_two(command, (*flags, f"--workdir={two}"))]
    assert [p.code for p in hosts] == [0, 0], hosts[0].stderr + hosts[1].stderr
    assert_close(rows(two), rows(one), 1e-3)


def test_every_flag_is_read():
    source = "".join((ROOT / p).read_text() for p in (
        "jest.py", "common/run.py", "common/stage.py"))
    names = re.findall(r'\bDEFINE_\w+\(\s*"(\w+)"', source)
    assert len(names) > 40
    unread = [n for n in names if not re.search(rf"\b(config|values)\.{n}\b", source)]
    assert unread == ["label_noise"]  # which is refused: captions are what is noisy here


def test_presets_are_printed(command):
    done = command.good("--preset=list")
    for name in jest.PRESETS:
        assert re.search(rf"^{name}$", done.stdout, re.M)
