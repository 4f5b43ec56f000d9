"""Draws where selection is worth more than training on the reference's part alone.

    cd docs/logs && python ../../tests/bench/held_out.py ../held_out.png \\
        rho_fashion_mnist_headline.jsonl rho_fashion_mnist_held_out_*.jsonl

The first log has the arm uniform, each other one the arms learnability and held_out of one
--held_out_fraction, which is the last part of its name. Drawn is the accuracy at the end, mean and
standard deviation over the seeds.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import files, pictures, report

LINES = {"learnability": ("learnability", pictures.COLOURS[1]),
         "held_out": ("the held-out part alone", pictures.COLOURS[2])}


def ends(log, arm, metric="accuracy"):
    """The metric at the end, [seed]."""
    rows = report.of_arm(files.MetricsFile(log).rows(), arm, metric)
    return report.evaluations(rows, metric)[0][:, -1]


def main(picture, baseline, *logs):
    figure = Figure(figsize=(7, 4.3), layout="constrained")
    ax = figure.subplots()
    logs = {100 * float(Path(log).stem.split("_")[-1]): log for log in logs}
    parts = sorted(logs)
    uniform = ends(baseline, "uniform")
    mean, sd = uniform.mean(), uniform.std(ddof=1)
    print(f"uniform: {mean:.3f} +- {sd:.3f}")
    ax.axhline(mean, color=pictures.COLOURS[0], label="uniform, without such a part")
    ax.axhspan(mean - sd, mean + sd, color=pictures.COLOURS[0], alpha=0.2, linewidth=0)
    for arm, (label, colour) in LINES.items():
        values = np.stack([ends(logs[part], arm) for part in parts], 1)
        mean, sd = values.mean(0), values.std(0, ddof=1)
        ax.plot(parts, mean, "o-", color=colour, label=label)
        ax.fill_between(parts, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
        for row in zip(parts, mean, sd, values.T, values.T - uniform):
            print("{:g} %: {} {:.3f} +- {:.3f}".format(row[0], label, *row[1:3]),
                  "by seed", row[3].round(3), "above uniform by", row[4].round(3))
    pictures.style(ax, "part of the training set that is held out with clean labels [%]",
                   "test accuracy")
    ax.set_xscale("log")
    ax.set_xticks(parts, [f"{part:g}" for part in parts])
    ax.minorticks_off()
    ax.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
