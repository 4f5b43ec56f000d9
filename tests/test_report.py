"""Speed-ups worked out by hand and by a slow program, and the sentences that people will quote."""

import json
import math
import statistics
import subprocess
import sys
import types
from pathlib import Path

from matplotlib.figure import Figure
import numpy as np
import pytest

from common import flops, pictures, report

ARMS = ["uniform", "clever"]


def row(arm, seed, step, accuracy, *, seconds=None, scored=None, flops=None, **more):
    return {"arm": arm, "seed": seed, "step": step, "examples_trained": 10 * step,
            "examples_scored": 10 * step if scored is None else scored,
            "seconds": float(step) if seconds is None else seconds,
            "flops": flops or {"learner": 100 * step}, "accuracy": accuracy, **more}


def curve(arm, seed, accuracies, **more):
    """Evaluations at steps 10, 20, ..."""
    return [row(arm, seed, 10 * (i + 1), a, **more) for i, a in enumerate(accuracies)]


def summarise(rows, arms=ARMS, metric="accuracy"):
    return report.summarise(rows, metric, arms, script="jest", dataset="toy")


def workdir_of(path, rows, arms=ARMS, seeds=(0,), script="jest.py", dataset="toy"):
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "config.json").write_text(json.dumps({
        "script": script, "flags": {"arms": list(arms), "seeds": list(seeds), "dataset": dataset}}))
    return path


def words(text):
    return " ".join(text.split())


# ---------------------------------------------------------------------------------- speed-ups

def test_levels_are_cumulative_and_a_role_that_none_names_counts_in_each():
    bill = {"learner": 1, "actor_scoring": 10, "actor_training": 100, "selection": 1000,
            "reference_scoring": 10_000, "reference_training": 100_000}
    assert [flops.total_flops(bill, level) for level in (
        "fully_amortised", "foundation_dataset", "pretrained_reference", "no_amortisation")] == [
        1, 1111, 11_111, 111_111]
    assert flops.total_flops(bill) == 111_111
    assert {flops.total_flops({"base": 1, "experts": 4}, level) for level in flops.LEVELS} == {5}


def slow_speedup(rows, arm):
    """(target, each seed's ratio of steps), word for word as the docstring of report.py says it."""
    value = {(r["arm"], r["seed"], r["step"]): r["accuracy"] for r in rows}
    seeds = lambda name: sorted({s for a, s, _ in value if a == name})
    steps = lambda name: [t for t in range(10, 80, 10) if all((name, s, t) in value
                                                              for s in seeds(name))]
    mean_and_sd = {}
    for t in steps("uniform"):
        got = [value["uniform", s, t] for s in seeds("uniform")]
        if None not in got:
            mean_and_sd[t] = statistics.mean(got), np.std(got, ddof=1) if len(got) > 1 else 0
    target, sd = max(mean_and_sd.values(), key=lambda m: m[0])
    spent = min(t for t, (mean, _) in mean_and_sd.items() if mean >= target - sd)
    first = [next((t for t in steps(arm) if value[arm, s, t] is not None
                   and value[arm, s, t] >= target), None) for s in seeds(arm)]
    return target, [spent / t if t else None for t in first]


def test_speedups_equal_those_of_a_slow_program():
    outcomes = set()
    for trial in range(60):
        rng = np.random.default_rng(trial)
        rows = []
        for arm, n_seeds in zip(ARMS, rng.integers(1, 5, 2)):
            for seed in range(n_seeds):
                got = np.linspace(0, rng.uniform(0.5, 1), 7) + rng.normal(0, 0.1, 7)
                got = [round(x, 2) if rng.random() > 0.05 else None for x in got.tolist()]
                rows += [r for r in curve(arm, seed, got)
                         if r["step"] == 70 or rng.random() > 0.1]  # some evaluations are missing
        rng.shuffle(rows)
        up = summarise(rows)["speedup"]["clever"]
        target, ratios = slow_speedup(rows, "clever")
        assert (up["target"], up["iterations_per_seed"]) == (target, ratios)
        n = up["reached"]
        assert n == len(ratios) - ratios.count(None)
        assert up["seconds"] == (pytest.approx(np.mean(ratios)) if n == len(ratios) else None)
        outcomes.add("none" if n == 0 else "some" if n < len(ratios) else "all")
    assert outcomes == {"all", "some", "none"}


@pytest.mark.parametrize("uniform, clever, target, ratios", [
    # Means 0.2, 0.4, 0.6, 0.8; sd 0.14. 40 / 10 and 40 / 20, of which the mean is 3.
    ([[0.1, 0.3, 0.5, 0.7], [0.3, 0.5, 0.7, 0.9]], [[0.8, 0.7], [0.3, 0.85]], 0.8, [4, 2]),
    # Means 0.5, 0.74, 0.7, 0.75; sd 0.014 at the best. Charged to step 20, but 0.745 is too little.
    ([[0.49, 0.73, 0.7, 0.74], [0.51, 0.75, 0.7, 0.76]], [[0.745, 0.75, 0.75]], 0.75, [1]),
    ([[0.5, 0.9, 0.6]], [[0.6, 0.7, 0.9]], 0.9, [2 / 3]),  # overfits: held to its best, a slow-down
    ([[0.5, 0.9, 0.9]], [[0.9]], 0.9, [2]),  # a tie: the baseline's earlier evaluation
    ([[0.1]] * 3, [[0.1]] * 3, 0.1, [1, 1, 1]),  # although np.mean([0.1] * 3) is above 0.1
    ([[0.5, 0.8]], [[0.8], [0.7]], 0.8, [2, None]),  # one seed never gets there
    ([[0.5, 0.8, None]], [[None, 0.9], [0.9, None]], 0.8, [1, 2]),  # diverged seeds reach nothing
    ([[0.5, 0.8, math.nan]], [[math.nan, 0.9]], 0.8, [1]),
    ([[0.5, 0.9], [0.5, None]], [[0.5]], 0.5, [1]),  # a mean over all seeds or none
    ([[None]], [[0.9]], None, [None])])
def test_speedups_worked_out_by_hand(uniform, clever, target, ratios):
    up = summarise([r for arm, curves in zip(ARMS, (uniform, clever))
                    for seed, values in enumerate(curves)
                    for r in curve(arm, seed, values)])["speedup"]["clever"]
    assert up["target"] == pytest.approx(target) and up["iterations_per_seed"] == ratios
    assert up["reached"] == len(ratios) - ratios.count(None)
    mean = None if None in ratios else statistics.mean(ratios)
    assert up["iterations"] == up["examples_scored"] == up["seconds"] == mean
    assert up["flops"] == dict.fromkeys(flops.LEVELS, mean)


def test_each_total_has_its_own_ratio_and_slow_downs_stay_below_one():
    rows = [row("uniform", s, 100, 0.5, scored=1000, seconds=t, flops={"learner": 1200})
            for s, t in ((0, 9.0), (1, 11.0))]
    bill = {"learner": 300, "actor_scoring": 300, "reference_scoring": 600,
            "reference_training": 1200}
    rows += [row("clever", 0, 25, 0.6, scored=4000, seconds=5.0, flops=bill, setup_seconds=15.0)]
    s = summarise(rows)
    up = s["speedup"]["clever"]
    assert up["iterations"] == 4.0 and up["examples_scored"] == 0.25
    assert up["seconds"] == 2.0 and up["seconds_with_setup"] == 0.5
    assert list(up["flops"].values()) == [4.0, 2.0, 1.0, 0.5]
    assert s["arms"]["clever"]["setup_seconds"] == 15.0
    assert s["arms"]["uniform"]["setup_seconds"] == 0.0


# ------------------------------------------------------------------------------------ summary

def test_summary_has_the_form_of_the_interface():
    rows = (curve("uniform", 0, [0.5, 0.6]) + curve("uniform", 1, [0.5, 0.8])
            + curve("clever", 0, [0.7, 0.9]))
    del rows[-1]["accuracy"]  # only a line of the log
    s = summarise(rows)
    assert list(s) == ["script", "dataset", "metric", "arms", "speedup"]
    assert (s["script"], s["dataset"], s["metric"]) == ("jest", "toy", "accuracy")
    u = s["arms"]["uniform"]
    assert list(u) == ["final", "examples_trained", "examples_scored", "seconds", "setup_seconds",
                       "flops", "picked"]
    assert u["final"] == {"accuracy": {"mean": pytest.approx(0.7), "n": 2,
                                       "sd": pytest.approx(0.02 ** 0.5)}}  # 0.1 ** 2 * 2 / (2 - 1)
    assert s["arms"]["clever"]["final"]["accuracy"] == {"mean": 0.7, "sd": 0.0, "n": 1}
    assert u["examples_trained"] == 200 and u["seconds"] == 20 and u["flops"] == {"learner": 2000}
    assert list(s["speedup"]) == ["clever"]
    assert list(s["speedup"]["clever"]) == [
        "target", "reached", "iterations", "examples_scored", "seconds", "seconds_with_setup",
        "flops", "iterations_per_seed"]
    json.dumps(s, allow_nan=False)


def test_the_final_metric_is_the_last_and_null_if_a_seed_has_diverged():
    rows = curve("uniform", 0, [0.5, 0.9, 0.6]) + curve("clever", 0, [0.9, None])
    arms = summarise(rows[::-1] + curve("clever", 1, [0.7, 0.8]))["arms"]  # in any order
    assert arms["uniform"]["final"]["accuracy"] == {"mean": 0.6, "sd": 0.0, "n": 1}
    assert arms["clever"]["final"]["accuracy"] == {"mean": None, "sd": None, "n": 2}


def test_rows_that_are_missing_are_named_with_the_file_and_the_mend(tmp_path):
    rows = curve("uniform", 0, [0.5]) + curve("uniform", 1, [0.5]) + curve("clever", 1, [0.5])
    del rows[1]["accuracy"]  # not evaluated
    with pytest.raises(ValueError) as e:
        report.conclude(workdir_of(tmp_path, rows, seeds=(0, 1)))
    assert str(e.value) == (
        f"{tmp_path}/metrics.jsonl has no rows of uniform-1, clever-0: finish the run or, if the "
        f"rows are lost, delete {tmp_path}/checkpoints and run it again")


# --------------------------------------------------------------------------------- the screen

def test_sentences_say_speedups_slow_downs_and_failures():
    shares = {"pool_noisy": 0.36, "pool_hopeless": 0.0, "pool_duplicate": 0.1}
    rows = [row("uniform", 0, 100, 0.8124, flops={"learner": 1.2e12})]
    rows += [row("clever", 0, 50, 0.82, scored=1234567, seconds=125.0, setup_seconds=4.0, **shares,
                 flops={"learner": 6e11, "selection": 9e11}, noise_auc=0.931,
                 picked_noisy=0.114, picked_hopeless=0.0, picked_duplicate=0.02)]
    rows += [row("slow", s, 100, a) for s, a in enumerate([0.1, 0.9, 0.2])]
    s = summarise(rows, [*ARMS, "slow"])
    text = report.sentences(s)
    assert ("clever reaches uniform's best (0.812) with 2x fewer updates; in FLOPs, 2x fewer for "
            "the learner alone, 1.25x more when everything is charged; in seconds, 1.25x slower, "
            "1.29x slower with the setup") in words(text)
    assert "slow: uniform's best (0.812) is never reached by 2 of 3 seeds\n" in text
    assert "clever picked 11 % noisy (pool 36 %), 2 % duplicate (pool 10 %)\n" in text
    assert "finds the noisy ones with an area under the ROC curve of 0.93" in words(text)
    assert text.count("favours the baseline") == 1
    never = report.sentences(summarise([r for r in rows if r["arm"] != "clever"],
                                       ["uniform", "slow"]))
    assert "favours the baseline" not in never  # where nothing gets there
    assert max(map(len, text.splitlines())) <= 98
    table = report.table(s)
    assert all(cell in table for cell in ("  setup\n", "0.812 +- 0.000 (1)", "1,234,567", " 1.5 "))
    assert len({len(line) for line in table.splitlines()}) == 1 and (text + table).isascii()


@pytest.mark.parametrize("ratio, says", [
    (2, "2x fewer"), (0.5, "2x more"), (1.0004, "as many"), (0.9999, "as many"),
    (1.03, "1.03x fewer"), (0.95, "1.05x more"), (None, "n/a"), (0.0, "n/a")])
def test_a_ratio_in_words(ratio, says):
    assert report.times(ratio) == says


def test_of_successive_levels_with_the_same_value_the_last_is_said():
    assert report.distinct({"a": 1, "b": 1, "c": 2, "d": 1}) == [("b", 1), ("c", 2), ("d", 1)]


def test_each_level_that_changes_the_ratio_is_said():
    bill = {"learner": 300, "actor_scoring": 300, "reference_scoring": 600,
            "reference_training": 1200}
    rows = [row("uniform", 0, 100, 0.5, flops={"learner": 1200}),
            row("clever", 0, 100, 0.5, flops=bill)]
    text = words(report.sentences(summarise(rows)))
    assert ("with as many updates; in FLOPs, 4x fewer for the learner alone, 2x fewer when its own "
            "scoring is charged, as many when the reference's scoring is charged too, 2x more when "
            "everything is charged; in seconds, as fast") in text


def test_an_arm_that_starts_above_the_target():
    rows = [row("uniform", 0, 0, 0.1, scored=0), row("uniform", 0, 10, 0.2, scored=0)]
    rows += [row("clever", 0, 0, 0.3, scored=0)]
    up = summarise(rows)["speedup"]["clever"]
    assert up["reached"] == 1 and up["iterations"] is None  # 10 / 0
    assert "with n/a updates" in report.sentences(summarise(rows))


def test_details_are_relative_to_the_first_arm():
    cells = lambda rows, metrics=(): [line.split() for line in report.details(
        summarise(rows), metrics).splitlines()[2:]]
    rows = [row("uniform", s, 10, a, flops={"base": 4e12}, nmi=None)
            for s, a in ((0, 0.2), (1, 0.4))]
    rows += [row("clever", 0, 10, 0.5, flops={"base": 2e12, "experts": 4e12}, nmi=0.25)]
    assert cells(rows, ("accuracy", "nmi", "tail")) == [
        ["accuracy", "0.300", "0.500"], ["nmi", "-", "0.250"],
        ["TFLOP:", "base", "4", "2"], ["TFLOP:", "experts", "0", "4"],
        ["no_amortisation", "/", "baseline", "1.000", "1.500"]]
    rows = [row("uniform", 0, 10, 0.2, flops={"learner": 4e12}),
            row("clever", 0, 10, 0.5, flops={"learner": 2e12, "selection": 8e12})]
    assert cells(rows)[2:] == [["fully_amortised", "/", "baseline", "1.000", "0.500"],
                               ["no_amortisation", "/", "baseline", "1.000", "2.500"]]


# --------------------------------------------------------------------------------- the report

@pytest.fixture
def drawn(monkeypatch):
    """The figures by name of their file. They are not drawn: that takes a second each."""
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.update(
        {path.name: figure}))
    return figures


def test_seeds_of_another_command_enter_no_mean_and_are_named(tmp_path, caplog, capsys, drawn):
    rows = [*curve("uniform", 0, [0.25, 0.5]), *curve("uniform", 3, [0.125])]
    with caplog.at_level("WARNING", "absl"):
        report.conclude(workdir_of(tmp_path, rows, ["uniform"]))
    assert "0.500 +- 0.000 (1)" in capsys.readouterr().out
    assert "seeds 3, which are not in --seeds=0" in caplog.text
    final = json.loads((tmp_path / "summary.json").read_text())["arms"]["uniform"]["final"]
    assert final["accuracy"] == {"mean": 0.5, "sd": 0.0, "n": 1}


def test_the_command_reports_again_what_the_script_reported(tmp_path, capsys):
    rows = [{**r, "recall@10": r["accuracy"], "chance@10": 0.01, "loss": 1.0}
            for arm, best in zip(ARMS, (0.5, 0.6)) for r in curve(arm, 0, [0.2, best])]
    for r in rows:
        del r["accuracy"]
    report.conclude(workdir_of(tmp_path, rows, dataset="data/emoji/1.0.0/"))
    said, summary = capsys.readouterr().out, (tmp_path / "summary.json").read_text()
    assert (json.loads(summary)["dataset"], json.loads(summary)["script"]) == ("emoji", "jest")
    assert "clever reaches uniform's best (0.500)" in said
    assert ["chance@10", "0.010", "0.010"] in [line.split() for line in said.splitlines()]
    for name in ("summary.json", "curves.png"):
        (tmp_path / name).unlink()
    again = lambda: subprocess.run([sys.executable, "-m", "common.report", tmp_path], text=True,
                                   capture_output=True, cwd=Path(__file__).parents[1])
    assert again().stdout == said and (tmp_path / "summary.json").read_text() == summary
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "metrics.jsonl").unlink()
    done = again()
    assert done.returncode == 1 and "has no rows of uniform-0, clever-0" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def lines_of(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}


def test_dnc_is_judged_by_its_probe_and_its_curves_begin_with_the_base(tmp_path, drawn, capsys):
    def rows_of(arm, knns, flops, first=10, **at_end):
        rows = [{**row(arm, 0, first + 10 * i, None, flops=flops), "knn": k}
                for i, k in enumerate(knns)]
        rows[-1] |= at_end
        return [{k: v for k, v in r.items() if k != "accuracy"} for r in rows]
    rows = rows_of("moclr", [0.3, 0.4, 0.5], {"base": 1}, linear_probe=0.6)
    rows += rows_of("base", [0.3, 0.4], {"base": 1}, first=5)
    rows += rows_of("dnc_expert0", [0.9], {"base": 1, "experts": 1})
    rows += rows_of("dnc", [0.7], {"base": 1, "distillation": 1}, 30, linear_probe=0.8, nmi=0.25)
    report.conclude(workdir_of(tmp_path, rows, ["moclr", "dnc"], script="dnc.py"))
    said = capsys.readouterr().out
    assert "dnc reaches moclr's best (0.600)" in said and "expert" not in said
    assert "setup" not in said  # there is none
    assert ["nmi", "-", "0.250"] in [line.split() for line in said.splitlines()]
    steps = lines_of(drawn["curves.png"].axes[0])
    assert steps["moclr"] == [[10, 0.3], [20, 0.4], [30, 0.5]]
    assert steps["dnc"] == [[5, 0.3], [15, 0.4], [30, 0.7]]


def pictured_rows(steps=(0, 50, 100)):
    return [row(arm, seed, step, min(0.9, 0.1 + speed * step / 100 + 0.01 * seed), scored=40 * step,
                pool_noisy=0.3, picked_noisy=0.3 if arm == "uniform" else 0.3 - step / 1000)
            for arm, speed in (("uniform", 0.4), ("clever", 0.8)) for seed in (0, 1)
            for step in steps]


def pool_of(caption="a cat"):
    source = types.SimpleNamespace(describe=lambda ids: [caption for _ in ids])
    return types.SimpleNamespace(source=source, donor=lambda ids: ids, read=lambda ids: {
        "image": np.zeros((len(ids), 8, 8, 3), np.uint8), "noisy": np.asarray(ids) == 1})


def picks_of(**more):
    return {"arm": "clever", "ids": np.arange(4), "score_B": np.arange(4.0),
            "pick_S": np.array([1, 2]), "pool": pool_of(**more)}


def test_curves_show_every_arm_and_the_crossings(tmp_path, drawn):
    report.conclude(workdir_of(tmp_path, pictured_rows(), seeds=(0, 1)))
    steps, scored, spent, seconds = drawn["curves.png"].axes
    for ax, scale in ((steps, 1), (scored, 40), (spent, 100), (seconds, 1)):
        points = {arm: np.array(lines_of(ax)[arm]) for arm in ARMS}
        np.testing.assert_allclose(points["uniform"], [[0, 0.105], [50 * scale, 0.305],
                                                       [100 * scale, 0.505]])
        # Uniform ends at a mean of 0.505. Clever's mean at step 50 is the same.
        dots = [line.get_xydata()[0] for line in ax.get_lines() if line.get_marker() == "o"]
        np.testing.assert_allclose(dots, [[100 * scale, 0.505], [50 * scale, 0.505]])


def test_the_dot_of_a_flat_baseline_is_where_it_is_charged(tmp_path, drawn):
    rows = curve("uniform", 0, [0.2, 0.49, 0.5]) + curve("uniform", 1, [0.2, 0.53, 0.54])
    report.conclude(workdir_of(tmp_path, rows, ["uniform"], seeds=(0, 1)))
    dot, = [line for line in drawn["curves.png"].axes[0].get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(dot.get_xydata(), [[20, 0.51]])


@pytest.mark.parametrize("steps", [(0, 50, 100), (100,)])
def test_picks_are_drawn_against_the_pool_with_marks_that_show_a_single_evaluation(
        tmp_path, drawn, steps):
    report.conclude(workdir_of(tmp_path, pictured_rows(steps), seeds=(0, 1)), picks=picks_of())
    ax = drawn["picks.png"].axes[-1]
    uniform, clever, pool = ax.get_lines()
    np.testing.assert_allclose(clever.get_xydata(), [[s, 0.3 - s / 1000] for s in steps])
    assert clever.get_marker() == uniform.get_marker() == "."
    assert clever.get_color() == pictures.COLOURS[1]  # the second arm's, as in curves.png
    np.testing.assert_allclose(pool.get_ydata(), 0.3)
    takes = [a for a in drawn["picks.png"].axes if a.get_xlabel() == "a cat"]
    assert [a.get_title() for a in takes] == ["+2.00", "+1.00", "+3.00", "+0.00"]
    assert [a.xaxis.label.get_color() for a in takes] == ["black", pictures.WRONG, "black", "black"]


def test_each_image_has_its_own_score_and_text():
    shown = picks_of()
    shown["pool"].source.describe = lambda ids: [f"number {i}" for i in ids]
    figure = pictures.picks({}, {}, n_images=2, **shown)
    assert {(a.get_title(), a.get_xlabel()) for a in figure.axes} == {
        (f"+{i}.00", f"number {i}") for i in range(4)}


def test_importing_report_does_not_load_matplotlib():
    code = "import sys, common.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.filterwarnings("ignore:Glyph")  # the font lacks some
@pytest.mark.parametrize("caption", ["$$$ SALE $$$", "$x_$ \\frac{", "a" * 500, "\x07 bell \u05d0"])
def test_captions_are_drawn_as_they_are(tmp_path, caption, caplog):
    with caplog.at_level("WARNING", "absl"):
        pictures.draw(pictures.picks, tmp_path / "picks.png", {}, {}, n_images=2,
                      **picks_of(caption=caption))
    assert (tmp_path / "picks.png").exists() and not [
        r for r in caplog.records if "drawn" in r.getMessage()]


def test_clusters_are_drawn_largest_first(tmp_path):
    pool = pool_of()
    pool.ids = np.arange(10, 19)
    figure = pictures.clusters(pool, np.array([0, 1, 1, 3, 3, 3, 3, 1, 0]), 0.5, n_images=3)
    rows = np.reshape(figure.axes, (4, 3))
    assert [row[0].get_ylabel() for row in rows] == ["4", "3", "2", "0"]
    assert [[len(ax.images) for ax in row] for row in rows] == [
        [1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]]


def test_a_picture_that_cannot_be_drawn_is_one_warning_after_the_tables(
        tmp_path, caplog, capsys, monkeypatch):
    def broken(*args):
        assert "uniform" in capsys.readouterr().out  # the table is there already
        raise RuntimeError("no font\nand many more lines")
    monkeypatch.setattr(pictures, "curves", broken)
    with caplog.at_level("WARNING", "absl"):
        report.conclude(workdir_of(tmp_path, curve("uniform", 0, [0.5]), ["uniform"]))
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}/curves.png could not be drawn: no font"]


def test_a_directory_of_something_else_is_refused_in_one_line(tmp_path):
    for text in (None, "", "{}", "[]", '{"script": "jest.py", "flags": {}}'):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{tmp_path} holds no config.json of a run"):
            report.conclude(tmp_path)
