"""Every test runs on eight forced CPU devices and imports the scripts from the root."""

import os
import sys
from pathlib import Path

# before jax 0.12, fewer threads than devices can deadlock in a collective
os.environ["PJRT_NPROC"] = "16"
ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import jax
import matplotlib
import pytest

matplotlib.use("Agg")
# Compiling is what the tests wait for. Both together make it six times faster on jax 0.10; XLA dies
# of a flag that it does not know, as that of jax 0.12 does of this one.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def on_devices():
    """on_devices(n, fn, *args, in_axes=...): fn under pmap over the first n devices, where its
    collectives work; what comes back is numpy, of the first device (or `out_axes=0`: of each)."""
    from common import devices

    def run(n, fn, *args, in_axes, out_axes=None):
        mapped = jax.pmap(fn, axis_name=devices.AXIS, in_axes=in_axes, out_axes=out_axes,
                          devices=jax.devices()[:n])
        return devices.to_host(mapped(*args))
    return run
