"""Frozen models: loading their weights, our own or published, and computing once what they give for
each example of a pool."""

import dataclasses
import hashlib
import json
import os
import time
import typing

from absl import logging
import jax
import numpy as np
import tqdm

from common import data, devices, files, flags, prepared, siglip, train


def load(directory, template, about):
    """(the learner's params, `train.Totals`) that the stage of a reference left in `directory`.

    template: params of the same shapes. about: what the stage must have been told as its `about`;
    the sizes of arrays cannot tell another number of heads or another tokenizer.
    Raises: ValueError naming --reference if the checkpoint is missing, damaged, not trained to its
      end, of another model, or of an arm.
    """
    where = f"--reference={directory}"
    if not os.path.isdir(directory):
        raise ValueError(f"{where}: no such checkpoint directory; --help says what the flag takes")
    checkpoints = train.Checkpoints(directory)
    if checkpoints.latest() is None:
        raise ValueError(f"{where}: holds no checkpoint")
    try:
        state, record = checkpoints.read()
        params, totals = state["learner"]["params"], train.Totals(**record["totals"])
        steps, theirs_about = record["steps"], record["about"]
    except Exception as e:
        why = str(e) if type(e) is TypeError else type(e).__name__
        raise ValueError(f"{where}: damaged ({why}): train it again or name another") from None
    if not theirs_about:
        raise ValueError(f"{where}: this is no reference but an arm: name the checkpoint directory "
                         "of a reference, such as checkpoints/reference-0")
    if totals.step < steps:
        raise ValueError(f"{where}: is trained for {totals.step} of its {steps} steps: run the command "
                         "that trains it to its end")
    theirs, ours = ({jax.tree_util.keystr(k): tuple(x.shape) for k, x in
                     jax.tree_util.tree_leaves_with_path(tree)} for tree in (params, template))
    for k in {**ours, **theirs}:
        if theirs.get(k) != ours.get(k):
            raise ValueError(f"{where}: of another size (params{k} is {theirs.get(k)}, here it is "
                             f"{ours.get(k)}): give the model flags it was trained with")
    theirs, ours = (dict(leaves_of(x)) for x in (theirs_about, files.plain(about)))
    for k in ours:
        if theirs.get(k) != ours[k]:
            raise ValueError(f"{where}: was trained with another {k} ({theirs.get(k)}, here it is "
                             f"{ours[k]}): give the flags it was trained with")
    return params, totals


def training_as_setup(totals):
    """What the training of a reference adds to an arm's set-up: all of its seconds and FLOPs."""
    return train.Totals(setup_seconds=totals.seconds,
                        flops={"reference_training": sum(totals.flops.values())})


def leaves_of(tree, name=""):
    """Yields ('a b c', value) for each value that is no dict in dicts of dicts."""
    for k, v in tree.items():
        yield from leaves_of(v, f"{name}{k} ") if isinstance(v, dict) else [(f"{name}{k}", v)]


# --------------------------------------------------------------------------- published weights


def load_published(path, tokenizer, image_size=0, dtype="float32"):
    """(`siglip.SigLIP`, params, encode) of published SigLIP weights, the value of --reference.

    Args:
      path: see `siglip.load`. tokenizer: the sentencepiece file that belongs to them.
      image_size: side in pixels of the images to come; 0: the one of the file.
      dtype: of the activations. The parameters are float32.
    Returns: encode: text -> raw ids, for `siglip.tokenize`.
    Raises: ValueError, in one line, that names --reference or --reference_tokenizer.
    """
    where = f"--reference={path}"
    if not tokenizer:
        raise ValueError(f"{where}: published weights need --reference_tokenizer, the "
                         "sentencepiece model file that belongs to them")
    encode, vocab = data.open_sentencepiece(tokenizer, "reference_tokenizer")
    try:
        model, params = siglip.load(path, image_size=image_size or None, vocab=vocab)
    except ValueError as e:  # it begins with the path
        raise ValueError(f"--reference={e}") from None
    image, text = (dataclasses.replace(tower, dtype=dtype) for tower in (model.image, model.text))
    return dataclasses.replace(model, image=image, text=text), params, encode


@dataclasses.dataclass(frozen=True)
class Shown:
    """The examples of a `data.Source` as a published SigLIP is shown them. A `data.Pool` can have
    this in place of the source.

    `read(ids)` -> {'image': uint8 [n, S, S, 3], squashed to the model's own side; 'tokens': int32
    [n, T], of its own tokenizer}. Nothing is kept in memory: each example is read once.
    """
    name: str
    ids: np.ndarray
    fingerprint: str
    read: typing.Callable


class Uncut(prepared.Split):
    """A prepared split whose images are squashed to a square, where other models see a square that
    is cut out of the middle."""

    def image(self, row):
        picture = prepared.picture(prepared.pixels(row["image"], self.float_png), self.channels)
        return siglip.preprocess(np.atleast_3d(picture), self.image_size)


def as_shown(source, model, encode, *, dataset, split, data_dir=None):
    """`Shown` for a `data.Source` that was opened by the same `dataset`, `split` and `data_dir`.

    A prepared set is opened again, so that its images come from the files and not from the
    learner's smaller ones. The pictures of toy are drawn at the learner's side and enlarged."""
    side = model.image.image_size
    if dataset != "toy":
        part = Uncut(dataset, split, data_dir=data_dir, image_size=side, captions=True,
                     need=("caption",), flags=("dataset", "split"))

    def read(ids):
        if dataset == "toy":
            images = [siglip.preprocess(x, side) for x in source.read(ids)["image"]]
            captions = source.describe(ids)
        else:
            got = part.read(ids)
            images, captions = got["image"], got["caption"]
        tokens = [siglip.tokenize(caption, encode, model.text) for caption in captions]
        return {"image": np.stack(images), "tokens": np.stack(tokens)}

    name = (f"{source.name}, shown at {side} px and as {model.text.context} tokens of tokenizer "
            f"{data.fingerprint(encode)}")
    return Shown(name, source.ids, source.fingerprint, read)


# -------------------------------------------------------------------- what it says of a pool


def forward_batches(params, forward, pool, batch_size):
    """Yields (what `forward` gives for the next examples of a pool, in the order of its ids;
    seconds).

    forward: `devices.pmap` of (params, sharded batch) -> a dict of rows, gathered from all devices,
    'valid' among them. Results are on the host. The time to compile does not count.
    """
    for batch in data.sweep(pool, batch_size, devices.host()):
        batch = devices.shard({k: v for k, v in batch.items() if k not in ("id", *data.TRUTHS)})
        begin = devices.clock()
        got = jax.device_get(forward(params, batch))
        seconds = devices.clock() - begin
        valid = got.pop("valid")
        yield jax.tree.map(lambda x: x[valid], got), seconds


def forward_all(params, forward, pool, batch_size):
    """(what `forward` gives for every example of a pool; seconds). See `forward_batches`."""
    parts, seconds = zip(*forward_batches(params, forward, pool, batch_size))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts), sum(seconds)


def made_by(params, pool, **more):
    """What the outputs for a pool were computed from: the weights, the data, the ids."""
    return {"weights": train.digest(params), "data": pool.identity(),
            "ids": hashlib.sha256(pool.ids.tobytes()).hexdigest(), **more}


def cached(path, source, make):
    """(arrays by name, seconds that making them took) from the file `path`, or, where there is
    none, from `make()`, which gives both; then they are written there. source: `made_by`.

    Raises: ValueError naming the file if it is damaged, or was made by something else.
    """
    if not devices.agree(os.path.exists(path)):
        arrays, seconds = make()
        if jax.process_index() == 0:
            np.savez(path + ".tmp.npz", made_by=json.dumps(source), seconds=seconds,
                     sha256=train.digest(arrays), **arrays)
            os.replace(path + ".tmp.npz", path)
        return arrays, seconds
    try:
        with np.load(path) as f:
            arrays = {k: f[k] for k in f}
        theirs, seconds = json.loads(str(arrays.pop("made_by"))), float(arrays.pop("seconds"))
        if str(arrays.pop("sha256")) != train.digest(arrays):
            raise TypeError("its hash differs")
    except Exception as e:  # a zip file has many ways to be broken
        why = str(e) if type(e) is TypeError else type(e).__name__
        raise ValueError(f"{path} is damaged ({why}): delete it, and it is made again") from None
    require_source(path, theirs, source)
    return arrays, seconds


def require_source(path, theirs, source):
    """Raises ValueError if the file was made by something else. See `made_by`."""
    differ = [k for k in source if theirs.get(k) != source[k]]
    if differ:
        raise ValueError(f"{path} was made with other {' and '.join(differ)}: delete it, and it is "
                         "made again")


# ------------------------------------------------------- embeddings that need not fit in memory


def embed_pool(path, source, shape, embed, *, stop=lambda: False, record_after=10.0):
    """(the embeddings of a pool as a read-only np.memmap, seconds that computing them took).

    They stand in the .npy file `path`, which is written while they are computed. Beside it,
    `path`.json says what made it, how many rows are done, and the hash of those. Where both files
    are there, the hash is checked and the work goes on from there. So a kill costs `record_after`
    seconds of work at most, and the finished file has the bytes that it would have had. Memory does
    not grow with the pool: a row leaves it when it is written, and is read when it is asked for.

    Args:
      source: `made_by`.
      shape: (N, 2, E): of N examples the image and the caption.
      embed: embed(start) yields (float32 [k, 2, E] of the next k examples, seconds) from example
        `start` on.
      stop: asked after every batch, whether to end here.
      record_after: seconds after which the rows that are done are on the disk for certain.
    Raises: ValueError naming the file if it is damaged, or was made by something else;
      flags.Stopped once what is done is written.
    """
    record, sha = {"rows": 0, "seconds": 0.0}, hashlib.sha256()
    if devices.agree(os.path.exists(f"{path}.json")):
        record, sha = read_record(path, source)
    elif jax.process_index() == 0:
        np.lib.format.open_memmap(path, "w+", np.float32, shape)  # holes, which take no space yet
    N, done, seconds = shape[0], devices.agree(record["rows"]), record["seconds"]
    array = np.load(path, mmap_mode="r")
    if done == N:
        return array, seconds
    if done:
        logging.info("%s: going on after %d of %d examples", path, done, N)
    writes, recorded = jax.process_index() == 0, time.monotonic()
    # Not through the map: a full disk would then kill the process instead of raising OSError.
    with open(path, "r+b" if writes else "rb") as f, tqdm.tqdm(
            total=N, initial=done, desc="embeddings", unit="ex", leave=False, mininterval=0.5,
            disable=None if writes else True) as bar:
        f.seek(array.offset + done * array[0].nbytes)
        for rows, took in embed(done):
            done, seconds = done + len(rows), seconds + took
            bar.update(len(rows))
            if writes:
                rows = np.ascontiguousarray(rows, np.float32)
                f.write(rows)
                sha.update(rows)
            stops = bool(stop()) and done < N
            if writes and (stops or done == N or time.monotonic() - recorded > record_after):
                f.flush()
                os.fsync(f.fileno())  # the rows are on the disk before the record says so
                files.write_json(f"{path}.json", {"made_by": source, "rows": done,
                                                  "seconds": seconds, "sha256": sha.hexdigest()})
                recorded = time.monotonic()
            if stops:
                raise flags.Stopped(f"stopped after {done} of {N} examples were embedded, which "
                                    "are saved: the same command goes on from there")
    devices.agree(done)  # the others wait until the last row is written
    return np.load(path, mmap_mode="r"), seconds


def read_record(path, source):
    """(what `embed_pool` wrote beside the file, the running hash of the rows that are done).

    Raises: ValueError, see there."""
    sha = hashlib.sha256()
    try:
        with open(f"{path}.json") as f:
            record = json.load(f)
        theirs, array = record["made_by"], np.load(path, mmap_mode="r")
        with open(path, "rb") as f:  # not through the map, whose pages would count as memory
            f.seek(array.offset)
            left = record["rows"] * array[0].nbytes
            while part := f.read(min(left, 2**20)):
                sha.update(part)
                left -= len(part)
        if sha.hexdigest() != record["sha256"]:
            raise TypeError("its hash differs")
    except Exception as e:
        why = str(e) if type(e) is TypeError else type(e).__name__
        raise ValueError(f"{path} is damaged ({why}): delete it and {path}.json, and it is made "
                         "again") from None
    require_source(path, theirs, source)
    return record, sha


def take(array_N2E, embedded, pool, ids):
    """{'image', 'text': [n, E]}: the embeddings of the images and captions of examples of a pool.

    embedded: the `data.Pool` that the rows of `embed_pool` are of. Either it is `pool`. Or it has
    all examples of the source with their own captions, where `pool` may give one the caption of
    another: then it gets the embedding of that caption."""
    captions = ids if embedded is pool else pool.donor(ids)
    images, captions = (np.searchsorted(embedded.ids, i) for i in (ids, captions))
    return {"image": array_N2E[images, 0], "text": array_N2E[captions, 1]}
