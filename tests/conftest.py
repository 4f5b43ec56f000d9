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
# Compiling is what the tests wait for. Both together make it six times faster on jax 0.10. XLA dies
# of a flag that it does not know, as that of jax 0.12 does of this one.
COMPILE_FAST = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST}"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs():
    """At the end of each file: a process that keeps thousands of programs runs into the number of
    memory mappings that Linux allows it, and XLA dies of that without a word."""
    yield
    jax.clear_caches()


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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """name -> the directory of a small prepared set: 'labelled', with images of several sizes, and
    'captioned' and 'grey', which have no labels."""
    pytest.importorskip("importlib_resources")  # TFDS wants it to prepare a set
    import io
    import numpy as np
    import PIL.Image
    import tensorflow_datasets as tfds
    n = {"train": 48, "test": 16}

    def images(split, sizes, channels=3):
        """Encoded: given an array, TFDS would call TensorFlow to encode it."""
        rng = np.random.default_rng(len(split))
        for i in range(n[split]):
            image = rng.integers(0, 256, (*sizes[i % len(sizes)], channels), np.uint8)
            png = io.BytesIO()
            PIL.Image.fromarray(image.squeeze()).save(png, "PNG")
            yield i, io.BytesIO(png.getvalue())

    class Labelled(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"])}))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in n}

        def _generate_examples(self, split):
            for i, image in images(split, [(16, 16), (24, 19), (16, 40)]):
                yield i, {"image": image, "label": i % 3}

    class Captioned(Labelled):
        VERSION = tfds.core.Version("1.0.0")
        CHANNELS = 3

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(16, 16, self.CHANNELS)),
                "caption": tfds.features.Text()}))

        def _generate_examples(self, split):
            for i, image in images(split, [(16, 16)], self.CHANNELS):
                yield i, {"image": image, "caption": f"picture {i} of a {'bee' if i % 2 else 'cat'}"}

    class Grey(Captioned):
        VERSION = tfds.core.Version("1.0.0")
        CHANNELS = 1

    data_dir = tmp_path_factory.mktemp("prepared")
    out = {}
    for name, kind in (("labelled", Labelled), ("captioned", Captioned), ("grey", Grey)):
        builder = kind(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
        out[name] = Path(builder.data_dir)
    return out
