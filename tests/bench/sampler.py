"""The sampler of jest.py by itself: its speed and memory against the dense form.

    python tests/bench/sampler.py --sizes=1024,4096,16384

It times both forms in turns, on random embeddings of two models. It prints medians, their ratio and
the memory that each program asks for beyond its arguments (XLA's own count). What its sub-batches
are worth is measured by tests/bench/chunks.py. Not a test: nothing is asserted.
"""

import os
import statistics
import sys
import time

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

import jest


def sides(key, B, E):
    """Learner and reference on B random pairs whose texts are near their images."""
    def side(key):
        key_image, key_text = jax.random.split(key)
        image = jax.random.normal(key_image, (B, E))
        text = image + jax.random.normal(key_text, (B, E))
        return {"image": jest.unit(image), "text": jest.unit(text), "log_t": jnp.log(10.0),
                "b": jnp.array(-10.0)}
    return dict(zip(("learner", "reference"), map(side, jax.random.split(key))))


def speed(sizes, *, filter_ratio, n_chunks, embed, rounds):
    print(f"{'B':>7} {'b':>6} {'dense s':>9} {'streaming s':>11} {'ratio':>6} "
          f"{'dense MiB':>10} {'streaming MiB':>13}")
    for B in sizes:
        b = round(B * (1 - filter_ratio))
        args = jax.random.key(1), sides(jax.random.key(0), B, embed)
        programs = {
            "dense": lambda key, models: jest.jointly_sample_dense(
                key, jest.score_matrix("learnability", models), b, n_chunks),
            "streaming": lambda key, models: jest.jointly_sample(key, models, b, n_chunks)}
        compiled = {k: jax.jit(f).lower(*args).compile() for k, f in programs.items()}
        picks = {k: np.asarray(f(*args)) for k, f in compiled.items()}
        seconds = {k: [] for k in compiled}
        for _ in range(rounds):
            for k, f in compiled.items():
                begin = time.perf_counter()
                jax.block_until_ready(f(*args))
                seconds[k].append(time.perf_counter() - begin)
        median = {k: statistics.median(s) for k, s in seconds.items()}
        mib = {k: f.memory_analysis().temp_size_in_bytes / 2**20 for k, f in compiled.items()}
        same = (picks["dense"] == picks["streaming"]).mean()
        print(f"{B:7} {b:6} {median['dense']:9.3f} {median['streaming']:11.3f} "
              f"{median['dense'] / median['streaming']:6.1f} {mib['dense']:10.0f} "
              f"{mib['streaming']:13.0f}   same picks: {100 * same:.2f} %", flush=True)


def main(_):
    f = flags.FLAGS
    speed([int(s) for s in f.sizes], filter_ratio=f.f, n_chunks=f.chunks, embed=f.width,
          rounds=f.rounds)


if __name__ == "__main__":
    flags.DEFINE_list("sizes", "1024,4096,16384", "super-batch sizes")
    flags.DEFINE_float("f", 0.8, "filtering ratio")
    flags.DEFINE_integer("chunks", 16, "n_chunks")
    flags.DEFINE_integer("width", 64, "embedding width")
    flags.DEFINE_integer("rounds", 5, "timings of each")
    app.run(main)
