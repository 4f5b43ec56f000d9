"""Examples by id, batches by (seed, step), planted noise with the truth kept, prefetch in threads.

An example's id is its place in its whole split, for ever: sub-splits such as `train[:90%]` keep the
ids of `train`, so that scores can be cached by id. A batch is a function of (seed, step) alone, the
same for every number of devices and hosts; each host reads only its own slice of it.
"""

import collections
import concurrent.futures
import functools
import itertools
import os

from absl import logging
import numpy as np

from common import toy

CACHE_BYTES = 2**31  # a data set that is smaller than this when decoded is decoded only once


class Source:
    """Random access to the examples of one split, decoded to arrays of fixed shape.

    `read(ids)` -> {'image': uint8 [n, H, W, C], 'label': int32 [n] or absent, 'tokens': int32
    [n, T] or absent, and toy's planted truths}. `ids` [N] int64 are all that the split holds.
    `describe(id)` is its caption, else its class name: for pictures.
    """

    def __init__(self, name, ids, read, *, class_names=(), describe=str):
        self.name, self.ids, self.class_names, self.describe = name, ids, class_names, describe
        self._read, self._cache, self._have = read, None, None
        probe = read(ids[:1])
        if probe["image"].nbytes * len(ids) <= CACHE_BYTES:
            self._cache = {k: np.empty((len(ids), *v.shape[1:]), v.dtype) for k, v in probe.items()}
            self._have = np.zeros(len(ids), bool)
        self.image_shape = probe["image"].shape[1:]

    def read(self, ids):
        if self._cache is None:
            return self._read(ids)
        rows = np.searchsorted(self.ids, ids)
        new = np.unique(rows[~self._have[rows]])
        if len(new):  # two threads may decode the same example: both write the same bytes
            for k, v in self._read(self.ids[new]).items():
                self._cache[k][new] = v
            self._have[new] = True
        return {k: v[rows] for k, v in self._cache.items()}


def tokenize(caption, context, encode=None):
    """A caption, cut to fit, as int32 [context]: its ids by `encode`, 1 at the end, 0 pads."""
    tokens = np.zeros(context, np.int32)
    ids = (encode or byte_ids)(caption)[:context - 1]
    tokens[:len(ids)], tokens[len(ids)] = ids, 1
    return tokens


def byte_ids(caption):
    """UTF-8 bytes, each + 3: 0 pads, 1 ends, 2 is free."""
    return np.frombuffer(caption.encode(), np.uint8) + np.int32(3)


VOCAB = 256 + 3  # of `byte_ids`


def tokenizer(path=None):
    """(encode, vocabulary size): bytes, or the pieces of a sentencepiece model file, + 3 too."""
    if not path:
        return byte_ids, VOCAB
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(f"--tokenizer={path} needs `pip install sentencepiece`") from None
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"--tokenizer={path}: not a sentencepiece model ({why})") from None
    return (lambda caption: np.array(pieces.encode(caption), np.int32) + 3,
            pieces.vocab_size() + 3)


def warn_of_lengths(source, encode, context, sample=1000):
    """Logs how many captions are cut to `context` tokens and how many are empty, of a sample."""
    some = source.ids[np.linspace(0, len(source.ids) - 1, min(sample, len(source.ids))).astype(int)]
    lengths = np.array([len(encode(source.describe(i))) for i in some])
    cut, empty = (lengths > context - 1).mean(), (lengths == 0).mean()
    if cut or empty:
        logging.warning("captions: %.1f %% are longer than --context=%d and are cut, %.1f %% are "
                        "empty (of %d looked at)", 100 * cut, context, 100 * empty, len(some))


def open_source(dataset, split, *, data_dir=None, image_size=0, context=0, encode=None,
                need=(), toy_knobs=()):
    """A Source for `toy`, a TFDS name, or the path of a prepared TFDS directory.

    Args:
      image_size: side in pixels; larger or oblong images are resized and centre-cropped to it; 0
        takes the set's own size, which must then be one for all.
      context: tokens per caption; encode: caption -> token ids, see `tokenizer`.
      need: the fields that the caller cannot do without, of 'label' and 'caption'.
      toy_knobs: keyword arguments of `toy.world`, for the split `train`; `test` is a balanced
        world of 2,000 clean examples.
    Raises: ValueError with one line that names the flag and the mend.
    """
    if dataset == "toy":
        return _toy_source(split, image_size or 32, context, encode, dict(toy_knobs))
    if dataset.startswith(("/", "./", "../", "~")) and not os.path.isdir(dataset):
        raise ValueError(f"--dataset={dataset}: no such directory")
    import tensorflow_datasets as tfds  # here and not above: it takes seconds, and toy needs none

    try:
        builder = (tfds.builder_from_directory(dataset) if os.path.isdir(dataset) else
                   tfds.builder(dataset, data_dir=data_dir, file_format="array_record"))
    except Exception as e:  # TFDS raises half a dozen types, with pages of text
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"--dataset={dataset}: neither a TFDS name nor a prepared TFDS directory "
                         f"({why})") from None
    if not builder.info.splits:
        raise ValueError(
            f"--dataset={dataset}: not prepared under {builder.data_dir}. Prepare it once with "
            f"`pip install tensorflow && python -c \"import tensorflow_datasets as tfds; "
            f"tfds.builder('{dataset}', file_format='array_record').download_and_prepare()\"`, or "
            "name its place with --data_dir")
    try:
        (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except Exception:
        raise ValueError(f"--split or --eval_split {split!r}: {dataset} has "
                         f"{', '.join(builder.info.splits)}, and sub-splits of one such as "
                         "'train[:90%]'") from None
    total = builder.info.splits[part.splitname].num_examples
    begin, end = part.from_ or 0, total if part.to is None else part.to
    if begin >= end:
        raise ValueError(f"--split or --eval_split {split!r} of {dataset} holds no example")

    features = builder.info.features
    text = next((f for f in ("caption", "captions", "text") if f in features), None)
    has = {"image": "image" in features, "label": "label" in features, "caption": text is not None}
    for field in ("image", *need):
        if not has[field]:
            raise ValueError(f"--dataset={dataset} has no feature {field!r} (it has "
                             f"{', '.join(features)}): choose another --dataset or --task")
    if "label" in need and not hasattr(features["label"], "names"):
        raise ValueError(f"--dataset={dataset}: its label is {features['label']}, not a class")
    try:
        data = builder.as_data_source(split=part.splitname)
    except NotImplementedError:
        raise ValueError(f"--dataset={dataset} is prepared as {builder.info.file_format.value}: "
                         "prepare it again with file_format='array_record'") from None
    shape = features["image"].shape
    if not image_size and (None in shape or shape[0] != shape[1]):
        raise ValueError(f"--dataset={dataset} has images of shape {shape}: give --image_size")

    def caption_of(example):
        value = example[text]
        value = value["text"] if isinstance(value, dict) else value  # coco_captions
        if isinstance(value, (list, tuple, np.ndarray)):  # several: the first
            value = value[0] if len(value) else ""
        return value.decode() if isinstance(value, bytes) else str(value)

    def read(ids):
        rows = data.__getitems__([int(i) for i in ids])  # TFDS wants Python ints
        out = {"image": np.stack([_fit(row["image"], image_size) for row in rows])}
        if has["label"]:
            out["label"] = np.array([row["label"] for row in rows], np.int32)
        if text and context:
            out["tokens"] = np.stack([tokenize(caption_of(row), context, encode) for row in rows])
        return out

    def describe(i):
        row = data[int(i)]
        return caption_of(row) if text and context else str(names[row["label"]]) if names else ""

    names = features["label"].names if has["label"] and hasattr(features["label"], "names") else ()
    return Source(f"{builder.info.full_name}/{part.splitname}[{begin}:{end}], {image_size} px, "
                  f"{context} tokens", np.arange(begin, end), read,
                  class_names=tuple(names), describe=describe)


def _fit(image, side):
    """Resize the shorter side to `side` and cut the centre square; nothing if it fits already."""
    if not side or image.shape[:2] == (side, side):
        return image
    import PIL.Image
    height, width = image.shape[:2]
    scale = side / min(height, width)
    new = (max(side, round(width * scale)), max(side, round(height * scale)))
    picture = PIL.Image.fromarray(image.squeeze() if image.shape[-1] == 1 else image)
    image = np.asarray(picture.resize(new, PIL.Image.BICUBIC)).reshape(new[1], new[0], -1)
    top, left = (new[1] - side) // 2, (new[0] - side) // 2
    return image[top:top + side, left:left + side]


def _toy_source(split, image_size, context, encode, knobs):
    if split not in ("train", "test"):
        raise ValueError(f"--split or --eval_split {split!r}: toy has train, test")
    if split == "test":
        knobs = {"n": 2_000, "tail": 0.0, "duplicates": 0.0, "hopeless": 0.0, "seed": 1}
    world = toy.world(image_size=image_size, **knobs)
    arrays = {k: v for k, v in world.items() if isinstance(v, np.ndarray)}
    if context:
        arrays["tokens"] = np.stack([tokenize(c, context, encode) for c in world["caption"]])
    n = len(arrays["label"])
    knobs_text = ", ".join(f"{k} {v}" for k, v in sorted(knobs.items()))
    return Source(f"toy/{split}, {knobs_text}, {image_size} px, {context} tokens", np.arange(n),
                  lambda ids: {k: v[ids] for k, v in arrays.items()},
                  class_names=toy.CLASSES, describe=lambda i: (
                      world["caption"][i] if context else toy.CLASSES[world["label"][i]]))


class Pool:
    """Examples to train on: all ids of a Source, or some, with noise planted in one field.

    A fraction `noise` of the source's ids, drawn by `seed`, gets the `field` ('label' or 'tokens')
    of another of them, along one cycle. `read` adds 'id' and 'noisy': bool [n], True where the
    field now differs from the true one; it is known for reporting only.
    """

    def __init__(self, source, *, noise=0.0, field="label", seed=0, ids=None):
        self.source, self.noise, self.field, self.seed = source, noise, field, seed
        self.ids = source.ids if ids is None else np.sort(ids)
        rng = np.random.default_rng((seed, 1))
        chosen = rng.permutation(len(source.ids))[:round(noise * len(source.ids))]
        if len(self.ids) == 0:
            raise ValueError("a training pool holds no example: check the splits and fractions")
        self._donor = source.ids.copy()
        self._donor[chosen] = source.ids[np.roll(chosen, 1)]

    def __len__(self):
        return len(self.ids)

    def replant(self, noise):
        """The same examples with another amount of noise."""
        return Pool(self.source, noise=noise, field=self.field, seed=self.seed, ids=self.ids)

    def subset(self, ids):
        return Pool(self.source, noise=self.noise, field=self.field, seed=self.seed, ids=ids)

    def donor(self, ids):
        """The ids whose field the examples `ids` carry: their own, unless noise was planted."""
        return self._donor[np.searchsorted(self.source.ids, ids)]

    def read(self, ids):
        out = self.source.read(ids)
        noisy, donors = np.zeros(len(ids), bool), self.donor(ids)
        moved = np.flatnonzero(donors != ids)
        if len(moved):
            given = out[self.field].copy()
            given[moved] = self.source.read(donors[moved])[self.field]
            noisy = (given != out[self.field]).reshape(len(ids), -1).any(1)
            out = {**out, self.field: given}
        return {**out, "noisy": noisy, "id": np.asarray(ids)}

    def identity(self):
        """What the examples and their fields are made of, for files that depend on them."""
        return f"{self.source.name}, {self.noise:g} of {self.field} planted by seed {self.seed}"


TRUTHS = ("noisy", "duplicate", "hopeless")  # bool fields that a batch may carry, for reporting


def split(ids, fraction, seed):
    """Two disjoint parts of `ids`; the first has that fraction of them, drawn by `seed`."""
    order = np.random.default_rng((seed, 2)).permutation(ids)
    n = round(fraction * len(ids))
    return np.sort(order[:n]), np.sort(order[n:])


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return np.random.default_rng((seed, 3, epoch)).permutation(n)


def batch_ids(ids, seed, step, batch_size):
    """Ids [batch_size] of a step: epochs without replacement, each in an order of its own."""
    place = step * batch_size + np.arange(batch_size)
    epoch, row = place // len(ids), place % len(ids)
    out = np.empty(batch_size, ids.dtype)
    for e in np.unique(epoch):
        out[epoch == e] = ids[_permutation(len(ids), seed, int(e))[row[epoch == e]]]
    return out


def batches(pool, *, seed, batch_size, start, stop, host=(0, 1)):
    """Yields the rows of host (index, number of hosts) of the batches of steps start..stop-1."""
    rows = _rows(batch_size, *host)
    return prefetch(lambda step: pool.read(batch_ids(pool.ids, seed, step, batch_size)[rows]),
                    range(start, stop))


def sweep(pool, batch_size, host=(0, 1)):
    """Yields the rows of host (index, number of hosts) of batches that go once through a pool, in
    the order of its ids. The last is filled up with the first id; 'valid' [rows] is False there."""
    rows, n = _rows(batch_size, *host), len(pool)
    ids = np.concatenate([pool.ids, np.full(-n % batch_size, pool.ids[0])])
    make = lambda s: {**pool.read(ids[s:s + batch_size][rows]),
                      "valid": (np.arange(s, s + batch_size) < n)[rows]}
    return prefetch(make, range(0, n, batch_size))


def _rows(batch_size, host, n_hosts):
    return slice(host * batch_size // n_hosts, (host + 1) * batch_size // n_hosts)


def prefetch(make, items, *, threads=2, ahead=4):
    """Yields make(item) in order, computed up to `ahead` items early in threads."""
    items = iter(items)
    executor = concurrent.futures.ThreadPoolExecutor(threads)
    pending = collections.deque(executor.submit(make, i) for i in itertools.islice(items, ahead))
    try:
        while pending:
            ready = pending.popleft().result()
            pending.extend(executor.submit(make, i) for i in itertools.islice(items, 1))
            yield ready
    finally:  # a consumer that leaves early does not wait for what it will not use
        executor.shutdown(wait=False, cancel_futures=True)
