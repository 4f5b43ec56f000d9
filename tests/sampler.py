"""The sampler of jest.py by itself: its speed against the dense form, and what chunks are worth.

    python tests/sampler.py --sizes=1024,4096,16384
    python tests/sampler.py --workdir=runs/jest --arm=jest     (of a finished run of jest.py)

The first times both forms in turns, on random embeddings of two models, and prints medians, their
ratio and the memory that each program asks for beyond its arguments (XLA's own count). The second
takes the scores of that run's learner and reference, after training, and prints batch learnability
by number of chunks, beside the paper's Fig. 2 and the plateau of a single-site Gibbs sampler, and by
filtering ratio.
"""

import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from common import checkpoint, data, run
import jest
import slow_jest

# gain in batch learnability, read off the paper's Fig. 2: 1 chunk is 0 and 32 are 1; f of .5 is 1
PAPER_CHUNKS = {1: 0, 2: .69, 4: .885, 8: .96, 16: .99, 32: 1}
PAPER_FILTER = {0: 0, .5: 1, .8: 1.12, .9: 1.15}


def sides(key, B, E):
    """Learner and reference on B random pairs whose texts are near their images."""
    def side(key):
        key_image, key_text = jax.random.split(key)
        image = jax.random.normal(key_image, (B, E))
        text = image + jax.random.normal(key_text, (B, E))
        return {"image": jest.unit(image), "text": jest.unit(text), "log_t": jnp.log(10.0),
                "b": jnp.array(-10.0)}
    return tuple(map(side, jax.random.split(key)))


def speed(sizes, *, filter_ratio, n_chunks, embed, rounds):
    print(f"{'B':>7} {'b':>6} {'dense s':>9} {'streaming s':>11} {'ratio':>6} "
          f"{'dense MiB':>10} {'streaming MiB':>13}")
    for B in sizes:
        b = round(B * (1 - filter_ratio))
        args = jax.random.key(1), *sides(jax.random.key(0), B, embed)
        programs = {
            "dense": lambda key, learner, reference: jest.jointly_sample_dense(
                key, jest.score_matrix("learnability", learner, reference), b, n_chunks),
            "streaming": lambda key, learner, reference: jest.jointly_sample(
                key, learner, reference, b, n_chunks)}
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


def scores(workdir, arm, seed, n):
    """S [n, n] of n pairs of a run's pool, by its learner and reference as they ended."""
    config = run.Namespace(json.load(open(os.path.join(workdir, "config.json")))["flags"])
    encode, vocab = data.tokenizer(config.tokenizer)
    source = data.open_source(
        config.dataset, config.split, data_dir=config.data_dir, image_size=config.image_size,
        context=config.context, encode=encode, toy_knobs=run.toy_knobs(config))
    pool = data.Pool(source, noise=config.caption_noise, field="tokens", seed=seed)
    pool = pool.subset(data.split(pool.ids, config.curated_fraction, seed)[1])
    batch = pool.read(data.batch_ids(pool.ids, seed, 10**6, n))
    sides, given = [], config.reference.format(seed=seed)
    for size, where in ((config.model, f"{workdir}/checkpoints/{arm}-{seed}"),
                        (config.reference_model or config.model, given if given != "curated" else
                         f"{workdir}/checkpoints/reference-{seed}")):
        model = jest.build_model(config, size, source, vocab)
        like = jax.eval_shape(lambda model=model: jest.init(jax.random.key(0), model))
        params = checkpoint.restore_params(where, like, "workdir")[0]
        embed = jax.jit(lambda params, batch, model=model: jest.embed(params, batch, model))
        parts = [embed(params, {k: batch[k][i:i + 128] for k in ("image", "tokens")})
                 for i in range(0, n, 128)]
        sides.append({k: np.concatenate([p[k] for p in parts]) if k in ("image", "text")
                      else parts[0][k] for k in parts[0]})
    return sides, np.float64(jest.score_matrix("learnability", *sides))


def gibbs(S_BB, b, rng, sweeps=20):
    """Mean score of a sub-batch, per row, once a single-site Gibbs sampler has settled."""
    T, values = list(rng.permutation(len(S_BB))[:b]), []
    for i in range(2 * sweeps * b):
        T = slow_jest.gibbs_step(S_BB, T, T[rng.integers(b)], rng.gumbel(size=len(S_BB)))
        if i >= sweeps * b and i % b == 0:
            values.append(S_BB[np.ix_(T, T)].sum() / b)
    return np.mean(values)


def curves(workdir, arm, seed, b, rounds):
    sides, S_BB = scores(workdir, arm, seed, 10 * b)

    def joint(B, n_chunks):
        side = [{k: v[:B] if k in ("image", "text") else v for k, v in s.items()} for s in sides]
        draw = jax.jit(lambda key, *s: jest.jointly_sample(key, *s, b, n_chunks))
        picks = [np.asarray(draw(jax.random.key(r), *side)) for r in range(rounds)]
        return np.mean([S_BB[np.ix_(T, T)].sum() / b for T in picks])
    B, rng = 5 * b, np.random.default_rng(0)
    value = {n: joint(B, n) for n in PAPER_CHUNKS if n <= b}
    plateau = gibbs(S_BB[:B, :B], b, rng)
    uniform = np.mean([S_BB[np.ix_(T, T)].sum() / b for T in (
        rng.permutation(B)[:b] for _ in range(10 * rounds))])
    print(f"{arm} seed {seed} of {workdir}, b = {b}, mean of {rounds} draws. Batch learnability at "
          f"f = 0.8: uniform {uniform:.3f}, Gibbs {plateau:.3f}")
    gain = lambda x, zero, one: (x - zero) / (one - zero)
    print(f"{'chunks':>7} {'value':>8} {'1..32':>6} {'paper':>6} {'of Gibbs, from uniform':>23}")
    for n, v in value.items():
        print(f"{n:7} {v:8.3f} {gain(v, value[1], value[32]):6.2f} {PAPER_CHUNKS[n]:6} "
              f"{gain(v, uniform, plateau):23.2f}")
    by_filter = {f: joint(round(b / (1 - f)), 16) for f in PAPER_FILTER}
    print(f"{'f':>7} {'value':>8} {'0...5':>6} {'paper':>6}")
    for f, v in by_filter.items():
        print(f"{f:7} {v:8.3f} {gain(v, by_filter[0], by_filter[.5]):6.2f} {PAPER_FILTER[f]:6}")


def main(_):
    f = flags.FLAGS
    if f.workdir:
        curves(f.workdir, f.arm, f.seed, f.batch_size, f.rounds)
    else:
        speed([int(s) for s in f.sizes], filter_ratio=f.f, n_chunks=f.chunks, embed=f.width,
              rounds=f.rounds)


if __name__ == "__main__":
    flags.DEFINE_list("sizes", "1024,4096,16384", "super-batch sizes")
    flags.DEFINE_float("f", 0.8, "filtering ratio")
    flags.DEFINE_integer("chunks", 16, "n_chunks")
    flags.DEFINE_integer("width", 64, "embedding width")
    flags.DEFINE_integer("rounds", 5, "timings or draws of each")
    flags.DEFINE_string("workdir", None, "a finished run, for the curves")
    flags.DEFINE_string("arm", "jest", "its arm")
    flags.DEFINE_integer("seed", 0, "its seed")
    flags.DEFINE_integer("batch_size", 128, "b of the curves")
    app.run(main)
