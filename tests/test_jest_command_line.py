"""jest.py as its user meets it: what it writes, what it refuses, what a kill leaves behind."""

import dataclasses
import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from common import data, flags, vit
import jest
from processes import (ROOT, Command, assert_refused, gut, has_row, refusals, rows, trained,
                       without_clocks)

TINY = ("--image_size=32", "--toy_radius=0.25", "--toy_tail=1", "--tokenizer=bytes", "--pool=map",
        "--toy_examples=160", "--eval_split=train", "--steps=9", "--active_steps=0",
        "--reference_steps=6", "--batch_size=8", "--eval_every=3", "--model=16/1/32/1", "--patch=8",
        "--low_patch=16", "--context=24", "--embed=8", "--n_chunks=3", "--filter_ratio=0.5",
        "--curated_fraction=0.2", "--learning_rate=1e-3",
        "--arms=uniform,independent,jest,flexi_jest")
ARMS = ("uniform", "independent", "jest", "flexi_jest")
MODEL = jest.Model("sigmoid", vit.ViT("16/1/32/1", 32, 8, 8, pool="map"),
                   vit.Text("16/1/32/1", data.VOCAB, 24, 8, pool="map"))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("command"), "jest.py")


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(work directory, Process) of all methods, trained."""
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
    for arm in ARMS:
        assert re.search(rf"^{arm} ", done.stdout, re.M)
    assert "an iteration of jest costs 167 % of uniform's (133 %" in done.stdout
    assert "are longer than 23 tokens and are cut" in done.stderr


def test_the_bill_of_a_run_is_the_sum_of_its_steps(finished):
    last = {r["arm"]: r["flops"] for r in rows(finished[0])}
    F, F_low = (jest.forward_flops(m) for m in (MODEL, jest.cut_at(MODEL, 16)))
    assert last["reference"]["reference_training"] == 6 * 3 * 8 * F
    assert last["uniform"] == {"learner": 9 * 3 * 8 * F, "actor_scoring": 0, "selection": 0,
                               "reference_scoring": 0}
    assert last["jest"]["actor_scoring"] == 9 * 16 * F
    assert last["jest"]["reference_scoring"] == 128 * F  # the pool without the curated fifth
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
    first = jest.init(jax.random.split(jax.random.key(0), 3)[0], MODEL)
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


def test_a_kill_changes_nothing(command, finished, tmp_path):
    """In flexi_jest, when the reference and the arms before it are complete."""
    workdir = tmp_path / "run"
    running = command.start(*TINY, f"--workdir={workdir}")
    running.wait_for(has_row(workdir, "flexi_jest", 6))
    running.process.kill()
    assert running.finish().code == -signal.SIGKILL
    command.good(*TINY, f"--workdir={workdir}")
    assert without_clocks(rows(workdir)) == without_clocks(rows(finished[0]))
    for name in ("reference-0", *(f"{arm}-0" for arm in ARMS)):
        (step, mine), (other_step, theirs) = trained(workdir, name), trained(finished[0], name)
        assert step == other_step and mine.keys() == theirs.keys()
        for k in mine:
            np.testing.assert_array_equal(mine[k], theirs[k], err_msg=f"{name} {k}")


def test_four_devices_are_one(command, finished, tmp_path):
    workdir = tmp_path / "run"
    command.good(*TINY, "--arms=jest,flexi_jest", f"--workdir={workdir}", devices=4)
    mine = {(r["arm"], r["step"]): r for r in rows(workdir)}
    theirs = {(r["arm"], r["step"]): r for r in rows(finished[0])}
    assert {arm for arm, _ in mine} == {"reference", "jest", "flexi_jest"}
    for k, row in mine.items():
        assert row.keys() == theirs[k].keys() and row["flops"] == theirs[k]["flops"]
        np.testing.assert_allclose(row["loss"], theirs[k]["loss"], rtol=1e-3)
        for name in row:
            if name.startswith(("picked_", "pool_", "recall", "zero_shot")):
                np.testing.assert_allclose(row[name], theirs[k][name], atol=1e-6, err_msg=name)


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
    assert mine[-1]["flops"]["reference_scoring"] == 9 * 16 / 128 * theirs[-1]["flops"][
        "reference_scoring"]


def test_other_scores_softmax_and_another_reference_set(command, prepared, tmp_path):
    workdir = tmp_path / "run"
    arms = ("uniform", "jest_easy_reference", "independent_hard_learner")
    sizes = [f for f in TINY if not re.search("toy|eval_split|patch", f)]
    command.good(*sizes, "--patch=8", f"--dataset={prepared['captioned']}", "--loss=softmax",
                 f"--reference_dataset={prepared['captioned']}", "--caption_noise=0.5",
                 "--score_gain=10",
                 f"--arms={','.join(arms)}", f"--workdir={workdir}")
    last = {r["arm"]: r for r in rows(workdir)}
    assert set(last) == {"reference", *arms}
    assert all(np.isfinite(r["loss"]) for r in last.values())
    assert "reference_training" not in last["independent_hard_learner"]["flops"]
    assert "zero_shot" not in last["uniform"]  # this set has no labels


def test_a_batch_that_is_larger_than_those_by_which_a_pool_is_embedded(command, tmp_path):
    command.good(*TINY, "--batch_size=512", "--filter_ratio=0", "--toy_examples=700", "--steps=1",
                 "--reference_steps=1", "--eval_every=1", "--arms=jest", f"--workdir={tmp_path}/run")
    last = rows(tmp_path / "run")[-1]
    assert (last["arm"], last["examples_trained"]) == ("jest", 512) and np.isfinite(last["loss"])


REFUSED = {
    "unknown arm": (["--arms=uniform,magic"], "--arms", "'magic'", "flexi_jest"),
    "an arm twice": (["--arms=jest,jest"], "--arms", "once"),
    "f of 1": (["--filter_ratio=1"], "--filter_ratio=1", r"\[0, 1\)"),
    "part of an example": (["--filter_ratio=0.7"], "--filter_ratio=0.7", "whole"),
    "a super-batch of 10": (["--filter_ratio=0.2"], "--filter_ratio=0.2", "over 4 devices"),
    "pool smaller than a super-batch": (["--toy_examples=12"], "--filter_ratio", "smaller"),
    "curated part of no pair": (["--curated_fraction=0.002"], "--curated_fraction=0.002", "0 of the "
                                "160 examples", "holds some"),
    "reference set in grey": (["--reference_dataset={grey}"], "--reference_dataset=.*grey",
                              "as many channels .* 3, not 1"),
    "split of the reference set": (["--reference_dataset={captioned}", "--reference_split=trian"],
                                   "--reference_split=trian", "train"),
    "gain of 0": (["--score_gain=0"], "--score_gain=0", r"\(0, inf\)"),
    "more chunks than picks": (["--n_chunks=9"], "--n_chunks=9", "8"),
    "only warm-up": (["--warmup=0.95"], "--warmup=0.95", "less than all"),
    "patch": (["--patch=12"], "--patch=12", "32"),
    "low patch": (["--low_patch=12"], "--low_patch=12", "32"),
    "odd halves": (["--batch_size=12"], "--batch_size=12", "multiple of 8"),
    "model size": (["--model=huge"], "--model", "'huge'", "toy"),
    "no captions": (["--dataset={labelled}", "--image_size=16"], "--dataset",
                    "no feature 'caption'"),
    "tokenizer": (["--tokenizer={empty}/none.model"], "--tokenizer"),
    "no reference": (["--reference={empty}/nowhere"], "--reference=.*nowhere", "no such"),
    "reference of another size": (["--reference={reference}", "--reference_model=8/1/16/1"],
                                  "--reference=", "another size"),
    "reference noise": (["--reference_noise=-0.5"], "--reference_noise=-0.5",
                        r"\[0, 1\] or -1"),
    "an arm as the reference": (["--reference={arm}"], "--reference=.*uniform-0", "no reference"),
    "reference of another loss": (["--reference={reference}", "--loss=softmax"], "--reference=",
                                  "another size"),
    "reference of other heads": (["--reference={reference}", "--model=16/1/32/2"],
                                 "--reference=", "another model", r"32, 2\]"),
    "reference of other words": (["--reference={reference}", "--tokenizer=words"],
                                 "--reference=", "another (size|tokenizer)"),
    "damaged reference": (["--reference={gutted}"], "--reference=.*gutted", "damaged"),
    "damaged cache": (["--workdir={damaged}"], "embeddings-0.npy is damaged", "delete"),
    "cache of other weights": (["--workdir={foreign}"], "embeddings-0.npy", "other weights",
                               "delete"),
    **{name: ([*flags.as_typed(preset), "--batch_size=129"], "--batch_size=129 does not divide")
       for name, preset in jest.PRESETS.items()},  # all else that they set is accepted
}


@pytest.fixture(scope="module")
def refused(finished, prepared, tmp_path_factory):
    """name -> how a run with those flags ended. None made its work directory."""
    folder = tmp_path_factory.mktemp("refused")
    paths = {name: folder / name for name in ("gutted", "damaged", "foreign", "empty")}
    paths["empty"].mkdir()
    paths |= {**prepared, "reference": finished[0] / "checkpoints" / "reference-0",
              "arm": finished[0] / "checkpoints" / "uniform-0"}
    shutil.copytree(paths["reference"], paths["gutted"])
    gut(paths["gutted"], "cut")
    for name in ("damaged", "foreign"):
        shutil.copytree(finished[0], paths[name])
    (paths["damaged"] / "embeddings-0.npy").write_bytes(b"no array")
    record = json.loads((finished[0] / "embeddings-0.npy.json").read_text())
    record["made_by"]["weights"] = "others"
    (paths["foreign"] / "embeddings-0.npy.json").write_text(json.dumps(record))
    fill_in = lambda flag: re.sub(r"\{(\w+)\}", lambda m: str(paths[m[1]]), flag)
    done = refusals("jest", [[*TINY, f"--workdir={folder}/workdir", *map(fill_in, given)]
                             for given, *_ in REFUSED.values()])
    assert not (folder / "workdir").exists()
    return dict(zip(REFUSED, done, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(refused, name):
    assert_refused(refused[name], *REFUSED[name][1:])


@pytest.mark.parametrize("name", jest.PRESETS)
def test_presets_name_models_that_exist(name):
    assert vit.size(jest.PRESETS[name]["model"])


def unread_flags(script, names_of_methods=()):
    """Flags whose name nothing reads: as config.name, in quotes, or as a field of a `Method`."""
    text = "".join((ROOT / path).read_text() for path in (
        f"{script}.py", *(f"common/{name}.py" for name in ("flags", "train", "data", "devices"))))
    definition = re.compile(r'\bf\.(?:number|integer|text|names|choice|switch)\(\s*"(\w+)"')
    names, rest = definition.findall(text), definition.sub("", text)
    assert len(names) > 40
    return [n for n in names if n not in names_of_methods
            and not re.search(rf'\b(config|values)\.{n}\b|"{n}"', rest)]


def test_every_flag_is_read():
    assert unread_flags("jest", [f.name for f in dataclasses.fields(jest.Method)]) == []
