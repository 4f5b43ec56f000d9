"""What a run leaves behind: metrics.jsonl, summary.json, the table on the screen and curves.png.

A data-selection method is worth what it saves, so everything here answers one question: what had
the baseline spent when it was at its best, and what had the arm spent when it got as far?

    target   = max over the baseline's evaluations of (mean over seeds of the metric)
    speed-up = mean over the arm's seeds of  (baseline's total at the target)
                                           / (arm's total at its first evaluation >= target)

where the total is steps, examples scored, seconds, or FLOPs at one of four LEVELS of amortisation.
The metric is higher-is-better. A ratio below 1 is a slow-down and is called one.

A row of metrics.jsonl is the bookkeeping below plus any metrics; totals count from step 0:
    {"arm": "learnability", "seed": 0, "step": 200, "examples_trained": 51200,
     "examples_scored": 102400, "seconds": 12.3, "flops": {"learner": 1e12, ...}, "accuracy": 0.71}
"""

import json
import math
import os
import statistics
import textwrap
from pathlib import Path

from absl import logging
import numpy as np

BOOKKEEPING = ("arm", "seed", "step", "examples_trained", "examples_scored", "seconds",
               "setup_seconds", "flops")

# Which FLOPs are charged to the method, from "others have paid for the rest" to "we pay for all".
LEVELS = {"fully_amortised": ("learner",)}
LEVELS["foundation_dataset"] = LEVELS["fully_amortised"] + (
    "actor_scoring", "actor_training", "selection")
LEVELS["pretrained_reference"] = LEVELS["foundation_dataset"] + ("reference_scoring",)
LEVELS["no_amortisation"] = LEVELS["pretrained_reference"] + ("reference_training",)

KINDS = ("noisy", "duplicate", "hopeless")
BASELINE_COLOUR = "#444444"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


def total_flops(flops: dict, level: str = "no_amortisation") -> float:
    """Operations charged at `level`. A role that no level names cannot be amortised: it counts."""
    known = LEVELS["no_amortisation"]
    return float(sum(n for role, n in flops.items() if role in LEVELS[level] or role not in known))


# ------------------------------------------------------------------------------------- files

def _plain(x):
    """x with arrays as lists and non-finite floats as None: JSON has neither NaN nor Infinity."""
    if hasattr(x, "tolist"):  # numpy and jax, scalars too
        x = x.tolist()
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _replace(path: Path, data: bytes):
    """Puts data at path in one move, so that a kill leaves the old file or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path, obj):
    _replace(Path(path), (json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n").encode())


class MetricsFile:
    """metrics.jsonl: one object a line. A line counts once its newline is there."""

    def __init__(self, path):
        self.path = Path(path)

    def _whole(self) -> bytes:
        """The file up to its last newline; what follows is a line that a kill tore."""
        data = self.path.read_bytes() if self.path.exists() else b""
        return data[:data.rfind(b"\n") + 1]

    def rows(self) -> list:
        return [json.loads(line) for line in self._whole().splitlines()]

    def last(self, arm: str, seed: int) -> dict:
        """The row that a trained (arm, seed) ended with. Raises: ValueError if there is none."""
        mine = [r for r in self.rows() if (r["arm"], r["seed"]) == (arm, seed)]
        if not mine:
            raise ValueError(f"{self.path} lacks {arm}, seed {seed}, which is trained: delete "
                             f"{self.path.parent}")
        return mine[-1]

    def append(self, row: dict):
        line = json.dumps(_plain(row), allow_nan=False).encode() + b"\n"
        with open(self.path, "a+b") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read() != b"\n":
                    f.truncate(len(self._whole()))
            f.write(line)

    def rewind(self, arm: str, seed: int, step: int):
        """Drops what (arm, seed) logged after `step`, the checkpoint that it resumes from."""
        def keep(line):
            row = json.loads(line)
            return (row["arm"], row["seed"]) != (arm, seed) or row["step"] <= step
        _replace(self.path, b"".join(filter(keep, self._whole().splitlines(keepends=True))))


# ------------------------------------------------------------------------------- the arithmetic

def _float(x) -> float:
    return math.nan if x is None else float(x)  # null in the file was a NaN in the run


def _stat(values) -> dict:
    """Over seeds, the sd with n - 1. One diverged seed makes the mean null: no survivors' mean."""
    v = np.array([_float(x) for x in values])
    return _plain({"mean": v.mean(), "sd": v.std(ddof=1) if len(v) > 1 else 0.0, "n": len(v)})


def _evaluations(rows, arm: str, metric: str) -> dict:
    """{seed: evaluation rows by step}. A row without the metric is only a log line."""
    mine = [r for r in rows if r["arm"] == arm and metric in r]
    return {seed: sorted((r for r in mine if r["seed"] == seed), key=lambda r: r["step"])
            for seed in sorted({r["seed"] for r in mine})}


def _by_step(evaluations: dict) -> list:
    """For each step, ascending, the rows of the seeds evaluated there."""
    rows = [r for seed_rows in evaluations.values() for r in seed_rows]
    return [[r for r in rows if r["step"] == step] for step in sorted({r["step"] for r in rows})]


def _mean(rows, metric: str) -> float:
    """Exactly rounded: np.mean of three times 0.1 is above 0.1, and an equal arm never there."""
    return statistics.mean(_float(r[metric]) for r in rows)


def _spent(row) -> dict:
    """{what: total so far}: steps, examples, seconds, and FLOPs under the names of LEVELS."""
    return {"iterations": row["step"], "examples_scored": row["examples_scored"],
            "seconds": row["seconds"],
            "seconds_with_setup": row["seconds"] + row.get("setup_seconds", 0.0),
            **{level: total_flops(row["flops"], level) for level in LEVELS}}


def _target(by_step: list, metric: str):
    """The baseline's best seed-mean, the first time it gets there, and what it had then spent."""
    means = [_mean(rows, metric) for rows in by_step]
    if np.isnan(means).all():
        return None, {}
    best = int(np.nanargmax(means))
    spent = [_spent(r) for r in by_step[best]]
    return float(means[best]), {what: np.mean([s[what] for s in spent]) for what in spent[0]}


def _speedup(evaluations: dict, metric: str, target, baseline: dict, with_setup: bool) -> dict:
    """baseline: {what: its total at the target}. Ratios are null unless every seed gets there."""
    goal = _float(target)  # nothing is >= NaN
    first = [next((_spent(r) for r in rows if _float(r[metric]) >= goal), None)
             for rows in evaluations.values()]

    def ratios(what):  # a total of 0 (target met at step 0) has no ratio
        return [baseline[what] / s[what] if s and s[what] else None for s in first]

    def mean(what):
        per_seed = ratios(what)
        return None if None in per_seed else float(np.mean(per_seed))

    totals = ["iterations", "examples_scored", "seconds"] + with_setup * ["seconds_with_setup"]
    return {"target": target, "reached": sum(s is not None for s in first),
            **{what: mean(what) for what in totals},
            "flops": {level: mean(level) for level in LEVELS},
            "iterations_per_seed": ratios("iterations")}


def summarise(rows, *, script: str, dataset: str, metric: str, arms) -> dict:
    """summary.json from the rows of metrics.jsonl. arms[0] is the baseline; any may be missing."""
    evaluations = {arm: _evaluations(rows, arm, metric) for arm in arms}
    evaluations = {arm: e for arm, e in evaluations.items() if e}
    summary = {"script": script, "dataset": dataset, "metric": metric, "arms": {}, "speedup": {}}
    for arm, e in evaluations.items():
        last = [seed_rows[-1] for seed_rows in e.values()]
        numeric = [k for k in dict.fromkeys(k for r in last for k in r) if k not in BOOKKEEPING
                   and all(type(_plain(r.get(k))) in (int, float, type(None)) for r in last)]
        total = {k: float(np.mean([r.get(k, 0.0) for r in last]))
                 for k in BOOKKEEPING[3:-1] if any(k in r for r in last)}
        roles = dict.fromkeys(role for r in last for role in r["flops"])
        summary["arms"][arm] = {
            "final": {k: _stat([r[k] for r in last if k in r]) for k in numeric},
            "examples_trained": total.pop("examples_trained"),
            "examples_scored": total.pop("examples_scored"),
            "flops": {k: float(np.mean([r["flops"].get(k, 0.0) for r in last])) for k in roles},
            **total}  # seconds, and setup_seconds where there are any
        every = [r for seed_rows in e.values() for r in seed_rows]
        whole_run = {k: float(np.mean([_float(r[k]) for r in every])) for k in numeric
                     if k.startswith(("picked_", "pool_"))}
        if whole_run:
            summary["arms"][arm]["picked"] = whole_run
    if arms[0] in evaluations:
        target, baseline = _target(_by_step(evaluations[arms[0]]), metric)
        for arm in list(evaluations)[1:]:
            setup = any("setup_seconds" in summary["arms"][a] for a in (arms[0], arm))
            summary["speedup"][arm] = _speedup(evaluations[arm], metric, target, baseline, setup)
    return summary


# ----------------------------------------------------------------------------------- the screen

def _si(x: float) -> str:
    """Three digits and a prefix: 1.23e12 -> '1.23 T'."""
    power = min(max(int(f"{x:.2e}".partition("e")[2]) // 3, 0), 7) if x else 0
    return f"{x / 1000 ** power:.3g} {' kMGTPEZ'[power]}".strip()


def _times(ratio) -> str:
    if not ratio:  # null, or a baseline that spends none of this
        return "n/a"
    return f"{ratio:.3g}x" + (": slower" if ratio < 1 else "")


def _crossed(s: dict) -> bool:
    return s["reached"] == len(s["iterations_per_seed"])


def _speedup_line(arm: str, baseline: str, s: dict) -> str:
    n = len(s["iterations_per_seed"])
    best = f"{baseline}'s best {_float(s['target']):.3f}"
    if not _crossed(s):
        return f"{arm}: {best} never reached by {n - s['reached']} of {n} seeds"
    totals = [f"{k.replace('_', ' ')} {_times(s[k])}" for k in list(s)[2:-2]]
    flops = [_times(ratio) for ratio in s["flops"].values()]
    levels = f" ({' / '.join(s['flops'])})"
    if len(set(flops)) == 1:  # nothing in this script can be amortised
        flops, levels = flops[:1], ""
    totals.append(f"FLOPs {' / '.join(flops)}{levels}")
    return textwrap.fill(f"{arm} reaches {best}; speed-up in {', '.join(totals)}", 98,
                         subsequent_indent="    ")


def table(summary: dict) -> str:
    """The arms in columns, then a sentence each on its speed-up and on what it picked."""
    metric, arms = summary["metric"], summary["arms"]
    setup = any("setup_seconds" in a for a in arms.values())
    lines = [["arm", metric, "examples trained", "scored", "FLOPs", "seconds"] + setup * ["setup"]]
    for arm, a in arms.items():
        m = a["final"][metric]
        lines.append([
            arm, f"{_float(m['mean']):.3f} +- {_float(m['sd']):.3f} ({m['n']})",
            f"{a['examples_trained']:,.0f}", f"{a['examples_scored']:,.0f}",
            _si(total_flops(a["flops"])), f"{a['seconds']:.1f}"]
            + setup * [f"{a.get('setup_seconds', 0.0):.1f}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w for w in widths])
    text = ["  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:]))])
            for name, *cells in lines] + [""]
    name, _, k = metric.partition("@")
    chance = [a["final"][f"chance@{k}"]["mean"] for a in arms.values()
              if name == "recall" and f"chance@{k}" in a["final"]]
    if chance:  # a recall says nothing without it: of ten pairs any ranking has a recall@10 of 1
        text.append(f"a random ranking has a {metric} of {chance[0]:.3f}")
    for arm, s in summary["speedup"].items():
        text.append(_speedup_line(arm, next(iter(arms)), s))
    for arm, a in arms.items():
        mean = a.get("picked", {})  # over the whole run
        picks = [f"{100 * mean[f'picked_{k}']:.0f} % {k} (pool {100 * mean[f'pool_{k}']:.0f} %)"
                 for k in KINDS if f"picked_{k}" in mean and f"pool_{k}" in mean]
        if picks:
            text.append(f"{arm} picked " + ", ".join(picks))
    if any(map(_crossed, summary["speedup"].values())):
        text.append("(the arm's schedule has not decayed where it crosses; the baseline's has)")
    return "\n".join(text).rstrip()


def bill(summary: dict) -> str:
    """FLOPs of each arm by role, and at each level relative to the baseline's, over whole runs."""
    arms = summary["arms"]
    roles = list(dict.fromkeys(role for a in arms.values() for role in a["flops"]))
    base = total_flops(next(iter(arms.values()))["flops"])
    lines = [["FLOPs of a run", *arms], ["-" * 14, *("-" * len(arm) for arm in arms)]]
    lines += [[role, *(_si(a["flops"].get(role, 0.0)) for a in arms.values())] for role in roles]
    if not {*roles} & {*LEVELS["no_amortisation"]}:  # nothing in this script can be amortised
        lines.append(["all / baseline", *(f"{total_flops(a['flops']) / base:.3f}"
                                          for a in arms.values())])
        return _columns(lines)
    lines += [[f"{level} / baseline", *(f"{total_flops(a['flops'], level) / base:.3f}"
                                        for a in arms.values())] for level in LEVELS]
    return _columns(lines)


def conclude(rows, workdir, *, seeds, picks=None, **of):
    """Leaves summary.json, prints the tables, then draws curves.png and, if there are `picks`
    (arguments of `draw_picks`), picks.png.

    Only the seeds of this command are reported (see `of_this_command`). `of`: arguments of
    `summarise`. The rows of the stage 'reference' are no arm's.
    """
    rows = of_this_command([r for r in rows if r["arm"] != "reference"], seeds)
    summary = summarise(rows, **of)
    write_json(os.path.join(workdir, "summary.json"), summary)
    print(table(summary), bill(summary), sep="\n\n", flush=True)
    draw(curves, rows, summary, os.path.join(workdir, "curves.png"))
    if picks:
        draw(draw_picks, rows, path=os.path.join(workdir, "picks.png"), **picks)


def of_this_command(rows, seeds):
    """The rows of these seeds, all of which are trained to the end when a command reports.

    A work directory can hold other seeds, of a command that was stopped. How far they came is not
    what a finished run comes to, so they are left out of every mean, and named.
    """
    others = sorted({r["seed"] for r in rows} - set(seeds))
    if others:
        logging.warning("left out: rows of seeds %s, which are not in --seeds=%s; name them there "
                        "to finish and to report them", ",".join(map(str, others)),
                        ",".join(map(str, seeds)))
    return [r for r in rows if r["seed"] in seeds]


def draw(picture, *args, **kwargs):
    """picture(*args, **kwargs). If it cannot be drawn the run ends well all the same, with a line
    that says why: the numbers are there already."""
    try:
        picture(*args, **kwargs)
    except Exception as e:  # matplotlib, fonts and full disks have many types
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        logging.warning("%s could not be drawn: %s", picture.__name__, why)


def finals(summary: dict, metrics) -> str:
    """The arms in rows, the mean over seeds of each of these metrics at the end; '-' for none."""
    lines = [["arm", *metrics]]
    for arm, a in summary["arms"].items():
        means = [a["final"].get(metric, {}).get("mean") for metric in metrics]
        lines.append([arm, *("-" if m is None else f"{m:.3f}" for m in means)])
    return _columns(lines)


def _columns(lines) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([name.ljust(widths[0]), *(
        c.rjust(w) for c, w in zip(cells, widths[1:]))]) for name, *cells in lines)


# --------------------------------------------------------------------------------- the pictures

def _colour(i: int) -> str:
    return COLOURS[(i - 1) % len(COLOURS)] if i else BASELINE_COLOUR


def _clean(ax):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=11, color="#999999")


def _beside(ax, y: float, text: str):
    """Labels a horizontal line in the right margin, where no curve can run through the words."""
    ax.annotate(text, (1, y), (4, 0), xycoords=("axes fraction", "data"), va="center",
                textcoords="offset points", fontsize=10, color=BASELINE_COLOUR)


def curves(rows, summary: dict, path):
    """curves.png: the metric against four costs; a dot where an arm's seed-mean meets the target.

    The dots are on the mean lines; the speed-ups are per seed, then averaged, so they may differ by
    an evaluation.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from matplotlib.ticker import EngFormatter, MaxNLocator

    metric, arms = summary["metric"], list(summary["arms"])
    target = next((s["target"] for s in summary["speedup"].values()), None)
    panels = {"training steps": "iterations", "examples scored": "examples_scored",
              "FLOPs, nothing amortised": "no_amortisation", "training time [s]": "seconds"}
    fig = Figure(figsize=(14, 4.3), dpi=150)
    axes = fig.subplots(1, len(panels), sharey=True)
    for i, arm in enumerate(arms):
        by_step = _by_step(_evaluations(rows, arm, metric))
        mean = np.array([_mean(seeds, metric) for seeds in by_step])
        sd = np.array([_float(_stat([r[metric] for r in seeds])["sd"]) for seeds in by_step])
        crossed = np.flatnonzero(mean >= _float(target))[:1]
        for ax, what in zip(axes, panels.values()):
            x = np.array([np.mean([_spent(r)[what] for r in seeds]) for seeds in by_step])
            if not x.any():  # spends none of this: a wall at 0 would say nothing
                continue
            ax.fill_between(x, mean - sd, mean + sd, color=_colour(i), alpha=0.22, linewidth=0)
            ax.plot(x, mean, color=_colour(i), linewidth=2.2, label=arm)
            ax.plot(x[crossed], mean[crossed], "o", color=_colour(i), markersize=9,
                    markeredgecolor="white", markeredgewidth=1.5, zorder=4)
    for ax, label in zip(axes, panels):
        ax.set_xlabel(label, fontsize=12)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        _clean(ax)
        if target is not None:
            ax.axhline(target, color=BASELINE_COLOUR, linestyle=":", linewidth=1.4, zorder=1)
    if target is not None:
        _beside(axes[-1], target, f"{arms[0]}'s\nbest {target:.3f}")
    axes[0].set_ylabel(metric.replace("_", " "), fontsize=12)
    n = sorted({a["final"][metric]["n"] for a in summary["arms"].values()})
    n_seeds = f"{n[0]} to {n[-1]}" if len(n) > 1 else f"{n[0]}"
    n_seeds += " seed" if n == [1] else " seeds (mean and sd)"
    title = f"{summary['script']} on {summary['dataset']}, {n_seeds}"
    fig.suptitle(title, x=0.065, y=0.975, ha="left", fontsize=14, parse_math=False)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="upper left", ncols=len(arms),
               bbox_to_anchor=(0.065, 0.905), borderpad=0, borderaxespad=0, frameon=False,
               fontsize=12, handlelength=1.5, columnspacing=1.6)
    fig.subplots_adjust(left=0.065, right=0.92, bottom=0.14, top=0.82, wspace=0.12)
    fig.savefig(path)


def selection_curves(ax, rows, kinds=KINDS):
    """The fraction of each kind among an arm's picks over steps; dashed, that in its whole pool.

    Mean over seeds. A colour per arm (as in `curves` if the rows come in the order of the arms), a
    line style per kind. The pool is a mean over rows: between steps it differs by chance only.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    colours, styles = {}, {}
    for kind, style in zip(kinds, ("-", ":", "-.")):
        for i, arm in enumerate(dict.fromkeys(r["arm"] for r in rows)):
            by_step = _by_step(_evaluations(rows, arm, f"picked_{kind}"))
            if by_step:
                ax.plot([seeds[0]["step"] for seeds in by_step],
                        [_mean(seeds, f"picked_{kind}") for seeds in by_step],
                        color=_colour(i), linestyle=style, linewidth=2)
                colours[arm] = Line2D([], [], color=_colour(i), linewidth=5)
                styles[kind] = Line2D([], [], color="#888888", linestyle=style, linewidth=2)
        pool = [_float(r[f"pool_{kind}"]) for r in rows if f"pool_{kind}" in r]
        if kind in styles and pool:
            ax.axhline(np.mean(pool), color="#888888", linestyle="--", linewidth=1.2, zorder=1)
            _beside(ax, np.mean(pool), f"{kind} in pool")
    _clean(ax)
    ax.set_ylim(0, None)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlabel("training steps", fontsize=12)
    ax.set_ylabel("of the picked examples", fontsize=12)
    keys = {**colours, **styles}
    ax.legend(keys.values(), keys.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=len(keys),
              frameon=False, fontsize=10, handlelength=2.2)


def draw_picks(rows, ids, score_B, pick_S, *, pool, arm, path, columns=12):
    """picks.png: a random dozen of what the arm takes and one of what it leaves, best score first,
    and the fractions of planted examples it picked over time."""
    from matplotlib import figure, gridspec
    fig = figure.Figure(figsize=(14, 6.6), layout="constrained")
    grid = gridspec.GridSpec(4, columns, figure=fig, height_ratios=[1, 1, 0.08, 1.5])
    rng = np.random.default_rng(0)
    left = np.setdiff1d(np.arange(len(ids)), pick_S)
    for r, (title, some) in enumerate((("takes", np.unique(pick_S)), ("leaves", left))):
        some = rng.permutation(some)[:columns]
        some = some[np.argsort(-score_B[some])]
        if not len(some):  # at ratio 1 nothing is left
            continue
        batch = pool.read(ids[some])
        for c, (image, noisy, k) in enumerate(zip(batch["image"], batch["noisy"], some)):
            ax = fig.add_subplot(grid[r, c], xticks=[], yticks=[])
            ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            (donor,) = pool.donor(ids[k:k + 1])
            says = pool.source.describe(donor)
            ax.set_title(f"{score_B[k]:+.2f}", fontsize=9)
            ax.set_xlabel(textwrap.fill(says if len(says) < 34 else says[:31] + "...", 17),
                          fontsize=8, color="#D55E00" if noisy else "black",
                          parse_math=False)  # a caption with two $ in it is not a formula
            for spine in ax.spines.values():
                spine.set(color="#D55E00" if noisy else "black", linewidth=2.5 if noisy else 0.6)
            if c == 0:
                ax.set_ylabel(title, fontsize=12)
    selection_curves(fig.add_subplot(grid[3, :]), rows)
    fig.suptitle(f"What {arm} takes and leaves of one super-batch, after training\n"
                 "above an image its score, below it the label or caption it came with, in orange "
                 "where that is wrong")
    fig.savefig(path, dpi=110)


def draw_clusters(pool, cluster_N, nmi, path, columns=14, most=12):
    """clusters.png: a row of random members for each cluster, the largest first."""
    from matplotlib import figure
    size_K = np.bincount(cluster_N)
    order = np.argsort(-size_K, kind="stable")[:most]
    fig = figure.Figure(figsize=(columns, 1.1 * len(order) + 0.8), layout="constrained")
    axes = fig.subplots(len(order), columns, squeeze=False)
    rng = np.random.default_rng(0)
    for row, j in zip(axes, order):
        some = rng.permutation(pool.ids[cluster_N == j])[:columns]
        images = pool.read(some)["image"] if len(some) else []
        for ax in row:
            ax.set(xticks=[], yticks=[], frame_on=False)
        for ax, image in zip(row, images):
            ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        row[0].set_ylabel(f"{size_K[j]:,}", fontsize=11)
    fig.suptitle(f"{len(size_K)} clusters of {len(cluster_N):,} images, with their sizes; NMI with "
                 f"the labels {nmi:.3f}", fontsize=13)
    fig.savefig(path, dpi=100)
