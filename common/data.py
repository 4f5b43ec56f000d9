"""Examples by id: opening a data set, planting noise, and drawing batches.

An example's id is its place in its whole split. A sub-split such as `train[:90%]` keeps the ids of
`train`, so scores can be cached by id. A batch depends on (seed, step) alone: it is the same for
every number of devices and hosts, and each host reads only its own rows of it.
"""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import os
import re
import zlib

from absl import logging
import numpy as np

from common import prepared, toy

CACHE_BYTES = 2**31  # a split whose decoded arrays are smaller than this is decoded only once


class Source:
    """The examples of one split by id, decoded to arrays of fixed shape.

    `read(ids)` -> {'image': uint8 [n, H, W, C]; if there are any, 'label': int32 [n], and 'tokens':
    int32 [n, T] with 'caption_hash': int32 [n, 2]; toy adds its planted truths}.
    `ids` int64 [N] are all ids of the split, in rising order. `describe(ids)` are the examples'
    whole captions, or their class names if they have none. `fingerprint` changes with the records.
    """

    def __init__(self, name, ids, read, *, class_names=(), describe=None, fingerprint=""):
        self.name, self.ids, self.class_names, self.describe = name, ids, class_names, describe
        self.fingerprint, self._read, self._cache, self._have = fingerprint, read, None, None
        first = read(ids[:1])
        if first["image"].nbytes * len(ids) <= CACHE_BYTES:
            self._cache = {k: np.empty((len(ids), *v.shape[1:]), v.dtype) for k, v in first.items()}
            self._have = np.zeros(len(ids), bool)
        self.image_shape = first["image"].shape[1:]

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


# ----------------------------------------------------------------------------------- captions

WORD_IDS = 4096
MARKS = 3  # ids below the tokenizer's own: 0 pads, 1 ends a caption, 2 is free
VOCAB = 256 + MARKS  # of `byte_ids`


def word_ids(caption):
    """One id for each lower-case word or number, crc32(word) mod 4,096: no vocabulary file.

    Punctuation is skipped. Different words may share an id. With V different words, a word shares
    its id with another one with probability 1 - (1 - 1/4096)^(V - 1): 0.2 for V = 1,000 and 0.9
    for V = 10,000. None of toy's words do.
    """
    return np.array([zlib.crc32(word.encode()) % WORD_IDS
                     for word in re.findall(r"[^\W_]+", caption.lower())], np.int32) + MARKS


def byte_ids(caption):
    """One id for each UTF-8 byte."""
    return np.frombuffer(caption.encode(), np.uint8) + np.int32(MARKS)


def tokenizer(name):
    """(encode: caption -> int32 ids, vocabulary size) of 'words', 'bytes' or a sentencepiece file.

    Raises: ValueError with one line that names --tokenizer.
    """
    if name in ("words", "bytes"):
        return (word_ids, WORD_IDS + MARKS) if name == "words" else (byte_ids, VOCAB)
    pieces, size = open_sentencepiece(name, "tokenizer", "'words', 'bytes' or ")
    return lambda caption: np.array(pieces(caption), np.int32) + MARKS, size + MARKS


def open_sentencepiece(path, flag, other=""):
    """(encode: text -> its raw ids, number of pieces) of a sentencepiece model file.

    Raises: ValueError with one line that names the flag, and what `other` values it takes."""
    where = f"--{flag}={path}"
    if not os.path.isfile(path):
        raise ValueError(f"{where}: no such file; want {other}a sentencepiece model")
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(f"{where} needs `pip install sentencepiece`") from None
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as e:
        raise ValueError(f"{where}: not a sentencepiece model ({prepared.reason(e)})") from None
    return pieces.encode, pieces.vocab_size()


def fingerprint(encode):
    """What tells one tokenizer from another: the ids of a sentence."""
    ids = encode("Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich, 3,141,592 times.")
    return hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:16]


def tokenize(caption, context, encode=byte_ids):
    """A caption as int32 [context]: its ids, cut if they are too many, then 1, then zeros."""
    tokens = np.zeros(context, np.int32)
    ids = encode(caption)[:context - 1]
    tokens[:len(ids)], tokens[len(ids)] = ids, 1
    return tokens


def caption_hash(caption):
    """int32 [2], 64 bits of the sha256 of the whole caption. Two captions are equal if their
    hashes are. Tokens cannot tell: long captions that begin alike are equal after the cut."""
    return np.frombuffer(hashlib.sha256(caption.encode()).digest()[:8], "<i4")


def caption_fields(captions, context, encode):
    """What a batch carries of its captions."""
    return {"tokens": np.stack([tokenize(c, context, encode) for c in captions]),
            "caption_hash": np.stack([caption_hash(c) for c in captions])}


def count_captions(source, encode, context, split, sample=1000):
    """Looks at up to 1,000 captions of a split, and warns of those that a model cannot tell apart.

    Returns {'looked_at': their number; and as fractions of it 'cut': captions of more than
    context - 1 tokens; 'empty': of no token; 'equal': the same as another one's; 'equal_tokens':
    different from all others, but with the same tokens as another one after the cut}.
    """
    captions = source.describe(prepared.spread(source.ids, sample))
    lengths = np.array([len(encode(c)) for c in captions])
    times = collections.Counter(captions)
    tokens = {c: tokenize(c, context, encode).tobytes() for c in times}
    readings = collections.Counter(tokens.values())
    fraction = lambda flags: float(np.mean(list(flags)))
    out = {"cut": fraction(lengths > context - 1), "empty": fraction(lengths == 0),
           "equal": fraction(times[c] > 1 for c in captions),
           "equal_tokens": fraction(times[c] == 1 and readings[tokens[c]] > 1 for c in captions)}
    says = {"cut": f"longer than {context - 1} tokens and are cut", "empty": "empty",
            "equal": "equal to another one",
            "equal_tokens": "different from all others, but with the same tokens as another one"}
    says = [f"{100 * out[k]:.1f} % are {text}" for k, text in says.items() if out[k]]
    if says:
        logging.warning("captions of %s: %s (of %d looked at)", split, ", ".join(says),
                        len(captions))
    return {"looked_at": len(captions), **out}


# ------------------------------------------------------------------------------ opening a set


def open_splits(config, encode=byte_ids, *, need, toy_image_size, context=0):
    """(training Source, test Source) as the flags say; warns of captions that look alike."""
    out = []
    for flag in ("split", "eval_split"):
        source = open_source(
            config.dataset, config[flag], data_dir=config.data_dir,
            image_size=config.image_size or toy_image_size * (config.dataset == "toy"),
            context=context, encode=encode, need=need, toy_knobs=toy_knobs(config),
            flags=("dataset", flag))
        if context:
            count_captions(source, encode, context, f"--{flag}={config[flag]}")
        out.append(source)
    return out


def toy_knobs(config):
    return dict(n=config.toy_examples, tail=config.toy_tail, duplicates=config.toy_duplicates,
                hopeless=config.toy_hopeless, radius=config.toy_radius, domains=config.toy_domains)


def open_source(dataset, split, *, data_dir=None, image_size=0, context=0, encode=byte_ids,
                need=(), toy_knobs=(), flags=("dataset", "split")):
    """A Source for `toy`, a TFDS name, or the path of a prepared TFDS directory.

    Args:
      image_size: side in pixels, see `prepared.fit`. 0 takes the set's own size, which must be one
        square.
      context: tokens for each caption; 0 leaves captions out. encode: see `tokenizer`.
      need: the fields that the caller cannot do without, of 'label' and 'caption'. A label that is
        not needed is left out if it is not a class, or if some examples have none (-1).
      toy_knobs: keyword arguments of `toy.world`, for the split `train`; `test` is a balanced
        world of 2,000 clean examples.
      flags: the flags that `dataset` and `split` come from, for errors.
    Raises: ValueError with one line that names the flag and what to do.
    """
    if dataset == "toy":
        return _toy_source(split, image_size or 32, context, encode, dict(toy_knobs), flags[1])
    part = prepared.Split(dataset, split, data_dir=data_dir, image_size=image_size,
                          captions=bool(context), need=need, flags=flags)
    if part.wrong_labels:
        logging.warning("--%s=%s: %s, so its labels are left out", flags[1], split,
                        part.wrong_labels)

    def read(ids):
        out = part.read(ids)
        captions = out.pop("caption", None)
        return out if captions is None else out | caption_fields(captions, context, encode)

    return Source(f"{part.name}, {image_size} px, {context} tokens", part.ids, read,
                  class_names=part.class_names, describe=part.describe,
                  fingerprint=part.fingerprint)


def _toy_source(split, image_size, context, encode, knobs, flag):
    if split not in ("train", "test"):
        raise ValueError(f"--{flag}={split}: toy has the splits train, test")
    if split == "test":
        knobs |= {"n": 2_000, "tail": 0.0, "duplicates": 0.0, "hopeless": 0.0, "seed": 1}
    class_names = toy.class_names(knobs.get("domains", 0))
    world = toy.world(image_size=image_size, **knobs)
    arrays = {k: v for k, v in world.items() if isinstance(v, np.ndarray)}
    knobs_text = ", ".join(f"{k} {v}" for k, v in sorted(knobs.items()))
    sha = hashlib.sha256(repr((knobs_text, class_names, world["caption"])).encode())
    for name in sorted(arrays):
        sha.update(arrays[name].tobytes())
    if context:
        arrays |= caption_fields(world["caption"], context, encode)
    texts = world["caption"] if context else [class_names[label] for label in world["label"]]
    return Source(f"toy/{split}, {knobs_text}, {image_size} px, {context} tokens",
                  np.arange(len(texts)), lambda ids: {k: v[ids] for k, v in arrays.items()},
                  class_names=class_names, fingerprint=sha.hexdigest(),
                  describe=lambda ids: [texts[i] for i in ids])


# ------------------------------------------------------------------------ what is trained on

TRUTHS = ("noisy", "duplicate", "hopeless")  # bool fields that a batch may carry, for reporting


class Pool:
    """Examples to train on: all ids of a Source, or some, with noise planted in one field.

    A fraction `noise` of the source's ids, drawn by `seed`, gets the `field` ('label' or 'tokens')
    of another of them, along one cycle. A caption's hash moves with its tokens. `read` adds 'id'
    and 'noisy', bool [n]: True where the label or the whole caption now differs from the true one.
    """

    def __init__(self, source, *, noise=0.0, field="label", seed=0, ids=None):
        self.source, self.noise, self.field, self.seed = source, noise, field, seed
        self.ids = source.ids if ids is None else np.sort(ids)
        if len(self.ids) == 0:
            raise ValueError("a training pool holds no example: check the splits and fractions")
        rng = np.random.default_rng((seed, 1))
        chosen = rng.permutation(len(source.ids))[:round(noise * len(source.ids))]
        self._donor = source.ids.copy()
        self._donor[chosen] = source.ids[np.roll(chosen, 1)]

    def __len__(self):
        return len(self.ids)

    def replant(self, noise):
        """The same examples with another amount of noise."""
        return Pool(self.source, noise=noise, field=self.field, seed=self.seed, ids=self.ids)

    def subset(self, ids):
        """Other examples of the source, with the same noise."""
        return Pool(self.source, noise=self.noise, field=self.field, seed=self.seed, ids=ids)

    def donor(self, ids):
        """The ids whose field the examples `ids` carry: their own, unless noise was planted."""
        return self._donor[np.searchsorted(self.source.ids, ids)]

    def read(self, ids):
        out, donors = dict(self.source.read(ids)), self.donor(ids)
        noisy, moved = np.zeros(len(ids), bool), np.flatnonzero(donors != ids)
        if len(moved):
            given = self.source.read(donors[moved])
            fields = [self.field]
            if self.field == "tokens" and "caption_hash" in out:
                fields.append("caption_hash")
            # the hash comes last and decides: captions that differ can have equal tokens, once cut
            for field in fields:
                differs = given[field] != out[field][moved]
                noisy[moved] = differs.reshape(len(moved), -1).any(1)
                out[field] = out[field].copy()
                out[field][moved] = given[field]
        return {**out, "noisy": noisy, "id": np.asarray(ids)}

    @functools.cached_property
    def noisy(self):
        """Which of the examples do not have their own label or caption: bool [len(self)]."""
        return np.concatenate([batch["noisy"][batch["valid"]] for batch in sweep(self, 512)])

    def identity(self):
        """What the examples and their fields are made of, for files that depend on them."""
        return (f"{self.source.name}, {self.noise:g} of {self.field} planted by seed {self.seed}, "
                f"fingerprint {self.source.fingerprint[:16]}")


def part_size(ids, fraction, flag):
    """The size of the first part of `split`. Raises ValueError, naming the flag, if one of the two
    parts has no example."""
    n = round(fraction * len(ids))
    if not 0 < n < len(ids):
        raise ValueError(f"--{flag}={fraction}: that is {n} of the {len(ids)} examples: want a "
                         "part that holds some of them and leaves some")
    return n


def split(ids, fraction, seed):
    """Two disjoint parts of `ids`. The first has that fraction of them, drawn by `seed`."""
    order = np.random.default_rng((seed, 2)).permutation(ids)
    n = round(fraction * len(ids))
    return np.sort(order[:n]), np.sort(order[n:])


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return np.random.default_rng((seed, 3, epoch)).permutation(n)


def batch_ids(ids, seed, step, batch_size):
    """Ids [batch_size] of a step, a pure function of the arguments.

    Every epoch goes through the ids in an order of its own. What is left at its end and is less
    than a batch is dropped, so that no id is twice in a batch. A batch that is larger than `ids`
    must repeat some: then each epoch begins where the last one ended.
    """
    n = len(ids)
    if batch_size <= n:
        epoch, part = divmod(step, n // batch_size)
        return ids[_permutation(n, seed, epoch)[part * batch_size:(part + 1) * batch_size]]
    place = step * batch_size + np.arange(batch_size)
    epochs = range(place[0] // n, place[-1] // n + 1)
    return ids[np.concatenate([_permutation(n, seed, e) for e in epochs])[place - epochs[0] * n]]


def check_batch(pool, batch_size, flags="--batch_size"):
    """Raises ValueError if a batch of distinct examples is larger than the pool; see `batches`."""
    if batch_size > len(pool):
        raise ValueError(f"{flags}: a batch has {batch_size} examples, and only {len(pool)} are "
                         "there to draw it from without replacement: choose a smaller --batch_size")


def batches(pool, *, seed, batch_size, start, stop, host=(0, 1), wrap=False, flags="--batch_size"):
    """Yields the rows of host (index, number of hosts) of the batches of steps start..stop-1.

    wrap: a batch larger than the pool repeats examples, and a line of the log says so. Only for
    training without selection: a selection could take the same example twice.
    flags: what sets the size of the batch, for the error.
    Raises: ValueError, at once, if the batch is larger than the pool and `wrap` is False.
    """
    if not wrap:
        check_batch(pool, batch_size, flags)
    elif batch_size > len(pool):
        logging.warning("a batch of %d repeats examples: only %d are there to draw it from",
                        batch_size, len(pool))
    rows = _rows(batch_size, *host)
    return prefetch(lambda step: pool.read(batch_ids(pool.ids, seed, step, batch_size)[rows]),
                    range(start, stop))


def sweep(pool, batch_size, host=(0, 1)):
    """Yields the rows of host (index, number of hosts) of batches that go once through a pool.

    They come in the order of the ids. The last batch is filled up with the first id, and 'valid',
    bool [rows], is False there.
    """
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
