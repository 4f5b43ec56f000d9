"""Speed-ups worked out by hand, files torn by kills, and the sentences that people will quote."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from common import report

ARMS = ["uniform", "clever"]


def row(arm, seed, step, accuracy, *, seconds=None, scored=None, flops=None, **more):
    return {"arm": arm, "seed": seed, "step": step, "examples_trained": 10 * step,
            "examples_scored": 10 * step if scored is None else scored,
            "seconds": float(step) if seconds is None else seconds,
            "flops": flops or {"learner": 100 * step}, "accuracy": accuracy, **more}


def curve(arm, seed, accuracies, **more):
    """Evaluations at steps 10, 20, ..."""
    return [row(arm, seed, 10 * (i + 1), a, **more) for i, a in enumerate(accuracies)]


def summarise(rows, arms=ARMS):
    return report.summarise(rows, script="jest", dataset="toy", metric="accuracy", arms=arms)


# ------------------------------------------------------------------------------------- FLOPs

def test_levels_are_cumulative_and_each_role_enters_at_its_own():
    flops = {"learner": 1, "actor_scoring": 10, "actor_training": 100, "selection": 1000,
             "reference_scoring": 10_000, "reference_training": 100_000}
    assert list(report.LEVELS) == ["fully_amortised", "foundation_dataset", "pretrained_reference",
                                   "no_amortisation"]
    assert [report.total_flops(flops, level) for level in report.LEVELS] == [
        1, 1111, 11_111, 111_111]
    assert report.total_flops(flops) == 111_111


def test_roles_outside_the_levels_count_in_each():
    flops = {"base": 1, "clustering": 2, "experts": 4, "distillation": 8}
    assert {report.total_flops(flops, level) for level in report.LEVELS} == {15.0}


# ------------------------------------------------------------------------------------- files

def test_rows_come_back_with_nonfinite_as_null(tmp_path):
    f = report.MetricsFile(tmp_path / "metrics.jsonl")
    assert f.rows() == []
    f.append({"loss": float("nan"), "flops": {"learner": np.float32(np.inf)}, "n": np.int64(3),
              "scores": np.array([1.0, np.nan])})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n") and "NaN" not in text and "Infinity" not in text
    assert f.rows() == [{"loss": None, "flops": {"learner": None}, "n": 3, "scores": [1.0, None]}]


@pytest.mark.parametrize("torn", [b'{"arm": "uni', b'{"step": 3}', b'{"a": "\xc3'])
def test_a_torn_line_is_ignored_then_removed(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    f = report.MetricsFile(path)
    assert [r["step"] for r in f.rows()] == [1, 2]
    f.append({"step": 4})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 4}\n'


def test_a_file_that_is_one_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    f = report.MetricsFile(path)
    assert f.rows() == []
    f.append({"step": 1})
    assert f.rows() == [{"step": 1}]


def test_rewind_drops_only_what_one_run_logged_after_its_checkpoint(tmp_path):
    f = report.MetricsFile(tmp_path / "metrics.jsonl")
    f.rewind("uniform", 0, 0)  # nothing logged yet
    rows = [row(arm, seed, step, 0.5) for arm in ARMS for seed in (0, 1) for step in (1, 2, 3)]
    for r in rows:
        f.append(r)
    with open(f.path, "ab") as raw:
        raw.write(b'{"torn')
    f.rewind("clever", 1, 2)
    assert f.rows() == rows[:-1]
    assert f.path.read_bytes().endswith(b"}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failed_rewind_leaves_the_old_file(tmp_path, monkeypatch):
    f = report.MetricsFile(tmp_path / "metrics.jsonl")
    f.append(row("uniform", 0, 1, 0.5))
    before = f.path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(report.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        f.rewind("uniform", 0, 0)
    assert f.path.read_bytes() == before


def test_write_json_keeps_order_and_ends_with_a_newline(tmp_path):
    report.write_json(tmp_path / "s.json", {"b": np.nan, "a": (1, np.float32(0.5))})
    assert (tmp_path / "s.json").read_text() == (
        '{\n  "b": null,\n  "a": [\n    1,\n    0.5\n  ]\n}\n')


# ----------------------------------------------------------------------------------- summary

def test_summary_has_the_form_of_the_interface():
    rows = (curve("uniform", 0, [0.5, 0.6]) + curve("uniform", 1, [0.5, 0.8])
            + curve("clever", 0, [0.7, 0.9]))
    s = summarise(rows)
    assert list(s) == ["script", "dataset", "metric", "arms", "speedup"]
    assert (s["script"], s["dataset"], s["metric"]) == ("jest", "toy", "accuracy")
    u = s["arms"]["uniform"]
    assert list(u) == ["final", "examples_trained", "examples_scored", "flops", "seconds"]
    assert u["final"] == {"accuracy": {"mean": pytest.approx(0.7), "n": 2,
                                       "sd": pytest.approx(0.02 ** 0.5)}}  # 0.1 ** 2 * 2 / (2 - 1)
    assert s["arms"]["clever"]["final"]["accuracy"] == {"mean": 0.9, "sd": 0.0, "n": 1}
    assert u["examples_trained"] == 200 and u["seconds"] == 20 and u["flops"] == {"learner": 2000}
    assert list(s["speedup"]) == ["clever"]
    assert list(s["speedup"]["clever"]) == ["target", "reached", "iterations", "examples_scored",
                                            "seconds", "flops", "iterations_per_seed"]
    json.dumps(s, allow_nan=False)


def test_speedup_is_a_mean_of_ratios_per_seed():
    # Seed-means of the baseline: 0.2, 0.4, 0.6, 0.8. Target 0.8 at step 40.
    rows = curve("uniform", 0, [0.1, 0.3, 0.5, 0.7]) + curve("uniform", 1, [0.3, 0.5, 0.7, 0.9])
    rows += curve("clever", 0, [0.8, 0.7, 0.9]) + curve("clever", 1, [0.3, 0.85])
    up = summarise(rows)["speedup"]["clever"]
    assert up["target"] == pytest.approx(0.8) and up["reached"] == 2
    assert up["iterations_per_seed"] == [4.0, 2.0]  # 40 / 10 and 40 / 20
    assert up["iterations"] == 3.0  # not 40 / mean(10, 20) = 2.67
    assert up["flops"] == dict.fromkeys(report.LEVELS, 3.0)


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
    assert "setup_seconds" not in s["arms"]["uniform"]


def test_an_overfitting_baseline_is_held_to_its_best():
    rows = curve("uniform", 0, [0.5, 0.9, 0.6]) + curve("clever", 0, [0.6, 0.7, 0.9])
    s = summarise(rows)
    assert s["speedup"]["clever"]["target"] == 0.9
    assert s["speedup"]["clever"]["iterations"] == pytest.approx(20 / 30)  # billed to step 20
    assert s["arms"]["uniform"]["final"]["accuracy"]["mean"] == 0.6  # but its final is its last


def test_a_tie_goes_to_the_baselines_earlier_evaluation():
    rows = curve("uniform", 0, [0.5, 0.9, 0.9]) + curve("clever", 0, [0.9])
    assert summarise(rows)["speedup"]["clever"]["iterations"] == 2.0


def test_an_equal_arm_reaches_the_target_despite_rounding():
    rows = [r for arm in ARMS for seed in range(3) for r in curve(arm, seed, [0.1])]
    assert np.mean([0.1] * 3) > 0.1
    assert summarise(rows)["speedup"]["clever"]["iterations_per_seed"] == [1.0, 1.0, 1.0]


def test_one_seed_that_never_gets_there_makes_the_ratios_null():
    rows = curve("uniform", 0, [0.5, 0.8]) + curve("clever", 0, [0.8]) + curve("clever", 1, [0.7])
    up = summarise(rows)["speedup"]["clever"]
    assert up["reached"] == 1 and up["iterations_per_seed"] == [2.0, None]
    assert up["iterations"] is up["examples_scored"] is up["seconds"] is None
    assert up["flops"] == dict.fromkeys(report.LEVELS)


def test_missing_arms_log_rows_unequal_seeds_and_other_steps():
    rows = curve("uniform", 0, [0.5, 0.6, 0.7]) + curve("uniform", 1, [0.7, 0.8])
    rows += [row("clever", 0, 7, 0.7), row("clever", 0, 3, 0.2)]  # own steps, out of order
    log = row("clever", 0, 9, 0.0)
    del log["accuracy"]
    s = summarise(rows + [log], [*ARMS, "not_run"])
    assert list(s["arms"]) == ARMS
    # Seed-means 0.6, 0.7 (both), 0.7 (seed 0 alone): the earlier 0.7 is at step 20.
    assert s["speedup"]["clever"]["target"] == pytest.approx(0.7)
    assert s["speedup"]["clever"]["iterations"] == pytest.approx(20 / 7)
    assert s["arms"]["clever"]["examples_trained"] == 70
    only = summarise(rows, ["not_run", "clever"])
    assert list(only["arms"]) == ["clever"] and only["speedup"] == {}
    assert "clever" in report.table(only)
    assert report.table(summarise([]))


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_divergence_is_null_and_never_reaches(bad):
    rows = curve("uniform", 0, [0.5, 0.8, bad]) + curve("clever", 0, [bad, 0.9])
    rows += curve("clever", 1, [0.9, bad])
    s = summarise(rows)
    assert s["speedup"]["clever"]["target"] == 0.8  # at step 20
    assert s["speedup"]["clever"]["iterations_per_seed"] == [1.0, 2.0]
    assert s["arms"]["clever"]["final"]["accuracy"] == {"mean": None, "sd": None, "n": 2}
    all_bad = summarise(curve("uniform", 0, [bad]) + curve("clever", 0, [0.9]))
    assert all_bad["speedup"]["clever"]["target"] is None
    assert all_bad["speedup"]["clever"]["reached"] == 0
    assert "never reached by 1 of 1 seeds" in report.table(all_bad)


def test_a_baseline_that_scores_nothing_and_an_arm_that_starts_above_it():
    rows = [row("uniform", 0, 0, 0.1, scored=0), row("uniform", 0, 10, 0.2, scored=0)]
    rows += [row("clever", 0, 0, 0.3, scored=0)]
    up = summarise(rows)["speedup"]["clever"]
    assert up["reached"] == 1 and up["iterations"] is None  # 10 / 0
    assert "iterations n/a" in report.table(summarise(rows))


# ------------------------------------------------------------------------------------- screen

def test_table_says_speedups_slow_downs_and_failures():
    noisy = {"pool_noisy": 0.36, "pool_duplicate": 0.1}
    rows = [row("uniform", 0, 100, 0.8124, flops={"learner": 1.2e12})]
    rows += [row("clever", 0, 50, 0.82, scored=1234567, seconds=125.0, setup_seconds=4.0, **noisy,
                 flops={"learner": 6e11, "selection": 9e11},
                 picked_noisy=0.114, picked_duplicate=0.02)]
    rows += [row("slow", s, 100, a) for s, a in enumerate([0.1, 0.9, 0.2])]
    text = report.table(summarise(rows, [*ARMS, "slow"]))
    flat = " ".join(text.split())
    assert "clever reaches uniform's best 0.812; speed-up in iterations 2x" in flat
    assert "seconds 0.8x: slower, seconds with setup 0.775x: slower" in flat
    assert "FLOPs 2x / 0.8x: slower / 0.8x: slower / 0.8x: slower (fully_amortised / found" in flat
    assert "slow: uniform's best 0.812 never reached by 2 of 3 seeds" in text
    assert "clever picked 11 % noisy (pool 36 %), 2 % duplicate (pool 10 %)\n" in text
    assert text.count("schedule has not decayed") == 1
    never = report.table(summarise([r for r in rows if r["arm"] != "clever"], ["uniform", "slow"]))
    assert "schedule has not decayed" not in never  # where nothing crosses
    assert "0.812 +- 0.000 (1)" in text and "1,234,567" in text and "1.5 T" in text
    head, rule, *body = text.splitlines()[:5]
    assert {len(line) for line in body} == {len(head)} == {len(rule)}
    assert text.isascii() and max(map(len, text.splitlines())) <= 98


@pytest.mark.parametrize("x, text", [(0, "0"), (999, "999"), (999.9, "1 k"), (1234, "1.23 k"),
                                     (99_990_000, "100 M"), (1.5e12, "1.5 T"), (2e25, "2e+04 Z")])
def test_si_prefixes(x, text):
    assert report._si(x) == text


# ----------------------------------------------------------------------------------- pictures

def pictured_rows():
    return [row(arm, seed, step, min(0.9, 0.1 + speed * step / 100 + 0.01 * seed),
                scored=0 if arm == "uniform" else 40 * step, pool_noisy=0.3,
                **({} if arm == "uniform" else {"picked_noisy": 0.3 - step / 1000}))
            for arm, speed in (("uniform", 0.4), ("clever", 0.8))
            for seed in (0, 1) for step in (0, 50, 100)]


def test_curves_draws_every_arm_and_the_crossings(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    lines, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: lines.append((a[1:], k)) or plot(*a, **k))
    rows = pictured_rows()
    report.curves(rows, summarise(rows), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    drawn = [k["label"] for _, k in lines if "label" in k]
    assert drawn.count("clever") == 4 and drawn.count("uniform") == 3  # it scores no examples
    dots = [[*a[0], *a[1]] for a, _ in lines if a[2:] == ("o",)]
    # Uniform ends at a mean of 0.505, step 100; clever's mean at step 50 is the same.
    assert dots[0] == pytest.approx([100, 0.505]) and dots[-1] == pytest.approx([50, 0.505])


def test_curves_of_one_unfinished_baseline(tmp_path):
    rows = curve("uniform", 0, [0.5, None])
    report.curves(rows, summarise(rows), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_selection_curves_show_the_picks_against_the_pool():
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    report.selection_curves(ax, pictured_rows())
    picked, pool = ax.get_lines()
    np.testing.assert_allclose(picked.get_xydata(), [[0, 0.3], [50, 0.25], [100, 0.2]])
    assert picked.get_color() == report.COLOURS[0]  # the second arm's, as in curves.png
    np.testing.assert_allclose(pool.get_ydata(), 0.3)
    assert pool.get_linestyle() == "--"


def test_importing_does_not_load_matplotlib():
    code = "import sys, common.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_bill_and_finals_are_relative_to_the_first_arm():
    rows = [row("uniform", s, 10, a, flops={"base": 4e9}, nmi=None)
            for s, a in ((0, 0.2), (1, 0.4))]
    rows += [row("clever", 0, 10, 0.5, flops={"base": 2e9, "experts": 4e9}, nmi=0.25)]
    flat = lambda text: [line.split() for line in text.splitlines()]
    assert flat(report.bill(summarise(rows)))[2:] == [
        ["base", "4", "G", "2", "G"], ["experts", "0", "4", "G"],
        ["all", "/", "baseline", "1.000", "1.500"]]
    learner = [row("uniform", 0, 10, 0.2, flops={"learner": 4e9}),
               row("clever", 0, 10, 0.5, flops={"learner": 2e9, "selection": 8e9})]
    assert flat(report.bill(summarise(learner)))[4:6] == [
        ["fully_amortised", "/", "baseline", "1.000", "0.500"],
        ["foundation_dataset", "/", "baseline", "1.000", "2.500"]]
    assert flat(report.finals(summarise(rows), ("accuracy", "nmi", "tail")))[1:] == [
        ["uniform", "0.300", "-", "-"], ["clever", "0.500", "0.250", "-"]]


def test_a_recall_is_printed_with_its_chance_level():
    rows = [row("uniform", 0, 10, 0.5, **{"recall@10": 1.0, "chance@10": 0.625, "chance@1": 0.125})]
    summary = report.summarise(rows, script="jest", dataset="toy", metric="recall@10",
                               arms=["uniform"])
    assert "a random ranking has a recall@10 of 0.625" in report.table(summary).splitlines()
    assert "random" not in report.table(summarise(rows))


def test_seeds_of_another_command_enter_no_mean_and_are_named(tmp_path, caplog, capsys):
    rows = [*curve("uniform", 0, [0.25, 0.5]), *curve("uniform", 3, [0.125])]
    with caplog.at_level("WARNING", "absl"):
        report.conclude(rows, tmp_path, seeds=[0], script="jest", dataset="toy", metric="accuracy",
                        arms=["uniform"])
    assert "0.500 +- 0.000 (1)" in capsys.readouterr().out
    assert "seeds 3, which are not in --seeds=0" in caplog.text
    final = json.loads((tmp_path / "summary.json").read_text())["arms"]["uniform"]["final"]
    assert final["accuracy"] == {"mean": 0.5, "sd": 0.0, "n": 1}


@pytest.mark.parametrize("caption", ["$$$ SALE $$$", "$x_$ \\frac{", "a" * 500, "\x07 bell", "\u05d0\u05d1"])
def test_captions_are_drawn_as_they_are(tmp_path, caption, recwarn):
    source = types.SimpleNamespace(describe=lambda i: caption)
    pool = types.SimpleNamespace(
        source=source, donor=lambda ids: ids, read=lambda ids: {
            "image": np.zeros((len(ids), 8, 8, 3), np.uint8), "noisy": np.zeros(len(ids), bool)})
    report.draw_picks([], np.arange(4), np.arange(4.0), np.array([1, 2]), pool=pool, arm="clever",
                      path=tmp_path / "picks.png")
    assert (tmp_path / "picks.png").exists()


def test_a_picture_that_cannot_be_drawn_is_one_warning_after_the_tables(
        tmp_path, caplog, capsys, monkeypatch):
    def broken(*args):
        assert "uniform" in capsys.readouterr().out  # the table is there already
        raise RuntimeError("no font\nand many more lines")
    monkeypatch.setattr(report, "curves", broken)
    broken.__name__ = "curves"
    with caplog.at_level("WARNING", "absl"):
        report.conclude(curve("uniform", 0, [0.5]), tmp_path, seeds=[0], script="jest",
                        dataset="toy", metric="accuracy", arms=["uniform"])
    assert [r.getMessage() for r in caplog.records] == ["curves could not be drawn: no font"]
