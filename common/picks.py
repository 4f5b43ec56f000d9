"""What was taken: how often each example was offered to an arm, and how often it was picked."""

import csv
import io

import numpy as np

from common import data, files


class Counts:
    """Counts over the examples of a pool, while an arm selects from super-batches of size n."""

    def __init__(self, pool, seed, n):
        self.pool, self.seed, self.n = pool, seed, n
        # saved in the arm's checkpoints
        self.arrays = {k: np.zeros(len(pool), np.int32) for k in ("offered", "taken")}
        self.noisy = pool.noisy if pool.noise else np.zeros(len(pool), bool)

    def add(self, step, pick_S):
        """Step `step` picked the examples `pick_S` (indices) of its super-batch."""
        ids = data.batch_ids(self.pool.ids, self.seed, step, self.n)
        for name, some in (("offered", ids), ("taken", ids[pick_S])):
            np.add.at(self.arrays[name], np.searchsorted(self.pool.ids, some), 1)

    def metrics(self):
        """{'noise_auc': ...}, where noise is planted."""
        area = noise_auc(self.arrays["offered"], self.arrays["taken"], self.noisy)
        return {} if area is None else {"noise_auc": area}

    def rows(self):
        """(id, offered, taken, the label's name or the caption that it came with) of each."""
        return zip(self.pool.ids, self.arrays["offered"], self.arrays["taken"],
                   self.pool.source.describe(self.pool.donor(self.pool.ids)))


def noise_auc(offered, taken, noisy):
    """How well "seldom taken when offered" finds noisy examples: the area under the ROC curve.

    It is the probability that a noisy example was taken less often, per offer, than a clean one. A
    tie counts half. Arrays [n]; examples that were never offered are left out. Returns None if no
    noisy or no clean example is left.
    """
    seen = offered > 0
    rate, noisy = taken[seen] / offered[seen], noisy[seen].astype(bool)
    if noisy.all() or not noisy.any():
        return None
    clean = np.sort(rate[~noisy])
    fewer = np.searchsorted(clean, rate[noisy], "left")  # how many clean ones were taken less often
    no_more = np.searchsorted(clean, rate[noisy], "right")  # less often, or as often
    return float(1 - (fewer + no_more).mean() / 2 / len(clean))


def write(path, counts):
    """picks.csv: a row an example, arm and seed. counts: {(arm, seed): Counts}."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(("arm", "seed", "id", "offered", "taken", "text"))
    for (arm, seed), of in counts.items():
        writer.writerows((arm, seed, *row) for row in of.rows())
    files.replace(path, lines.getvalue().encode())
