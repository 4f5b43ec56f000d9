"""Seconds per step against the bill, and what the input costs: `python tests/bench/timing.py [flags]`.

Takes the flags of rho_learnability.py (not its work directory). Every quantity is timed in turns
with the others in one process, so that a noisy machine is noisy for all alike; the figures are
medians, and only their ratios mean anything. Not a test: nothing is asserted.
"""

import itertools
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

import jax
import numpy as np

from common import data, devices, flags
import rho_learnability as rho


def main():
    config = flags.resolve(rho.PRESETS)
    text = config.task == "image_text"
    encode, vocab = data.tokenizer(config.tokenizer)
    source, _ = data.open_splits(config, encode, context=config.context * text,
                                 need=("caption" if text else "label",),
                                 toy_image_size=rho.TOY["image_size"])
    learner, proxy = rho.build_models(config, source, vocab)
    noise = "caption_noise" if text else "label_noise"
    pool = data.Pool(source, noise=flags.planted(config, noise, rho.TOY_NOISE[noise]),
                     field="tokens" if text else "label")
    b, B = config.batch_size, round(config.ratio * config.batch_size)
    key, fields = jax.random.key(0), ("image", "tokens" if text else "label")
    for _ in data.sweep(pool, b):  # decode all once: the steady state
        pass

    cases = {}
    for name, arm, reference, resident in (
            ("uniform", "uniform", None, False), ("uniform, resident", "uniform", None, True),
            ("learnability, cached", "learnability", "cached", False),
            ("learnability, cached, resident", "learnability", "cached", True),
            ("learnability, computed", "learnability", "computed", False),
            ("rho_loss, cached", "rho_loss", "cached", False)):
        made = rho.make_arm(arm, flags.Namespace(config, steps=10**6), learner, proxy)
        step = made.step
        state = rho.initial_state(arm, key, learner, proxy, made.optimisers,
                                  reference_scores=reference, params=rho.init(key, proxy))
        n = b if arm == "uniform" else B

        def load(n=n, reference=reference):
            for batch in data.batches(pool, seed=0, batch_size=n, start=0, stop=10**6):
                batch = {k: batch[k] for k in fields}
                if reference == "cached":
                    batch["reference_loss"] = np.zeros(n, np.float32)
                yield devices.shard(batch)
        batches = load()
        if resident:
            batches = itertools.repeat(next(batches))
        bill = rho.step_flops(arm, b, n, rho.forward_flops(learner),
                              rho.forward_flops(proxy), reference)
        cases[name] = dict(step=step, state=state, batches=batches, bill=sum(bill.values()), t=[])
    for turn, (name, case) in itertools.product(range(config.steps // 10), cases.items()):
        begin = time.perf_counter()
        for i in range(10):
            case["state"], metrics = case["step"](
                case["state"], np.int32(10 * turn + i), key, next(case["batches"]))
        jax.block_until_ready(metrics)
        if turn:  # the first compiles
            case["t"].append((time.perf_counter() - begin) / 10)

    base = statistics.median(cases["uniform"]["t"])
    peak = cases["uniform"]["bill"]
    print(f"{learner.image.size} scored by {proxy.image.size}, b = {b}, B = {B}, "
          f"{jax.device_count()} x {jax.devices()[0].device_kind}, {config.dataset}")
    print(f"{'':32}{'s/step':>9}{'time ratio':>12}{'bill ratio':>12}{'GFLOP/s':>10}")
    for name, case in cases.items():
        t = statistics.median(case["t"])
        print(f"{name:32}{t:9.4f}{t / base:12.3f}{case['bill'] / peak:12.3f}"
              f"{case['bill'] / t / 1e9:10.1f}")


if __name__ == "__main__":
    rho.define_flags()
    flags.run(main)
