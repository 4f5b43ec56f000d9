"""How good the sub-batches of jest.py's sampler are: the chunk curve and the filter curve (fig. 2).

    python jest.py --arms=jest --seeds=0,1,2 --workdir=runs/jest_alone     (trains the two models)
    python tests/bench/chunks.py --arms=jest --seeds=0,1,2 --workdir=runs/jest_alone

Takes the flags of the run whose checkpoints it reads. The score of a sub-batch T is the sum of S
over its pairs, divided by its size: the learner's loss minus the reference's. For each gain it is
given relative to a uniform sub-batch (0) and to the plateau of a Gibbs sampler of the same
distribution (1), and again with one chunk as the 0. The sampler starts from the joint draw with the
most chunks. The two halves of the second half of its sweeps are compared, to see whether it has
settled. It also says how many picks float64 would have drawn differently. The mean and the
deviation are over the seeds. Not a test: nothing is asserted.
"""

import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

import jax
import jax.numpy as jnp
import numpy as np

from common import data, flags, train
import jest
sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import slow_jest

CHUNKS, RATIOS, GAINS = (1, 2, 4, 8, 16, 32), (0.5, 0.8, 0.9), (1.0, 10.0, 100.0)


def first_uniform(key, gain, learner, reference, n_select, n_chunks):
    """`jest.jointly_sample` with a first chunk that is drawn uniformly: Algorithm 1 of the paper's
    print, read as code."""
    models = {"learner": learner, "reference": reference}
    self_N = jest.self_score("learnability", models, "sigmoid")

    def add_chunk(_, sum_N, chunk):
        sum_N = self_N if sum_N is None else sum_N
        for name, sign in jest.SCORES["learnability"].items():
            loss = lambda logits_C: jax.nn.softplus(logits_C + models[name]["b"]).sum()
            sum_N += sign * sum(jest.over_chunk(loss, models[name], chunk[name], 2048))
        return sum_N, sum_N
    return jest.draw_in_chunks(key, models, n_select, n_chunks, jnp.zeros_like(self_N), add_chunk,
                               score_gain=gain, axis=None)


def main():
    config = flags.resolve(jest.PRESETS)
    b = config.sub_batch
    noise = flags.planted(config, "caption_noise", jest.TOY_NOISE["caption_noise"])
    encode, vocab = data.tokenizer(config.tokenizer)
    source, _ = data.open_splits(config, encode, context=config.context, need=("caption",),
                                 toy_image_size=jest.TOY["image_size"])
    model = jest.build_model(config, "model", source, vocab)
    embed = jax.jit(jest.embed, static_argnums=2)
    sample = {"self": jax.jit(lambda key, gain, learner, reference, n_chunks: jest.jointly_sample(
        key, {"learner": learner, "reference": reference}, b, n_chunks, score_gain=gain),
                              static_argnums=4),
              "uniform": jax.jit(lambda key, gain, learner, reference, n_chunks: first_uniform(
        key, gain, learner, reference, b, n_chunks), static_argnums=4)}
    results = {}
    for seed in config.seeds:
        both = [train.Checkpoints(os.path.join(config.workdir, "checkpoints", f"{name}-{seed}"))
                .read()[0]["learner"]["params"] for name in ("jest", "reference")]
        whole = data.Pool(source, noise=noise, field="tokens", seed=seed)
        rest = whole.subset(data.split(whole.ids, config.curated_fraction, seed)[1])
        largest = round(b / (1 - max(RATIOS)))
        batch = rest.read(np.random.default_rng(seed).permutation(rest.ids)[:largest])
        models = [jax.device_get(embed(params, batch, model)) for params in both]
        rng = np.random.default_rng(seed)
        for f in RATIOS:
            B = round(b / (1 - f))
            cut = [{k: v[:B] if v.ndim else v for k, v in m.items()} for m in models]
            S = slow_jest.score_matrix("learnability", *cut)
            score = lambda picks: S[np.ix_(picks, picks)].sum() / len(picks)
            uniform = np.mean([score(rng.permutation(B)[:b]) for _ in range(20)])
            results.setdefault(("uniform", f), []).append(uniform)
            for gain in GAINS:
                for first in ("self", "uniform"):
                    for n_chunks in CHUNKS:
                        picks = [np.asarray(sample[first](jax.random.key(k), gain, *cut, n_chunks))
                                 for k in range(config.draws)]
                        results.setdefault((gain, f, first, n_chunks), []).append(
                            np.mean([score(p) for p in picks]))
                _, sweeps = slow_jest.gibbs(rng, "learnability", *cut, picks[0], config.sweeps,
                                            gain)
                _, _, third, fourth = (np.mean(part) / b for part in np.array_split(sweeps, 4))
                results.setdefault((gain, f, "gibbs"), []).append(fourth)
                results.setdefault((gain, f, "drift"), []).append(fourth - third)
            if f == 0.8:
                results.setdefault("differ", []).append(
                    differing(cut, S, b, config.draws))
    show(results, config)


def differing(models, S, n_select, draws, n_chunks=16, gain=100.0):
    """Mean number of picks in which float32 and float64 differ, by the same noise."""
    counts = []
    for k in range(draws):
        key = jax.random.key(k)
        noise = [np.float64(jax.random.gumbel(jax.random.fold_in(key, c), (len(S),)))
                 for c in range(n_chunks)]
        slow = slow_jest.sample_chunks(
            noise, slow_jest.quotas(n_select, n_chunks),
            lambda T: gain * (np.diag(S) + S[:, T].sum(1) + S[T].sum(0)))
        got = jest.jointly_sample(key, dict(zip(("learner", "reference"), models)), n_select,
                                  n_chunks, score_gain=gain)
        counts.append(n_select - len(set(slow) & set(got.tolist())))
    return np.mean(counts)


def show(results, config):
    stat = lambda v: f"{np.mean(v):6.2f} +- {np.std(v, ddof=1) if len(v) > 1 else 0:.2f}"
    print(f"b = {config.sub_batch}, {len(config.seeds)} seeds, {config.draws} draws each, "
          f"{config.sweeps} Gibbs sweeps")
    print(f"picks that differ from float64's at f = 0.8, 16 chunks, gain 100: "
          f"{stat(results['differ'])} of {config.sub_batch}")
    print("\nfilter curve, 16 chunks: score above a uniform sub-batch's, f = 0.5 being 1")
    for gain in GAINS:
        for first in ("self", "uniform"):
            rise = {f: np.array(results[gain, f, first, 16]) - results["uniform", f]
                    for f in RATIOS}
            print(f"  gain {gain:5g}, first chunk {first:8}", "  ".join(
                f"{f}: {stat(rise[f] / rise[0.5])}" for f in RATIOS))
    for f in RATIOS:
        zero = np.array(results["uniform", f])
        for gain in GAINS:
            plateau = np.array(results[gain, f, "gibbs"])
            print(f"\nf = {f}, gain {gain:g}: score of a uniform sub-batch {stat(zero)}, plateau "
                  f"{stat(plateau)}, of which the last quarter of the sweeps moved "
                  f"{stat(results[gain, f, 'drift'])}")
            for first in ("self", "uniform"):
                curve = {n: np.array(results[gain, f, first, n]) for n in CHUNKS}
                for name, base in (("uniform", zero), ("one chunk", curve[1])):
                    if name == "one chunk" and first == "uniform":
                        continue  # one uniform chunk is a uniform sub-batch
                    print(f"  first chunk {first:8} 0 = {name:10}", "  ".join(
                        f"{n}: {stat((curve[n] - base) / (plateau - base))}" for n in CHUNKS))


if __name__ == "__main__":
    jest.define_flags()
    f = flags.Group("This measurement")
    f.integer("sub_batch", 256, "[1, inf)", "b")
    f.integer("draws", 4, "[1, inf)", "sub-batches that are drawn and averaged, in each setting")
    f.integer("sweeps", 40, "[4, inf)", "of the Gibbs sampler")
    flags.run(main)
