"""dnc.py as its user meets it: what it writes, what it refuses, what a kill leaves behind."""

import json
import re
import shutil
import signal

import numpy as np
import pytest

import dnc
from common import resnet
from processes import (ROOT, Command, assert_close, assert_refused, gut, has_row, rows, start_two,
                       trained, without_clocks)

TINY = ("--toy_examples=200", "--image_size=8", "--model=8/4", "--hidden=8", "--embed=6",
        "--head_hidden=8", "--steps=12", "--batch_size=8", "--eval_every=2", "--clusters=3",
        "--restarts=2", "--kmeans_iterations=5", "--kmeans_examples=150", "--learning_rate=2")
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
    assert "toy is too small" in done.stdout


def test_stages_add_up_to_the_declared_total(finished):
    """Visits are the baseline's, steps go on where the stage before ended, FLOPs are the bill's."""
    last, fractions = last_rows(finished[0]), (1 / 3, 1 / 2, 1 / 6)
    shared = dict(K=3, n_all=200, n_fit=150, restarts=2, iterations=5)
    declared = {arm: dnc.declared_flops(arm, dnc.plan(arm, 12, fractions), 8, MODEL, **shared)
                for arm in ARMS}
    for arm in ARMS:
        if arm != "moclr_flops":
            assert last[arm]["step"] == 12
            assert sum(last[arm]["flops"].values()) == sum(declared[arm].values()), arm
            for role, flops in last[arm]["flops"].items():
                assert flops == declared[arm][role]
    total = sum(declared["dnc"].values())
    per_step = dnc.step_flops("base", 8, MODEL)
    assert abs(last["moclr_flops"]["flops"]["base"] - total) <= per_step / 2
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
        np.testing.assert_array_equal(f["id"], np.arange(200))
    assert cluster.shape == (200,) and set(cluster) <= {0, 1, 2}
    assert made_by["clusters"] == 3 and {"weights", "data", "ids"} <= set(made_by)


def test_the_same_command_again_only_reports(command, finished):
    workdir, done = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = command.good(*TINY, ALL, f"--workdir={workdir}")
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert again.stdout == done.stdout


def test_kills_change_nothing(command, finished, tmp_path):
    """In the base, in an expert, in the student's last step."""
    workdir = tmp_path / "run"
    arms = "--arms=moclr,dnc"
    metrics = workdir / "metrics.jsonl"
    in_second_expert = lambda: metrics.exists() and "dnc_expert1" in metrics.read_text()
    for moment in (has_row(workdir, "base", 2), in_second_expert, has_row(workdir, "dnc", 12)):
        running = command.start(*TINY, arms, f"--workdir={workdir}")
        running.wait_for(moment)
        running.process.kill()
        running.finish()
        assert running.code == -signal.SIGKILL
    command.good(*TINY, arms, f"--workdir={workdir}")
    mine = without_clocks(rows(workdir))
    names = {r["arm"] for r in mine}
    assert {"moclr", "base", "dnc_expert0", "dnc_expert1", "dnc_expert2", "dnc"} == names
    assert mine == [r for r in without_clocks(rows(finished[0])) if r["arm"] in names]
    for name in names:
        (step, here), (other_step, there) = (trained(w, f"{name}-0") for w in (workdir,
                                                                               finished[0]))
        assert step == other_step and here.keys() == there.keys()
        for k in here:
            np.testing.assert_array_equal(here[k], there[k], err_msg=f"{name} {k}")


def test_sigterm_saves_and_says_how_to_go_on(command, finished, tmp_path):
    workdir = tmp_path / "run"
    running = command.start(*TINY, "--arms=dnc", f"--workdir={workdir}")
    running.wait_for(has_row(workdir, "base", 2))
    running.process.terminate()
    running.finish()
    assert running.code == 130 and "the same command goes on" in running.stderr
    command.good(*TINY, "--arms=dnc", f"--workdir={workdir}")
    theirs = {r["arm"]: r for r in without_clocks(rows(finished[0]))}
    for row in without_clocks(rows(workdir))[-1:]:
        assert row == theirs["dnc"]


def test_four_devices_are_one(command, finished, tmp_path):
    workdir = tmp_path / "run"
    command.good(*TINY, "--arms=moclr,dnc", f"--workdir={workdir}", devices=4)
    mine = {(r["arm"], r["step"]): r for r in rows(workdir)}
    theirs = {(r["arm"], r["step"]): r for r in rows(finished[0])}
    assert {a for a, _ in mine} == {"moclr", "base", "dnc_expert0", "dnc_expert1", "dnc_expert2",
                                    "dnc"}
    for k, row in mine.items():
        assert row["flops"] == theirs[k]["flops"]
        np.testing.assert_allclose(row["loss"], theirs[k]["loss"], rtol=2e-2, err_msg=str(k))
        if "effective_classes" in row:
            np.testing.assert_allclose(row["effective_classes"], theirs[k]["effective_classes"],
                                       rtol=1e-5)
    (a, b) = (np.load(w / "assignment-0.npz")["cluster"] for w in (workdir, finished[0]))
    assert (a == b).mean() > 0.98


def test_given_clusters_and_other_inits(command, finished, tmp_path):
    """A file of clusters that another run of the same base left; the other value of each switch."""
    workdir = tmp_path / "run"
    command.good(*TINY, "--arms=dnc", f"--workdir={workdir}", "--expert_init=base",
                 "--student_init=base", "--head_hidden=12",
                 f"--assignment={finished[0]}/assignment-{{seed}}.npz")
    last, theirs = last_rows(workdir), last_rows(finished[0])
    assert "assignment-0.npz" not in {p.name for p in workdir.iterdir()}
    assert without_clocks([last["base"]]) == without_clocks([theirs["base"]])
    assert last["dnc"]["nmi"] == theirs["dnc"]["nmi"]
    assert last["dnc"]["flops"]["distillation"] == 2 * dnc.step_flops(
        "distillation", 8, dnc.Model(MODEL.encoder, 8, 6, 12), K=3)


def test_a_prepared_set_and_small_clusters(command, prepared, tmp_path):
    """48 images in 8 clusters: less than a batch in each, and no step for some."""
    workdir = tmp_path / "run"
    flags = [f for f in TINY if "toy" not in f and "image" not in f and "clusters" not in f]
    done = command.good(*flags, f"--dataset={prepared['labelled']}", "--image_size=8",
                        "--clusters=8", "--kmeans_examples=20", "--arms=dnc",
                        "--nosame_view_negatives", f"--workdir={workdir}")
    assert "less than a batch of 8" in done.stderr and "get no step" in done.stderr
    assert last_rows(workdir)["dnc"]["step"] == 12
    assert "toy is too small" not in done.stdout


REFUSED = {
    "unknown arm": (["--arms=moclr,magic"], "--arms", "'magic'", "dnc_oracle"),
    "an arm twice": (["--arms=dnc,dnc"], "--arms", "once"),
    "no cluster": (["--clusters=0"], "--clusters=0", "at least 1"),
    "more clusters than examples": (["--clusters=201", "--kmeans_examples=300"], "--clusters=201",
                                    "200"),
    "fit on less than a point each": (["--kmeans_examples=2"], "--kmeans_examples=2", "3"),
    "more clusters than a capped pool has": (["--clusters=40", "--class_cap=1"], "--clusters=40",
                                             "at most one per example"),
    "class cap": (["--class_cap=-1"], "--class_cap=-1", "at least 0"),
    "more groups than classes": (["--clusters=31", "--arms=dnc_oracle"], "--clusters=31", "30"),
    "fractions": (["--base_fraction=0.5"], "--base_fraction", "add up to 1"),
    "a fraction of 0": (["--base_fraction=0.5", "--experts_fraction=0.5", "--distil_fraction=0"],
                        "--base_fraction", "above 0"),
    "a stage without a step": (["--steps=2"], "--steps=2", "each stage"),
    "no negatives": (["--batch_size=1"], "--batch_size=1", "negative"),
    "temperature": (["--temperature=0"], "--temperature=0", "more than 0"),
    "blur": (["--blur=1"], "--blur", "two probabilities"),
    "solarise": (["--solarise=0,x"], "--solarise", "two probabilities"),
    "model size": (["--model=34"], "--model", "'34'", "6n"),
    "tiny images": (["--image_size=4"], "--image_size", "at least 8"),
    "label noise": (["--label_noise=0.5"], "--label_noise", "not read"),
    "caption noise": (["--caption_noise=0"], "--caption_noise", "not read"),
    "no labels": (["--dataset={captioned}", "--image_size=16"], "--dataset",
                  "no feature 'label'"),
    "no such clusters": (["--assignment={empty}/none.npz"], "--assignment=.*none", "no such"),
    "damaged clusters": (["--assignment={damaged}"], "--assignment", "damaged"),
    "clusters with another hash": (["--assignment={changed}"], "--assignment", "hash"),
    "clusters of another number": (["--assignment={good}", "--clusters=2"], "--assignment",
                                   "other clusters"),
    "clusters of other examples": (["--assignment={good}", "--toy_examples=201"], "--assignment",
                                   "other data and ids"),
}


DRIVER = """
import json, sys
import dnc
dnc.define_flags()
class Reached(Exception): pass
def reached(config): raise Reached("nothing was refused")
dnc.run.open_workdir = reached
for argv in json.loads(sys.argv[1]):
    for name in dnc.flags.FLAGS:
        dnc.flags.FLAGS[name].unparse()
    dnc.flags.FLAGS(["dnc.py", *argv])
    try:
        dnc.main()
    except (ValueError, Reached) as e:
        print(json.dumps([type(e).__name__, str(e)]))
"""


@pytest.fixture(scope="module")
def refusals(command, finished, prepared, tmp_path_factory):
    """name -> (kind of error, message), of all of REFUSED in one process; the work directory is
    where the work would begin."""
    tmp_path = tmp_path_factory.mktemp("refused")
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "damaged.npz").write_bytes(b"no zip file")
    good = finished[0] / "assignment-0.npz"
    with np.load(good) as f:
        arrays = dict(f)
    np.savez(tmp_path / "changed.npz", **arrays | {"cluster": arrays["cluster"][::-1]})
    paths = {**prepared, "empty": tmp_path, "good": good,
             "damaged": tmp_path / "damaged.npz", "changed": tmp_path / "changed.npz"}
    given = [[*TINY, f"--workdir={tmp_path / 'workdir'}",
              *(re.sub(r"\{(\w+)\}", lambda m: str(paths[m[1]]), f) for f in flags)]
             for flags, *_ in REFUSED.values()]
    driver = Command(command.directory, str(tmp_path / "driver.py"))
    done = driver.good(json.dumps(given), PYTHONPATH=str(ROOT))
    assert not (tmp_path / "workdir").exists()
    return dict(zip(REFUSED, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(refusals, name):
    (kind, message), (_, *words) = refusals[name], REFUSED[name]
    assert kind == "ValueError", message
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
    assert "\n" not in message and len(message) < 600


def test_a_refusal_is_one_line(command, tmp_path):
    done = command.run(*TINY, "--batch_size=9", f"--workdir={tmp_path / 'run'}", devices=2)
    assert_refused(done, "--batch_size=9", "multiple of 2")
    assert not (tmp_path / "run").exists()


def test_clusters_of_another_base(command, finished, tmp_path):
    done = command.run(*TINY, "--arms=dnc", f"--workdir={tmp_path / 'run'}", "--temperature=0.3",
                       f"--assignment={finished[0]}/assignment-{{seed}}.npz")
    assert_refused(done, "--assignment", "other weights")


@pytest.mark.parametrize("stage", ["base-0", "dnc_expert1-0"])
def test_a_damaged_stage(command, finished, tmp_path, stage):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    gut(workdir / "checkpoints" / stage, "cut")
    done = command.run(*TINY, ALL, f"--workdir={workdir}")
    assert_refused(done, f"checkpoint .*{stage}", "damaged", "delete")


def test_two_hosts_are_one(command, tmp_path):
    """Two processes of two devices give what one of four gives, and the same clusters."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = (*TINY, "--steps=6", "--eval_every=6", "--clusters=2", "--arms=dnc")
    command.good(*flags, f"--workdir={one}", devices=4)
    hosts = [p.finish() for p in start_two(command, (*flags, f"--workdir={two}"))]
    assert [p.code for p in hosts] == [0, 0], hosts[0].stderr + hosts[1].stderr
    a, b = (np.load(w / "assignment-0.npz")["cluster"] for w in (one, two))
    np.testing.assert_array_equal(a, b)
    assert_close(rows(two), rows(one), 1e-2)  # at a rate of 2 rounding grows


def test_every_flag_is_read():
    source = "".join((ROOT / p).read_text() for p in (
        "dnc.py", "common/run.py", "common/stage.py"))
    names = re.findall(r'\bDEFINE_\w+\(\s*"(\w+)"', source)
    assert len(names) > 40
    unread = [n for n in names if not re.search(rf"\b(config|values)\.{n}\b", source)]
    assert unread == ["label_noise", "caption_noise"]  # refused: nothing is trained on either


def test_presets_are_printed(command):
    done = command.good("--preset=list")
    for name in dnc.PRESETS:
        assert re.search(rf"^{name}$", done.stdout, re.M)


# ---------------------------------------------------------------------- what main gives to whom

STAGES = """
import json, sys
import jax, numpy as np
import dnc
dnc.define_flags()
dnc.flags.FLAGS(["dnc.py", *sys.argv[1:]])
digest, moved = dnc.stage.digest, lambda tree, by: jax.tree.map(lambda x: np.array(x) + by, tree)

def fit(name, seed, step, state, key, batches, *, before, metrics_of, at_end, metrics_file, **how):
    seen = list(batches(0))
    told = {"key": jax.random.key_data(key).tolist(), "start": digest(dnc.encoder_of(state)),
            "ids": np.concatenate([index_of(b["image"]) for b in seen]).tolist(),
            "clusters": [int(c) for b in seen for c in b.get("cluster", np.zeros(0)).ravel()],
            "before": before and before["seconds"], "steps": how["steps"]}
    if "base" in state:
        told["base"] = digest(state["base"])
        told["experts"] = [digest(jax.tree.map(lambda x: x[j], state["experts"])) for j in range(
            jax.tree.leaves(state.get("experts", []))[0].shape[0] if "experts" in state else 0)]
    by = 0.01 * (1 + len(told_of))  # what is trained here is known again, and is not the target
    state = {**state, "learner": moved(state["learner"], by), "stats": moved(state["stats"], by)}
    if at_end:
        told["pools"] = metrics_of(state)["knn"]
    told["end"] = digest(dnc.encoder_of(state))
    told_of[f"{name}-{seed}"] = told
    metrics_file.append({"arm": name, "seed": seed, "step": how["steps"], "seconds": 1.0,
                         "examples_scored": 0, "examples_trained": 0, "flops": {}})
    return state

def index_of(image):
    return [index[x.tobytes()] for x in image.reshape(-1, *image.shape[-3:])]

told_of, index = {}, {}
source = dnc.data.open_source("toy", "train", image_size=8, toy_knobs=dnc.run.toy_knobs(
    dnc.run.resolve(dnc.PRESETS)[0]))
for i, x in enumerate(source.read(source.ids)["image"]):
    index[x.tobytes()] = i
assert len(index) == 200
dnc.stage.fit = fit
dnc.probe.knn_metrics = lambda train, test, n: {"knn": [len(train["h"]), len(test["h"])]}
dnc.probe.linear_metrics = lambda train, test, n: {"train": len(train["h"]), "test": len(test["h"])}
dnc.report_all = lambda *args: None
dnc.main()
print(json.dumps(told_of))
"""


def test_every_stage_is_given_what_is_its_own(command, tmp_path):
    """What `stage.fit` is called with; it trains nothing here, but moves all weights."""
    (tmp_path / "driver.py").write_text(STAGES)
    workdir = tmp_path / "run"
    done = Command(command.directory, str(tmp_path / "driver.py")).good(
        *TINY, "--arms=moclr,dnc,dnc_random,self_distil,dnc_oracle", "--seeds=0,1", "--steps=48",
        "--expert_init=base", "--pixel_probe", f"--workdir={workdir}", PYTHONPATH=str(ROOT))
    assert "linear probe on pixels: train 200.000, test 2000.000" in done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    for seed in (0, 1):
        of = lambda name: told[f"{name}-{seed}"]
        with np.load(workdir / f"assignment-{seed}.npz") as f:
            cluster, seconds = f["cluster"], float(f["seconds"])
        size = np.bincount(cluster, minlength=3)
        base, parts = of("base"), {}
        assert base["pools"] == of("dnc")["pools"] == [200, 2000]
        for arm in ("dnc", "dnc_random", "dnc_oracle"):
            experts, student = [of(f"{arm}_expert{j}") for j in range(3)], of(arm)
            parts[arm] = [set(e["ids"]) for e in experts]
            assert sum(map(len, parts[arm])) == len(set.union(*parts[arm]))  # they share none
            assert {e["start"] for e in experts} == {base["end"]} != {student["start"]}
            assert student["base"] == base["end"]
            assert student["experts"] == [e["end"] for e in experts]
            assert len({str(s["key"]) for s in (base, student, *experts)}) == 5
            for i, j in zip(student["ids"], student["clusters"], strict=True):
                assert i in parts[arm][j] or not any(i in part for part in parts[arm])
            assert experts[0]["before"] == 1 + (arm != "dnc_oracle") * seconds
        for j, part in enumerate(parts["dnc"]):
            assert part <= set(np.flatnonzero(cluster == j))
            assert len(parts["dnc_random"][j]) <= size[j]
        assert parts["dnc"] != parts["dnc_random"]
        assert of("self_distil")["experts"] == [] and of("self_distil")["base"] == base["end"]
        assert of("self_distil")["steps"] == of("dnc")["steps"] + 24
    for name in ("moclr", "base", "dnc_expert0", "dnc"):
        for what in ("key", "start", "ids"):
            assert told[f"{name}-0"][what] != told[f"{name}-1"][what], (name, what)

