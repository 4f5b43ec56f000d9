"""k-means of dnc.py against scikit-learn: time and inertia from the same first centres, in turns.

    pip install scikit-learn            (for this script only)
    python tests/bench/kmeans.py --points=50000 --width=128 --clusters=10
    python tests/bench/kmeans.py --points=1000000 --width=2048 --clusters=1000 --nosklearn   (on a GPU)

Both run Lloyd's iterations on the same points, a mixture of Gaussians, L2-normalised as dnc.py's
are, at most so many; both stop where nothing moves any more.
The figures are medians, of which only the ratios mean anything. Not a test: nothing is asserted.
"""

import os
import statistics
import sys
import time
import warnings

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from absl import app, flags
import jax
import numpy as np

import dnc


def points(key, n, width, modes):
    """A mixture as wide as its modes are apart, on the sphere."""
    key_mode, key_which, key_noise = jax.random.split(key, 3)
    mode = jax.random.normal(key_mode, (modes, width))
    x = mode[jax.random.randint(key_which, (n,), 0, modes)]
    return dnc.unit(x + jax.random.normal(key_noise, (n, width)))


def main(_):
    F = flags.FLAGS
    x = jax.jit(points, static_argnums=(1, 2, 3))(jax.random.key(0), F.points, F.width, F.clusters)
    start = np.asarray(dnc.kmeans_plus_plus(
        jax.random.uniform(jax.random.key(1), (F.clusters, dnc.n_candidates(F.clusters))), x))

    def ours(x, centres):
        centres = dnc.lloyd(x, centres, F.iterations, F.tile)
        return centres, dnc.nearest(x, centres, F.tile)[1].sum()
    program = jax.jit(ours).lower(x, start).compile()
    runs = {"dnc.py": lambda: float(program(x, start)[1])}
    if F.sklearn:
        from sklearn.cluster import KMeans
        host = np.asarray(x)
        warnings.filterwarnings("ignore", message=".*converge")
        # tol 0: as many iterations, unless no point moves any more
        fit = lambda: KMeans(F.clusters, init=start, n_init=1, max_iter=F.iterations, tol=0,
                             algorithm="lloyd").fit(host)
        used = fit().n_iter_
        runs["scikit-learn"] = lambda: fit().inertia_
    inertia = {name: run() for name, run in runs.items()}  # the first warms up
    seconds = {name: [] for name in runs}
    for _ in range(F.rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    mib = program.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{F.points:,} x {F.width} into {F.clusters}, {F.iterations} iterations at most, "
          f"{jax.devices()[0].device_kind}; beyond its arguments dnc.py asks for {mib:,.0f} MiB")
    flops = dnc.kmeans_flops(F.points, 0, F.clusters, F.width, 1, F.iterations)
    for name in runs:
        t = statistics.median(seconds[name])
        print(f"{name:14}{t:10.4f} s{flops / t / 1e9:12.1f} GFLOP/s if all iterations ran   "
              f"inertia {inertia[name]:.6g}")
    if F.sklearn:
        a, b = inertia.values()
        ratio = statistics.median(seconds["scikit-learn"]) / statistics.median(seconds["dnc.py"])
        print(f"inertia differs by {abs(a - b) / b:.1e}; scikit-learn takes {ratio:.2f} times as "
              f"long for {used} iterations")


if __name__ == "__main__":
    flags.DEFINE_integer("points", 50_000, "N")
    flags.DEFINE_integer("width", 128, "D")
    flags.DEFINE_integer("clusters", 10, "K")
    flags.DEFINE_integer("iterations", 20, "of Lloyd")
    flags.DEFINE_integer("tile", 4096, "rows at a time")
    flags.DEFINE_integer("rounds", 5, "timings of each")
    flags.DEFINE_bool("sklearn", True, "time scikit-learn too")
    app.run(main)
