"""dnc.py as its user meets it: what it writes, what it refuses, what a kill leaves behind."""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from common import flags, resnet
import dnc
from processes import (Command, assert_refused, refusals, rows, trained,
                       without_clocks)
from test_jest_command_line import unread_flags

TINY = ("--toy_examples=200", "--eval_split=train", "--image_size=8", "--model=8/4", "--hidden=8",
        "--embed=6", "--head_hidden=8", "--steps=12", "--batch_size=8", "--eval_every=2",
        "--clusters=3", "--restarts=2", "--kmeans_iterations=5", "--kmeans_examples=150",
        "--learning_rate=2")
ARMS = ("moclr", "moclr_flops", "dnc", "dnc_random", "self_distil", "dnc_oracle")
ALL = f"--arms={','.join(ARMS)}"
MODEL = dnc.Model(resnet.ResNet("8/4", 8), 8, 6, 8)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("command"), "dnc.py")


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(work directory, Process) of all arms, trained."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, command.good(*TINY, ALL, f"--workdir={workdir}")


def last_rows(workdir):
    return {r["arm"]: r for r in rows(workdir)}


def test_a_run_leaves_what_the_interface_says(finished):
    workdir, done = finished
    names = {p.name for p in workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "curves.png", "clusters.png",
            "assignment-0.npz", "checkpoints"} <= names
    summary = json.loads((workdir / "summary.json").read_text())
    assert list(summary["arms"]) == list(ARMS) and summary["metric"] == "linear_probe"
    for arm, a in summary["arms"].items():
        assert {"linear_probe", "balanced_accuracy", "head", "middle", "tail", "knn",
                "probe_decay"} <= set(a["final"]), arm
        assert ("nmi" in a["final"]) == (arm in dnc.DIVIDES)
    for row in rows(workdir):
        assert {"arm", "seed", "step", "examples_trained", "examples_scored", "seconds",
                "flops", "loss"} <= set(row)
        assert ("knn" in row) == ("_expert" not in row["arm"])
        assert row["examples_trained"] == 8 * row["step"]
        at_end = row == last_rows(workdir)[row["arm"]] and "_expert" not in row["arm"]
        assert ("linear_probe" in row) == at_end
    for arm in ARMS:
        assert re.search(rf"^{arm} ", done.stdout, re.M)
    assert re.search(r"^dnc_expert: [\d.]+ effective classes in a batch", done.stdout, re.M)
    assert "toy is too small" in done.stdout and "linear probe on pixels: " in done.stdout


def test_stages_add_up_to_the_declared_total(finished):
    """Visits are the baseline's, steps go on where the stage before ended, FLOPs are the bill's."""
    last = last_rows(finished[0])
    config = flags.Namespace(json.loads((finished[0] / "config.json").read_text())["flags"])
    steps, contrast = dnc.budget(config, MODEL, 200), dnc.contrast_flops(8, MODEL)
    for arm in ARMS:
        parts, K = steps[arm], 3 if arm.startswith("dnc") else 0
        declared = {"base": parts["base"] * contrast, "experts": parts["experts"] * contrast,
                    "clustering": dnc.clustering_flops(MODEL, config, 200)
                    * (arm in ("dnc", "dnc_random")),
                    "distillation": parts["distil"] * dnc.distil_flops(8, MODEL, K)}
        assert last[arm]["flops"] == {role: n for role, n in declared.items() if n}, arm
        assert last[arm]["step"] == 12 or arm == "moclr_flops"
    total = sum(last["dnc"]["flops"].values())
    assert abs(last["moclr_flops"]["flops"]["base"] - total) <= contrast / 2
    assert last["dnc"]["examples_scored"] == 8 * 12 + 200
    assert last["dnc_oracle"]["examples_scored"] == last["self_distil"]["examples_scored"] == 96
    ends = [last["base"]["step"], *(r["step"] for name, r in last.items()
                                    if name.startswith("dnc_expert"))]
    assert ends == sorted(set(ends)) and ends[0] == 4 and ends[-1] == 10
    assert rows(finished[0])[-1]["arm"] == "dnc_oracle"
    seconds = [last[name]["seconds"] for name in last if re.fullmatch("base|dnc_expert.|dnc", name)]
    assert seconds == sorted(seconds)


def test_the_clusters_are_a_partition(finished):
    with np.load(finished[0] / "assignment-0.npz") as f:
        cluster, made_by = f["cluster"], json.loads(str(f["made_by"]))
    assert cluster.shape == (200,) and set(cluster) <= {0, 1, 2}
    assert made_by["clusters"] == 3 and {"weights", "data", "ids"} <= set(made_by)


def test_the_same_command_again_only_reports(command, finished):
    workdir, done = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = command.good(*TINY, ALL, f"--workdir={workdir}")
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert again.stdout == done.stdout


def test_a_kill_changes_nothing(command, finished, tmp_path):
    """In the second expert."""
    workdir = tmp_path / "run"
    metrics = workdir / "metrics.jsonl"
    running = command.start(*TINY, "--arms=dnc", f"--workdir={workdir}")
    running.wait_for(lambda: metrics.exists() and "dnc_expert1" in metrics.read_text())
    running.process.kill()
    assert running.finish().code == -signal.SIGKILL
    command.good(*TINY, "--arms=dnc", f"--workdir={workdir}")
    mine = without_clocks(rows(workdir))
    names = {r["arm"] for r in mine}
    assert {"base", "dnc_expert0", "dnc_expert1", "dnc_expert2", "dnc"} == names
    assert mine == [r for r in without_clocks(rows(finished[0])) if r["arm"] in names]
    for name in names:
        (step, here), (other_step, there) = (trained(w, f"{name}-0") for w in (workdir,
                                                                               finished[0]))
        assert step == other_step and here.keys() == there.keys()
        for k in here:
            np.testing.assert_array_equal(here[k], there[k], err_msg=f"{name} {k}")


def test_four_devices_are_one(command, finished, tmp_path):
    workdir = tmp_path / "run"
    command.good(*TINY, "--arms=dnc", f"--workdir={workdir}", devices=4)
    mine = {(r["arm"], r["step"]): r for r in rows(workdir)}
    theirs = {(r["arm"], r["step"]): r for r in rows(finished[0])}
    assert {a for a, _ in mine} == {"base", "dnc_expert0", "dnc_expert1", "dnc_expert2", "dnc"}
    for k, row in mine.items():
        assert row["flops"] == theirs[k]["flops"]
        np.testing.assert_allclose(row["loss"], theirs[k]["loss"], rtol=2e-2, err_msg=str(k))
        if "effective_classes" in row:
            np.testing.assert_allclose(row["effective_classes"], theirs[k]["effective_classes"],
                                       rtol=1e-5)
    (a, b) = (np.load(w / "assignment-0.npz")["cluster"] for w in (workdir, finished[0]))
    assert (a == b).mean() > 0.98


def test_a_prepared_set_with_small_clusters_and_other_settings(command, prepared, tmp_path):
    """48 images in 8 clusters: less than a batch in each, and no step for some. The other value of
    each switch."""
    workdir = tmp_path / "run"
    given = [f for f in TINY if not re.search("toy|eval_split|image|clusters", f)]
    done = command.good(*given, f"--dataset={prepared['labelled']}", "--image_size=8",
                        "--clusters=8", "--kmeans_examples=20", "--arms=dnc", "--head_hidden=12",
                        "--expert_init=base", "--student_init=base", "--nosame_view_negatives",
                        f"--workdir={workdir}")
    assert "a batch of 8 repeats examples" in done.stderr and "get no step" in done.stderr
    last = last_rows(workdir)["dnc"]
    assert last["step"] == 12 and last["flops"]["distillation"] == 2 * dnc.distil_flops(
        8, dnc.Model(MODEL.encoder, 8, 6, 12), 8)
    assert "toy is too small" not in done.stdout


REFUSED = {
    "unknown arm": (["--arms=moclr,magic"], "--arms", "'magic'", "dnc_oracle"),
    "an arm twice": (["--arms=dnc,dnc"], "--arms", "once"),
    "no cluster": (["--clusters=0"], "--clusters=0", r"\[1, inf\)"),
    "more clusters than examples": (["--clusters=201", "--kmeans_examples=300"], "--clusters=201",
                                    "200"),
    "fit on less than a point each": (["--kmeans_examples=2"], "--kmeans_examples=2", "3"),
    "more clusters than a capped pool has": (["--clusters=40", "--class_cap=1"], "--clusters=40",
                                             "at most one per example"),
    "more groups than classes": (["--clusters=31", "--arms=dnc_oracle"], "--clusters=31", "30"),
    "nothing left for the student": (["--base_fraction=0.7"], "--experts_fraction=", "the student gets"),
    "all warm-up": (["--warmup=0.999"], "--warmup=0.999", "less than all of the steps"),
    "a stage without a step": (["--steps=2"], "--steps=2", "each stage"),
    "no negatives": (["--batch_size=1"], "--batch_size=1", r"\[2, inf\)"),
    "a batch in parts": (["--batch_size=9"], "--batch_size=9", "multiple of 4"),
    "temperature": (["--temperature=0"], "--temperature=0", r"\(0, inf\)"),
    "blur": (["--blur1=1.1"], "--blur1=1.1", r"\[0, 1\]"),
    "model size": (["--model=34"], "--model", "'34'", "6n"),
    "tiny images": (["--image_size=4"], "--image_size=4", "from 8"),
    "no labels": (["--dataset={captioned}", "--image_size=16"], "--dataset",
                  "no feature 'label'"),
    "damaged clusters": (["--workdir={damaged}", ALL], "assignment-0.npz is damaged", "delete"),
    "clusters with another hash": (["--workdir={changed}", ALL], "assignment-0.npz", "hash"),
    "clusters of another number": (["--workdir={foreign}", ALL], "assignment-0.npz",
                                   "other clusters"),
    **{name: ([*flags.as_typed(preset), "--batch_size=129"], "--batch_size=129 does not divide")
       for name, preset in dnc.PRESETS.items()},  # all else that they set is accepted
}


@pytest.fixture(scope="module")
def refused(finished, prepared, tmp_path_factory):
    """name -> how a run with those flags ended. None made its work directory."""
    folder = tmp_path_factory.mktemp("refused")
    paths = {**prepared, **{name: folder / name for name in ("damaged", "changed", "foreign")}}
    for name in ("damaged", "changed", "foreign"):
        shutil.copytree(finished[0], paths[name])
    (paths["damaged"] / "assignment-0.npz").write_bytes(b"no zip file")
    with np.load(finished[0] / "assignment-0.npz") as f:
        np.savez(paths["changed"] / "assignment-0.npz", **{**f, "cluster": f["cluster"][::-1]})
        other = {**json.loads(str(f["made_by"])), "clusters": 2}
        np.savez(paths["foreign"] / "assignment-0.npz", **{**f, "made_by": json.dumps(other)})
    fill_in = lambda flag: re.sub(r"\{(\w+)\}", lambda m: str(paths[m[1]]), flag)
    done = refusals("dnc", [[*TINY, f"--workdir={folder}/workdir", *map(fill_in, given)]
                            for given, *_ in REFUSED.values()])
    assert not (folder / "workdir").exists()
    return dict(zip(REFUSED, done, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(refused, name):
    assert_refused(refused[name], *REFUSED[name][1:])


@pytest.mark.parametrize("name", dnc.PRESETS)
def test_presets_name_models_that_exist(name):
    assert resnet.size(dnc.PRESETS[name].get("model", "18"))


def test_every_flag_is_read():
    assert unread_flags("dnc") == []
