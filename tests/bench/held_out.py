"""Draws where selection is worth more than training on the reference's part alone.

    python tests/bench/held_out.py picture.png BASELINE_WORKDIR WORKDIR...

The baseline's work directory is of a run with the arm uniform, each other one of a run with the arms
learnability and held_out and its own --held_out_fraction. Drawn is the accuracy at the end against
that part's size, mean and standard deviation over the seeds; of held_out also the best on the way.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import files, pictures, report

LINES = {"learnability": ("learnability", "#0072B2", "-"),
         "held_out": ("the held-out part alone", "#D55E00", "-"),
         "best": ("the same at its best", "#D55E00", ":")}


def ends(workdir, arm, metric="accuracy"):
    """(at the end [seed], at the best evaluation of the mean [seed])."""
    rows = report.of_arm(files.MetricsFile(workdir / "metrics.jsonl").rows(), arm, metric)
    values, _ = report.evaluations(rows, metric)
    return values[:, -1], values[:, np.argmax(report.seed_mean(values))]


def main(picture, baseline, *workdirs):
    figure = Figure(figsize=(7, 4.3), layout="constrained")
    ax = figure.subplots()
    uniform = ends(Path(baseline), "uniform")[0]
    ax.axhline(uniform.mean(), color="#444444", label="uniform, without such a part")
    ax.axhspan(uniform.mean() - uniform.std(ddof=1), uniform.mean() + uniform.std(ddof=1),
               color="#444444", alpha=0.2, linewidth=0)
    points = {}
    for workdir in map(Path, workdirs):
        config = json.loads((workdir / "config.json").read_text())["flags"]
        end, best = ends(workdir, "held_out")
        points[100 * config["held_out_fraction"]] = {
            "learnability": ends(workdir, "learnability")[0], "held_out": end, "best": best}
    parts = sorted(points)
    for key, (label, colour, line) in LINES.items():
        x = np.stack([points[part][key] for part in parts], 1)
        ax.plot(parts, x.mean(0), marker="o", linestyle=line, color=colour, label=label)
        if key != "best":
            ax.fill_between(parts, x.mean(0) - x.std(0, ddof=1), x.mean(0) + x.std(0, ddof=1),
                            color=colour, alpha=0.2, linewidth=0)
        for part, column in zip(parts, x.T):
            print(f"{part:g} %: {key} {column.mean():.3f} +- {column.std(ddof=1):.3f}")
    print(f"uniform {uniform.mean():.3f} +- {uniform.std(ddof=1):.3f}")
    pictures.style(ax, "part of the training set that is held out with clean labels [%]",
                   "test accuracy")
    ax.set_xscale("log")
    ax.set_xticks(parts, [f"{part:g}" for part in parts])
    ax.minorticks_off()
    ax.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
