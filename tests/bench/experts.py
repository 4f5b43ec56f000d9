"""Experts of dnc.py one after the other on all devices, against one on each device, in turns.

    python tests/bench/experts.py --devices=2
    python tests/bench/experts.py --model=50 --image_size=224 --batch_size=256   (on several GPUs)

One after the other is what dnc.py does: a batch is shared by all devices. Side by side, a device
holds a whole batch and a whole expert, and nothing crosses devices; experts of unequal clusters then
end at unequal times, which is not in these figures. Medians; only the ratio means anything. Not a
test: nothing is asserted.
"""

import functools
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from absl import app, flags
import jax
import numpy as np

from common import augment, devices, resnet
import dnc


def main(_):
    F = flags.FLAGS
    if F.devices > 1:
        jax.config.update("jax_num_cpu_devices", F.devices)
        os.environ["PJRT_NPROC"] = str(2 * F.devices)
    n, b = jax.device_count(), F.batch_size
    devices.divides(batch_size=b)
    model = dnc.Model(resnet.ResNet(F.model, F.image_size), F.hidden, F.embed, F.hidden)
    optimiser = dnc.lars(1.5e-6)
    step = functools.partial(
        dnc.contrast_step, model=model, optimiser=optimiser, warmup=0.0, temperature=0.1, m0=0.97,
        views=augment.Views(0.2, 0.5, (0, 0), (0, 0)), peak=1.0, n_classes=100,
        same_view_negatives=True)
    state = devices.to_host(dnc.new_state(jax.random.key(0), model, optimiser, 1000))
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (b, F.image_size, F.image_size, 3), np.uint8),
             "label": rng.integers(0, 100, b).astype(np.int32)}
    key, index = jax.random.key(1), np.int32(0)

    # a device of its own: the axis of the step's collectives has one place
    alone = lambda state, index, key, batch: jax.tree.map(lambda x: x[0], jax.vmap(
        step, (None, None, None, 0), axis_name=devices.AXIS)(state, index, key, jax.tree.map(
            lambda x: x[None], batch)))
    each = jax.pmap(alone, axis_name="experts", in_axes=(0, None, None, 0))
    shared = devices.pmap(step, in_axes=(None, None, None, 0))
    repeat = lambda tree: jax.tree.map(lambda x: np.stack([x] * n), tree)
    runs = {"one after the other": (shared, state, devices.shard(batch), 1),
            "side by side": (each, repeat(state), repeat(batch), n)}
    seconds = {name: [] for name in runs}
    for turn in range(F.rounds + 1):
        for name, (program, start, rows, _) in runs.items():
            begin = time.perf_counter()
            got = start
            for _ in range(F.steps):
                got, _ = program(got, index, key, rows)
            jax.block_until_ready(got)
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - begin)
    speed = {name: F.steps * experts * b / statistics.median(seconds[name])
             for name, (*_, experts) in runs.items()}
    print(f"ResNet {F.model}, {F.image_size} px, batches of {b}, {n} x "
          f"{jax.devices()[0].device_kind}")
    for name, s in speed.items():
        print(f"{name:20}{s:10.1f} images/s")
    print(f"side by side is {speed['side by side'] / speed['one after the other']:.2f} times as "
          "fast")


if __name__ == "__main__":
    flags.DEFINE_integer("devices", 0, "forced CPU devices; 0: those there are")
    flags.DEFINE_string("model", "8/16", "ResNet")
    flags.DEFINE_integer("image_size", 16, "side in pixels")
    flags.DEFINE_integer("batch_size", 64, "images per update of an expert")
    flags.DEFINE_integer("hidden", 256, "hidden width of the projector")
    flags.DEFINE_integer("embed", 64, "width E of the projection")
    flags.DEFINE_integer("steps", 10, "per timing")
    flags.DEFINE_integer("rounds", 5, "timings of each")
    app.run(main)
