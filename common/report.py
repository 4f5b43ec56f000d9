"""What a finished run comes to: tables on the screen, summary.json and the pictures.

A method that selects data is worth what it saves. Its speed-up compares what the baseline and the
method ("arm") had spent when they were equally good:

    target   = the highest that the baseline's mean over the seeds ever is
    speed-up = mean over the arm's seeds of
                 what the baseline had spent when its mean was first within one sd of the target
                 / what the arm's seed had spent when it first reached the target itself

More of the metric must be better. A ratio below 1 means that the arm spent more than the baseline.

    python -m common.report runs/jest

prints the tables of a finished run again and writes its summary.json and curves.png again.
"""

import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

from absl import logging
import numpy as np

from common import files, flops

# Each row of metrics.jsonl has these, counted from step 0. Its other entries are metrics.
BOOKKEEPING = ("arm", "seed", "step", "examples_trained", "examples_scored", "seconds",
               "setup_seconds", "flops")
# What can be spent: numbers, seconds, and FLOPs by who is charged for what.
TOTALS = ("iterations", "examples_scored", "seconds", "seconds_with_setup", *flops.LEVELS)
CHARGED = {"fully_amortised": "for the learner alone",
           "foundation_dataset": "when its own scoring is charged",
           "pretrained_reference": "when the reference's scoring is charged too",
           "no_amortisation": "when everything is charged"}
# The headline metric is the first of these that a run has. Beside it stand the metric of curves.png
# and the columns of a second table. DnC fits its linear probe once, at the end.
HEADLINES = {
    "linear_probe": ("knn", ("balanced_accuracy", "head", "middle", "tail", "knn", "nmi")),
    "accuracy": ("accuracy", ()),
    "recall@10": ("recall@10", ("recall@1", "recall@5", "recall@10", "chance@10", "zero_shot"))}


# ---------------------------------------------------------------------------------- speed-ups

def evaluations(rows, metric):
    """(values [seed, evaluation], spent [seed, evaluation, total]) from the rows of one arm.

    The evaluations are at the steps that all seeds have. The metric of a seed that has diverged is
    null, which becomes NaN. The totals are those of TOTALS.
    """
    by_seed = {}
    for r in rows:
        by_seed.setdefault(r["seed"], {})[r["step"]] = r
    steps = sorted(set.intersection(*map(set, by_seed.values())))
    array = lambda get: np.array([[get(by_seed[seed][step]) for step in steps]
                                  for seed in sorted(by_seed)], float)
    return array(lambda r: r[metric]), array(lambda r: [
        r["step"], r["examples_scored"], r["seconds"], r["seconds"] + r.get("setup_seconds", 0),
        *(flops.total_flops(r["flops"], level) for level in flops.LEVELS)])


def seed_mean(x):
    """The mean of x [seed, n] over the seeds, exactly rounded: np.mean of three times 0.1 is above
    0.1, so that an arm equal to the baseline would never reach it."""
    return np.array([statistics.mean(seeds) for seeds in x.T.tolist()])


def seed_sd(x):
    """The standard deviation of x [seed, ...] over the seeds, with n - 1; 0 for one seed."""
    return x.std(0, ddof=1) if len(x) > 1 else 0 * x[0]


def baseline_target(values, spent):
    """(target, what the baseline had spent for it [total], as a mean over its seeds).

    Where a noisy curve is flat, chance decides when it is at its best. So the baseline is charged
    for its first evaluation within one standard deviation of the best.
    """
    mean = seed_mean(values)
    if np.isnan(mean).all():
        return math.nan, np.full(len(TOTALS), math.nan)
    best = np.nanargmax(mean)
    first = np.argmax(mean >= mean[best] - seed_sd(values)[best])
    return mean[best], seed_mean(spent[:, first])


def speedup(values, spent, target, baseline_spent):
    """An arm's entry in summary.json. A ratio is NaN if a seed never reaches the target, or if it
    had spent nothing when it did."""
    reaches = values >= target  # NaN reaches nothing
    at_target = [s[r][0] if r.any() else np.zeros(len(TOTALS)) for s, r in zip(spent, reaches)]
    ratios = baseline_spent / np.where(at_target, at_target, math.nan)  # [seed, total]
    mean = dict(zip(TOTALS, seed_mean(ratios)))
    return {"target": target, "reached": reaches.any(1).sum(),
            **{total: mean[total] for total in TOTALS if total not in flops.LEVELS},
            "flops": {level: mean[level] for level in flops.LEVELS},
            "iterations_per_seed": ratios[:, 0]}


# ------------------------------------------------------------------------------------ summary

def summarise(rows, metric, arms, **about):
    """summary.json, from the rows of metrics.jsonl, in which each arm has rows with the metric.
    arms[0] is the baseline. about: script and dataset."""
    rows_of = {arm: of_arm(rows, arm, metric) for arm in arms}
    target, spent = baseline_target(*evaluations(rows_of[arms[0]], metric))
    return files.plain({
        **about, "metric": metric, "arms": {arm: summarise_arm(rows_of[arm]) for arm in arms},
        "speedup": {arm: speedup(*evaluations(rows_of[arm], metric), target, spent)
                    for arm in arms[1:]}})


def summarise_arm(rows):
    """An arm's entry in summary.json: metrics and totals at the end, and `picked`, what it picked
    and what its pool had to offer over the whole run."""
    last = list({r["seed"]: r for r in sorted(rows, key=lambda r: r["step"])}.values())
    mean = lambda get: statistics.fmean(map(get, last))
    metrics = [k for k in last[0] if k not in BOOKKEEPING]
    return {"final": {k: over_seeds(last, k) for k in metrics},
            **{k: mean(lambda r: r.get(k, 0)) for k in BOOKKEEPING[3:-1]},
            "flops": {role: mean(lambda r: r["flops"].get(role, 0))
                      for role in dict.fromkeys(role for r in last for role in r["flops"])},
            "picked": {k: over_seeds(rows, k)["mean"] for k in metrics
                       if k.startswith(("picked_", "pool_"))}}


def over_seeds(rows, metric):
    """If one seed has diverged, the mean is NaN: a mean of the others would flatter."""
    x = np.array([r.get(metric) for r in rows], float)
    return {"mean": x.mean(), "sd": seed_sd(x), "n": len(x)}


def finished(rows, metric, arms, seeds, path):
    """The rows of these seeds. A work directory may hold others, of a command that was stopped; a
    warning names them. path: the file of the rows.

    Raises: ValueError if it has no row with the metric of an arm and seed.
    """
    others = sorted({r["seed"] for r in rows} - set(seeds))
    if others:
        logging.warning("left out: rows of seeds %s, which are not in --seeds=%s; name them there "
                        "to finish and to report them", ",".join(map(str, others)),
                        ",".join(map(str, seeds)))
    there = {(r["arm"], r["seed"]) for r in rows if metric in r}
    missing = [f"{arm}-{seed}" for arm in arms for seed in seeds if (arm, seed) not in there]
    if missing:
        raise ValueError(f"{path} has no rows of {', '.join(missing)}: finish the run or, if the "
                         f"rows are lost, delete {Path(path).parent}/checkpoints and run it again")
    return [r for r in rows if r["seed"] in seeds]


# --------------------------------------------------------------------------------- the screen

def columns(lines):
    """Lines of cells as text: the first column to the left, a rule below the first line."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
                     for name, *cells in lines)


def decimals(x):
    return "-" if x is None else f"{x:.3f}"


def times(ratio, better="fewer", worse="more", equal="as many"):
    """A speed-up in words: 2 is '2x fewer', 0.5 is '2x more'."""
    if not ratio:  # null, or the baseline spends none of this
        return "n/a"
    if f"{ratio:.3g}" == "1":
        return equal
    return f"{ratio:.3g}x {better}" if ratio > 1 else f"{1 / ratio:.3g}x {worse}"


def distinct(values):
    """The items of {level: value}. Of successive levels with the same value only the last is kept,
    which charges most. So where nothing can be amortised there is one item."""
    return [([*levels][-1], value) for value, levels in itertools.groupby(values, values.get)]


def table(summary):
    """The arms in rows: the metric at the end, and what was spent."""
    setup = any(a["setup_seconds"] for a in summary["arms"].values())
    lines = [["arm", summary["metric"], "examples trained", "drawn", "TFLOP in all", "seconds",
              *["setup"] * setup]]
    for arm, a in summary["arms"].items():
        end = a["final"][summary["metric"]]
        lines.append([arm, f"{decimals(end['mean'])} +- {decimals(end['sd'])} ({end['n']})",
                      f"{a['examples_trained']:,.0f}", f"{a['examples_scored']:,.0f}",
                      f"{flops.total_flops(a['flops']) / 1e12:.3g}", f"{a['seconds']:.1f}",
                      *[f"{a['setup_seconds']:.1f}"] * setup])
    return columns(lines)


def details(summary, metrics):
    """The arms in columns: these metrics at the end, if any arm has them, then the FLOPs of the
    whole run by role, and at each level of amortisation relative to the baseline."""
    arms = summary["arms"].values()
    lines = [[k, *(decimals(a["final"].get(k, {}).get("mean")) for a in arms)]
             for k in metrics if any(k in a["final"] for a in arms)]
    lines += [[f"TFLOP: {role}", *(f"{a['flops'].get(role, 0) / 1e12:.3g}" for a in arms)]
              for role in dict.fromkeys(role for a in arms for role in a["flops"])]
    total = {level: [flops.total_flops(a["flops"], level) for a in arms] for level in flops.LEVELS}
    ratios = {level: [decimals(n / ns[0]) for n in ns] for level, ns in total.items()}
    lines += [[f"{level} / baseline", *ratio] for level, ratio in distinct(ratios)]
    return columns([["of a run", *summary["arms"]], *lines])


def sentences(summary):
    """What each arm saved, what it picked, and how well that finds the planted noise."""
    baseline = next(iter(summary["arms"]))
    says = [speedup_sentence(arm, baseline, s) for arm, s in summary["speedup"].items()]
    if any(" reaches " in sentence for sentence in says):
        says.append("An arm that gets there before its end has a learning rate that has not "
                    "decayed yet. The baseline's mostly has: this favours the baseline.")
    for arm, a in summary["arms"].items():
        picks = [f"{100 * a['picked'][f'picked_{kind}']:.0f} % {kind} (pool "
                 f"{100 * a['picked'][f'pool_{kind}']:.0f} %)" for kind in kinds(a["picked"])]
        if picks and a["examples_scored"] > a["examples_trained"]:  # the arm selects
            says.append(f"{arm} picked {', '.join(picks)}")
        auc = a["final"].get("noise_auc", {}).get("mean")
        if auc is not None:
            says.append(f"{arm}: how seldom an example is taken when offered finds the noisy ones "
                        f"with an area under the ROC curve of {auc:.2f} (0.5 is chance)")
    return "\n".join(textwrap.fill(sentence, 98, subsequent_indent="    ") for sentence in says)


def speedup_sentence(arm, baseline, s):
    """An arm's entry in summary["speedup"], in words."""
    n, best = len(s["iterations_per_seed"]), f"{baseline}'s best ({decimals(s['target'])})"
    if s["reached"] < n:
        return f"{arm}: {best} is never reached by {n - s['reached']} of {n} seeds"
    charged = distinct({level: times(ratio) for level, ratio in s["flops"].items()})
    charged = ", ".join(f"{ratio} {CHARGED[level]}" for level, ratio in charged)
    speed = ("faster", "slower", "as fast")
    words = (f"{arm} reaches {best} with {times(s['iterations'])} updates; in FLOPs, {charged}; "
             f"in seconds, {times(s['seconds'], *speed)}")
    if s["seconds_with_setup"] != s["seconds"]:
        words += f", {times(s['seconds_with_setup'], *speed)} with the setup"
    return words


def kinds(picked):
    """The kinds of examples that the pool is known to hold: some of noisy, duplicate, hopeless."""
    return [k[5:] for k, share in picked.items() if k.startswith("pool_") and share]


# --------------------------------------------------------------------------------- the report

def conclude(workdir, *, picks=None, clusters=None):
    """Prints the tables of a finished run, then writes summary.json and the pictures. The arms and
    seeds stand in config.json. picks: the keyword arguments of `pictures.picks`. clusters: the
    arguments of `pictures.clusters`.

    Raises: ValueError, in one line, if the run is not finished.
    """
    workdir = Path(workdir)
    try:
        config = json.loads((workdir / "config.json").read_text())
        script, dataset, arms, seeds = config["script"], *(
            config["flags"][k] for k in ("dataset", "arms", "seeds"))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{workdir} holds no config.json of a run: name another directory"
                         ) from None
    log = files.MetricsFile(workdir / "metrics.jsonl")
    seen = {k for r in log.rows() if r["arm"] in arms for k in r}
    metric = next((k for k in HEADLINES if k in seen), "accuracy")
    rows = finished(log.rows(), metric, arms, seeds, log.path)
    curve_metric, more = HEADLINES[metric]
    # The data set may be a path that ends with a version: .../emoji/1.0.0 is called emoji.
    dataset = re.sub(r"(/[\d.]*)*$", "", dataset).rpartition("/")[2]
    script = Path(script).stem
    summary = summarise(rows, metric, arms, script=script, dataset=dataset)
    parts = [table(summary), sentences(summary), details(summary, more)]
    print(*filter(None, parts), sep="\n\n", flush=True)
    files.write_json(workdir / "summary.json", summary)

    from common import pictures  # and with it matplotlib, which takes long to import
    title = f"{script} on {dataset}: mean and sd over seeds {', '.join(map(str, seeds))}"
    if curve_metric != metric:
        title += f" ({curve_metric}; the {metric.replace('_', ' ')} is fitted at the end only)"
    tracks = {arm: track(with_base(rows, arm, curve_metric), curve_metric) for arm in arms}
    pictures.draw(pictures.curves, workdir / "curves.png", tracks, curve_metric, title)
    if picks:
        average = summary["arms"][picks["arm"]]["picked"]
        tracks = {kind: {arm: track(of_arm(rows, arm, f"picked_{kind}"), f"picked_{kind}")
                         for arm in arms if f"picked_{kind}" in summary["arms"][arm]["picked"]}
                  for kind in kinds(average)}
        pictures.draw(pictures.picks, workdir / "picks.png", tracks, average, **picks)
    if clusters:
        pictures.draw(pictures.clusters, workdir / "clusters.png", **clusters)


def of_arm(rows, arm, metric):
    return [r for r in rows if r["arm"] == arm and metric in r]


def with_base(rows, arm, metric):
    """The rows of an arm, after the base's if the arm was distilled from it (DnC)."""
    own = of_arm(rows, arm, metric)
    distilled = "distillation" in own[0]["flops"]
    return of_arm(rows, "base", metric) * distilled + own


def track(rows, metric):
    """What a curve is drawn of: {"mean", "sd" and each of TOTALS: [evaluation]}, over the seeds."""
    values, spent = evaluations(rows, metric)
    return {"mean": seed_mean(values), "sd": seed_sd(values), **dict(zip(TOTALS, spent.mean(0).T))}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m common.report WORKDIR")
    try:
        conclude(sys.argv[1])
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
