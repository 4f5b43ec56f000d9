"""Reading prepared TFDS data sets by id, without TensorFlow, with one decoder for all machines.

Whatever an image file or a tensor may hold is read if it has one reading, and refused at the start
if it has none. Every error is one line, a ValueError, that names the flag or the example.
"""

import functools
import hashlib
import io
import json
import os

import numpy as np
import PIL.Image

SCAN_BYTES = 2**31  # a split whose records are smaller than this is read whole when it is opened


class Split:
    """The examples of a split such as 'train[:90%]' of a TFDS name or a prepared TFDS directory.

    `ids` int64 [N] are places in the whole split; `name` tells the split from others. `read(ids)`
    -> {'image': uint8 [n, H, W, C]; 'label': int32 [n], or absent; 'caption': n strings, or
    absent}. `class_names` are () without labels. `fingerprint`: see `scan`. `wrong_labels` says
    why the set's labels are left out, or is ''.

    Args: see `data.open_source`; without `captions` they are not read. Raises: ValueError.
    """

    def __init__(self, dataset, split, *, data_dir, image_size, captions, need, flags):
        import tensorflow_datasets as tfds  # here and not above: it takes seconds, toy needs none
        of, at = f"--{flags[0]}={dataset}", f"--{flags[1]}={split}"
        self.place, self.image_size, self.at = f"{at} of {dataset}", image_size, at
        builder = open_builder(dataset, data_dir, of)
        self.features = features = builder.info.features
        whole, self.ids = part(builder, split, self.place)
        self.info = builder.info.splits[whole]
        self.name = f"{builder.info.full_name}/{whole}[{self.ids[0]}:{self.ids[-1] + 1}]"
        self.fields = find_fields(features, need, of)
        if not captions:
            self.fields.pop("caption", None)
        self.channels = count_channels(features["image"], image_size, of)
        self.class_names = tuple(features["label"].names) if "label" in self.fields else ()
        is_file = isinstance(features["image"], tfds.features.Image)
        self.float_png = is_file and features["image"].np_dtype == np.float32
        # Left alone, TFDS decodes files with OpenCV if it is installed and with PIL otherwise. The
        # pixels then differ, and neither converts modes. So files come here as they are stored.
        self.decoders = {"image": tfds.decode.SkipDecoding()} if is_file else {}
        try:
            self.raw = builder.as_data_source(
                split=whole, file_format="array_record",
                deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        except (NotImplementedError, ValueError):
            raise ValueError(f"{of} is prepared as {builder.info.file_format.value}: prepare it "
                             "again with file_format='array_record'") from None
        except Exception as e:
            raise ValueError(f"{self.place}: {reason(e)}") from None
        self.fingerprint, looked_at, label = self.scan()
        self.wrong_labels = self.find_wrong(looked_at, label)
        if self.wrong_labels:
            if "label" in need:
                raise ValueError(f"{at}: {self.wrong_labels}; choose another")
            del self.fields["label"]
            self.class_names = ()
        self.check_images()

    def read(self, ids):
        rows = self.parse(ids, self.records(ids), "image", "label", "caption")
        out = {"image": np.stack([self.named(i, "image", self.image, row)
                                  for i, row in zip(ids, rows)])}
        if "label" in self.fields:
            label = np.array([row["label"] for row in rows])
            if wrong := self.find_wrong(ids, label):  # where `scan` did not look at all of them
                raise ValueError(f"{self.at}: {wrong}; choose another")
            out["label"] = label.astype(np.int32)
        if "caption" in self.fields:
            out["caption"] = [self.named(i, "caption", first_text, row["caption"])
                              for i, row in zip(ids, rows)]
        return out

    def describe(self, ids):
        """Of each example the caption, else the name of its class, else ''."""
        def text(i, row):
            if "caption" in row:
                return self.named(i, "caption", first_text, row["caption"])
            return self.class_names[row["label"]] if "label" in row else ""
        return [text(i, row) for some in in_parts(ids) for i, row in zip(
            some, self.parse(some, self.records(some), "label", "caption"))]

    def records(self, ids):
        """The records as bytes."""
        try:
            records = self.raw.__getitems__([int(i) for i in ids])  # TFDS wants Python ints
        except Exception:  # one of them is broken: read them one by one to name it
            records = [self.named(i, "record", self.raw.__getitem__, int(i)) for i in ids]
        for i, record in zip(ids, records):
            if not record:  # of a file that was cut short
                raise ValueError(f"{self.place}: record of example {i}: it is empty")
        return records

    def parse(self, ids, records, *fields):
        """For each record, {field: what is stored in it} for those of the fields that it has."""
        import tensorflow_datasets as tfds
        names = {field: self.fields[field] for field in fields if field in self.fields}
        features = tfds.features.FeaturesDict({k: self.features[k] for k in names.values()})
        decode = functools.partial(features.deserialize_example_np, decoders={
            k: v for k, v in self.decoders.items() if k in features})
        rows = [self.named(i, "record", decode, record) for i, record in zip(ids, records)]
        return [{field: row[name] for field, name in names.items()} for row in rows]

    def named(self, i, field, function, *args):
        """function(*args). Its errors name the example and the field."""
        try:
            return function(*args)
        except Exception as e:  # TFDS, array_record, PIL and unicode each have their own types
            raise ValueError(f"{self.place}: {field} of example {i}: {reason(e)}") from None

    def image(self, row):
        """uint8 [H, W, C]."""
        image = picture(pixels(row["image"], self.float_png), self.channels)
        height, width = self.features["image"].shape[:2]
        if not self.image_size and image.size != (width, height):
            raise ValueError(f"it has {image.height} x {image.width} pixels, and its feature says "
                             f"{height} x {width}: give --image_size")
        image = fit(image, self.image_size)
        return np.asarray(image).reshape(image.height, image.width, self.channels)

    def scan(self):
        """Reads the records -> (fingerprint, ids [n], labels int64 [n]), n = 0 without labels.

        The fingerprint is a sha256 of the features, the class names, and the bytes of all records
        in their order. So it changes with any image, label or caption, and not with the place of
        the files. Of more than SCAN_BYTES only 10,000 evenly spaced records are looked at. Then the
        sizes stand for the others: a change of few records that keeps their bytes goes unseen.
        """
        ids = self.ids
        features = json.dumps(self.features.to_json(), sort_keys=True)  # their order is random
        sha = hashlib.sha256(repr((features, self.class_names)).encode())
        if self.info.num_bytes / self.info.num_examples * len(ids) > SCAN_BYTES:
            ids = spread(ids, 10_000)
            sizes = [os.path.getsize(path) for path in self.info.filepaths]
            sha.update(repr((self.info.num_bytes, sizes)).encode())
        labels = []
        for some in in_parts(ids):
            records = self.records(some)
            for record in records:
                sha.update(b"%d," % len(record) + record)
            if "label" in self.fields:
                labels += [row["label"] for row in self.parse(some, records, "label")]
        return sha.hexdigest(), ids[:len(labels)], np.array(labels, np.int64)

    def find_wrong(self, ids, label):
        """What is wrong with labels that name no class, or ''."""
        wrong = np.flatnonzero((label < 0) | (label >= len(self.class_names)))
        if len(wrong) == 0:
            return ""
        if (label == -1).all():
            return "its labels are -1, it is not labelled"
        return (f"{len(wrong)} of {len(label)} labels are not from 0 to {len(self.class_names) - 1}"
                f", as the {label[wrong[0]]} of example {ids[wrong[0]]}")

    def check_images(self, sample=32):
        """Decodes some of the images. Raises ValueError if they do not have one reading."""
        ids, highest = spread(self.ids, sample), 0
        for i, row in zip(ids, self.parse(ids, self.records(ids), "image")):
            self.named(i, "image", self.image, row)
            values = pixels(row["image"], self.float_png)
            if isinstance(values, np.ndarray) and values.dtype.str[1:] == "u2":
                highest = max(highest, values.max())
        # Such images have 8, 10 or 12 bits in truth. Their high bytes would be nearly black.
        if 0 < highest < 2**12:
            raise ValueError(f"{self.place}: its 16-bit images go to {highest} of 65535 only (of "
                             f"{len(ids)} looked at): prepare them with 8 bits, or with all 16")


def reason(error):
    """The first line of what an exception says. TFDS's can fill pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def spread(ids, n):
    """At most n of the ids, evenly spaced."""
    return ids[np.linspace(0, len(ids) - 1, min(n, len(ids))).astype(int)]


def first_text(stored):
    """The caption, of a text, several texts, or a dict of them as in coco_captions."""
    text = stored["text"] if isinstance(stored, dict) else stored
    if isinstance(text, (list, tuple, np.ndarray)):
        text = text[0] if len(text) else ""
    return text.decode() if isinstance(text, bytes) else text


# ------------------------------------------------------------------------------ what there is


def open_builder(dataset, data_dir, of):
    """The TFDS builder of a prepared data set; `of` names it in errors."""
    import tensorflow_datasets as tfds
    path = os.path.expanduser(dataset)
    if dataset.startswith(("/", "./", "../", "~")) and not os.path.isdir(path):
        raise ValueError(f"{of}: no such directory")
    try:
        builder = (tfds.builder_from_directory(path) if os.path.isdir(path) else
                   tfds.builder(dataset, data_dir=data_dir and os.path.expanduser(data_dir),
                                file_format="array_record"))
    except Exception as e:
        if os.path.isdir(path):
            raise ValueError(f"{of} holds no prepared data set: name the directory of its version, "
                             "such as data/mine/1.0.0") from None
        raise ValueError(f"{of}: no such directory, and no TFDS name "
                         f"({reason(e)})") from None
    if not builder.info.splits:
        raise ValueError(
            f"{of}: not prepared under {builder.data_dir}. Prepare it once with "
            f"`pip install tensorflow && python -c \"import tensorflow_datasets as tfds; "
            f"tfds.builder('{dataset}', file_format='array_record').download_and_prepare()\"`, or "
            "name its place with --data_dir; docs/data/make.py builds some sets without TensorFlow")
    return builder


def part(builder, split, place):
    """(name of the whole split, ids) of a split such as 'train[:90%]'."""
    import tensorflow_datasets as tfds
    try:
        (given,) = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except Exception:
        raise ValueError(f"{place}: it has the splits {', '.join(builder.info.splits)}, and parts "
                         "of one such as 'train[:90%]'") from None
    total = builder.info.splits[given.splitname].num_examples
    ids = np.arange(given.from_ or 0, total if given.to is None else given.to)
    if len(ids) == 0:
        raise ValueError(f"{place} holds no example")
    return given.splitname, ids


def find_fields(features, need, of):
    """{'image' and, where there are any, 'label' and 'caption': name of the feature}.

    A label is one ClassLabel. A caption is a text, or several texts, of which the first is read.
    """
    import tensorflow_datasets as tfds

    def is_text(feature):
        kind = feature.np_dtype
        return (kind.get("text") if isinstance(kind, dict) else kind) == np.object_

    found = {"image": "image"} if "image" in features else {}
    label = features["label"] if "label" in features else None
    if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
        found["label"] = "label"
    found |= {"caption": name for name in ("text", "captions", "caption")
              if name in features and is_text(features[name])}
    for field in ("image", *need):
        if field not in found:
            what = (f"its label is {label}, not a class" if field == "label" and label
                    else f"it has no feature {field!r}")
            raise ValueError(f"{of}: {what} (of {', '.join(features)}): choose another data set "
                             "(rho_learnability.py: or another --task)")
    return found


def count_channels(feature, image_size, of):
    """1 or 3: what to read an image feature as. Raises: ValueError if it holds no such images."""
    shape = feature.shape if isinstance(feature.shape, tuple) else ()
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (None, 0, 1, 2, 3, 4)):
        raise ValueError(f"{of}: its image is {' '.join(str(feature).split())}, and must be "
                         "[height, width] or [height, width, 1 to 4 channels]")
    if not image_size and (None in shape[:2] or shape[0] != shape[1]):
        raise ValueError(f"{of} has images of shape {shape}: give --image_size")
    return 1 if shape[2:] in ((), (1,), (2,)) else 3


# ------------------------------------------------------------------------------------- images


def pixels(stored, float_png=False):
    """What is stored as an image -> a PIL image of 8 bits a channel, or an array of any depth.

    stored: an encoded file (bytes), or an array. float_png: the file is TFDS's way to store float32
    images, a PNG whose four channels are the four bytes of each number.
    """
    if not isinstance(stored, bytes):
        return np.asarray(stored)
    try:
        image = PIL.Image.open(io.BytesIO(stored))  # of an animation, the first frame
    except PIL.UnidentifiedImageError:
        raise ValueError(f"its {len(stored)} bytes are no image file that PIL knows") from None
    if float_png:
        return np.asarray(image.convert("RGBA")).view("<f4")
    if not image.mode.startswith(("I", "F")):
        return image
    array = np.asarray(image)
    # PIL opens some 16-bit files in its mode "I", which has 32 bits.
    in_16_bits = image.mode == "I" and 0 <= array.min() and array.max() < 2**16
    return array.astype(np.uint16) if in_16_bits else array


def picture(values, channels):
    """A PIL image, in mode L for 1 channel or RGB for 3, of what `pixels` returns.

    Arrays are [H, W] or [H, W, C], where C = 1 is grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
    Colours are turned into grey and grey into colours. Transparent pixels are laid over white.
    Raises: ValueError for another shape, and see `eight_bits`.
    """
    if isinstance(values, np.ndarray):
        if values.ndim not in (2, 3) or values.size == 0 or max(values.shape[2:], default=1) > 4:
            raise ValueError(f"its shape is {values.shape}, and must be [height, width] or "
                             "[height, width, 1 to 4 channels]")
        values = eight_bits(values)
        values = PIL.Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values)
    if values.has_transparency_data:
        white = PIL.Image.new("RGBA", values.size, "white")
        values = PIL.Image.alpha_composite(white, values.convert("RGBA"))
    if values.mode not in ("1", "L"):
        values = values.convert("RGB")
    return values.convert("L" if channels == 1 else "RGB")


def eight_bits(array):
    """The values as uint8.

    False and True become 0 and 255. Of 16 bits the high byte is kept, as PIL does for files of
    16-bit colours. Floats must be from 0 to 1. Other integers must be from 0 to 255.
    Raises: ValueError for another range or dtype.
    """
    kind = array.dtype.kind
    if kind == "b":
        return array * np.uint8(255)
    if array.dtype.str[1:] == "u2":
        return (array >> 8).astype(np.uint8)
    if kind not in "iuf":
        raise ValueError(f"its values are {array.dtype}, not numbers")
    high = 1 if kind == "f" else 255
    if not (0 <= array.min() and array.max() <= high):  # written so that NaN is refused too
        raise ValueError(f"its {array.dtype} values go from {array.min()} to {array.max()}, and "
                         f"must be from 0 to {high}")
    return (np.rint(array * 255.0) if kind == "f" else array).astype(np.uint8)


def in_parts(ids):
    """ids, 256 at a time. To read one record takes nearly as long as to read so many."""
    return np.split(ids, range(256, len(ids), 256))


def fit(image, side):
    """A PIL image -> its centre square, resized to `side` pixels. Unchanged if it fits, or side 0.

    This equals resizing the shorter side to `side` and then cutting out the centre: the pixels are
    the same, but for rounding by 1 of 255 in one of 500. But only the centre is computed, so that
    a picture of 1 x 20,000 pixels needs no gigabytes.
    """
    if not side or image.size == (side, side):
        return image
    height, scale, box = image.height, side / min(image.size), []
    for length in image.size:
        resized = max(side, round(length * scale))
        first = (resized - side) // 2
        box.append((first * length / resized, (first + side) * length / resized))
    (left, right), (top, bottom) = box
    # PIL chooses the order of the two directions by size. Bicubic values are clipped after each, so
    # the order shows in the pixels: across, then down, is the one for a picture resized whole.
    image = image.resize((side, height), PIL.Image.BICUBIC, box=(left, 0, right, height))
    return image.resize((side, side), PIL.Image.BICUBIC, box=(0, top, side, bottom))
