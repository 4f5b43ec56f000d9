"""curves.png, picks.png and clusters.png, drawn without a display."""

import itertools
import textwrap

from absl import logging
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
import numpy as np

COLOURS = ("#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DOT = {"marker": "o", "linestyle": "", "markersize": 9, "markeredgecolor": "white"}
WRONG = "#D55E00"  # a picked image whose label or caption is wrong


def draw(picture, path, *args, **kwargs):
    """picture(*args, **kwargs) is drawn into the file `path`. If that fails, the run ends well all
    the same, with a line that says why: its numbers are there already."""
    try:
        picture(*args, **kwargs).savefig(path, dpi=110)
    except Exception as e:  # matplotlib, fonts and full disks have many types
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        logging.warning("%s could not be drawn: %s", path, why)


def style(ax, xlabel, ylabel=""):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))


def curves(tracks, metric, title):
    """The metric against four costs: the mean over the seeds, and a band of one sd.

    tracks: {arm: `report.track`}, the baseline first. The dotted line is the baseline's best. Dots
    mark where an arm's mean reaches it, and where the baseline's mean is first within one sd of it.
    Speed-ups are computed seed by seed, so they may differ from the dots by an evaluation.
    """
    baseline, track = next(iter(tracks.items()))
    best = np.nanargmax(track["mean"])
    target, near = track["mean"][best], track["mean"][best] - track["sd"][best]
    figure = Figure(figsize=(14, 4.3), layout="constrained")
    panels = {"training steps": "iterations", "examples scored": "examples_scored",
              "FLOPs, all charged": "no_amortisation", "training time [s]": "seconds"}
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (label, total) in zip(axes, panels.items()):
        for (arm, track), colour in zip(tracks.items(), itertools.cycle(COLOURS)):
            x, mean, sd = track[total], track["mean"], track["sd"]
            dot = np.flatnonzero(mean >= (near if arm == baseline else target))[:1]
            ax.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
            ax.plot(x, mean, ".-", color=colour, linewidth=2, label=arm)
            ax.plot(x[dot], mean[dot], color=colour, zorder=4, **DOT)
        ax.axhline(target, color=COLOURS[0], linestyle=":", label=f"{baseline}'s best {target:.3f}")
        style(ax, label)
    axes[0].set_ylabel(metric.replace("_", " "))
    figure.suptitle(title, parse_math=False)
    handles, _ = axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=COLOURS[0], label=f"reached ({baseline}: within one sd)",
                          **DOT))
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=len(handles))
    return figure


def image_row(axes, images, label):
    """Images side by side, in axes of which there may be more."""
    for ax in axes:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for ax, image in zip(axes, images):
        ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    axes[0].set_ylabel(label, fontsize=11)


def picks(tracks, average, *, pool, arm, ids, score_B, pick_S, n_images=12):
    """Random examples of what an arm takes of a super-batch and of what it leaves, best score
    first; below, the share of noisy, duplicate and hopeless ones among what is picked, over time.

    tracks: {"noisy": {arm: `report.track`}, ...}. average["pool_noisy"], the dashed line, is the
    share in the arm's pool. pool: reads the examples `ids` [B]. score_B: their scores. pick_S:
    indices of those that were picked.
    """
    figure = Figure(figsize=(14, 8.2 if tracks else 5.2), layout="constrained")
    figure.get_layout_engine().set(hspace=0.1)
    above, below = figure, None
    if tracks:  # of the pool it is known what is noisy, duplicate or hopeless
        above, below = figure.subfigures(2, 1, height_ratios=[1.7, 1])
    rng = np.random.default_rng(0)
    left = np.setdiff1d(np.arange(len(ids)), pick_S)
    for axes, (title, which) in zip(above.subplots(2, n_images),
                                    (("takes", np.unique(pick_S)), ("leaves", left))):
        which = rng.permutation(which)[:n_images]
        which = which[np.argsort(-score_B[which])]
        batch, texts = {"image": (), "noisy": ()}, ()
        if len(which):
            batch, texts = pool.read(ids[which]), pool.source.describe(pool.donor(ids[which]))
        image_row(axes, batch["image"], title)
        for ax, i, wrong, text in zip(axes, which, batch["noisy"], texts):
            ax.set_title(f"{score_B[i]:+.2f}", fontsize=9)
            ax.set_xlabel(textwrap.fill(text, 19, max_lines=5, placeholder=" ..."),
                          color=WRONG if wrong else "black", fontsize=7, parse_math=False)
    axes = below.subplots(1, len(tracks), squeeze=False)[0] if tracks else ()
    for ax, kind in zip(axes, tracks):
        for (name, track), colour in zip(tracks[kind].items(), itertools.cycle(COLOURS)):
            ax.plot(track["iterations"], track["mean"], ".-", color=colour, label=name)
        ax.axhline(average[f"pool_{kind}"], color="#888888", linestyle="--", label="in the pool")
        style(ax, "training steps", f"{kind}, of what is picked")
        ax.set_ylim(0, 1.05 * ax.dataLim.ymax)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if tracks:
        axes[0].legend(frameon=False)
    above.suptitle(f"What {arm} takes and leaves of one super-batch, after training\n"
                    "above an image its score, below it the label or caption it came with, in "
                    "orange where that is wrong")
    return figure


def clusters(pool, cluster_N, nmi, n_images=14, n_rows=12):
    """A row of random members for each cluster, the largest first."""
    size_K = np.bincount(cluster_N)
    order = np.argsort(-size_K, kind="stable")[:n_rows]
    figure = Figure(figsize=(n_images, 1.1 * len(order) + 0.8), layout="constrained")
    rng = np.random.default_rng(0)
    for axes, j in zip(figure.subplots(len(order), n_images, squeeze=False), order):
        some = rng.permutation(pool.ids[cluster_N == j])[:n_images]
        image_row(axes, pool.read(some)["image"] if len(some) else (), f"{size_K[j]:,}")
    figure.suptitle(f"{len(size_K)} clusters of {len(cluster_N):,} images, with their sizes; NMI "
                    f"with the labels {nmi:.3f}", fontsize=13)
    return figure
