"""The published SigLIP (2303.15343) and SigLIP 2 (2502.14786): their weights in our tree.

    model, params = siglip.load("siglip-base-patch16-256/")       # Hugging Face's directory
    model, params = siglip.load("webli_en_b16_256_60500360.npz")  # big_vision's file

`load` reads both formats. The architecture is read off the shapes of the tensors. Both formats hold
the same numbers as our tree, under other names and in other shapes, so that a table of names and
one short function are all.

Not supported: the NaFlex models of SigLIP 2, which take images of every shape.

Dimension letters, as in vit.py: P patch side, C channels, D width, F mlp width, L layers, H heads,
K width of a head.
"""

import dataclasses
import json
import math
import pathlib
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from common import vit


@dataclasses.dataclass(frozen=True)
class SigLIP:
    """Two towers and the loss between them, with the fields of jest.Model."""
    image: vit.ViT
    text: vit.Text
    loss: str = "sigmoid"


def is_published(path):
    """Whether a path looks like published weights: a file that `load` reads, there or not, or a
    directory with one. A checkpoint of our own is a directory of another kind."""
    path = pathlib.Path(path)
    return path.suffix in (".npz", ".safetensors") or any(path.glob("*.safetensors"))


# ------------------------------------------------------------------------ what the towers are shown

RESOLUTIONS = (224, 256, 384, 512)  # of the published models, in pixels


def preprocess(image_HWC, side):
    """uint8 image with 1 or 3 channels -> uint8 [side, side, 3], squashed to a square and not cut.

    It is resized bilinearly with antialiasing; big_vision's own evaluation does without the latter.
    Scale the pixels to [-1, 1] before the tower gets them."""
    image = PIL.Image.fromarray(np.repeat(image_HWC, 3 // image_HWC.shape[-1], -1))
    return np.asarray(image.resize((side, side), PIL.Image.BILINEAR))


def tokenize(text, encode, config):
    """A string -> int32 [context] for the text tower `config`.

    `encode` gives the raw ids of the model's own sentencepiece file. The text is made lower case
    and cut so that id 1 always ends it. SigLIP pads with that same id, SigLIP 2 with 0; they are
    told apart by their vocabularies."""
    ids = [*encode(text.lower())[:config.context - 1], 1]
    pad = 0 if config.vocab == 256_000 else 1
    return np.array(ids + [pad] * (config.context - len(ids)), np.int32)


# -------------------------------------------------------------------------------------------- names

# Each row is a name in our tree, in big_vision and in Hugging Face. A whole name has up to three
# parts, one from each table: 'image/blocks', 'mlp/up', 'w'. We stack the blocks of a tower in one
# array; the others keep them apart, under names with the number {i} of the block.
OURS, BIG_VISION, HUGGING_FACE = range(3)
PARTS = ((
    ("image/embed", "img/embedding", "vision_model.embeddings.patch_embedding"),
    ("image/position", "img/pos_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("image/blocks", "img/Transformer/encoderblock_{i}", "vision_model.encoder.layers.{i}"),
    ("image/norm", "img/Transformer/encoder_norm", "vision_model.post_layernorm"),
    ("image/pool", "img/MAPHead_0", "vision_model.head"),
    ("image/head", "img/head", "not in Hugging Face's model"),
    ("text/embed", "txt/Embed_0/embedding", "text_model.embeddings.token_embedding.weight"),
    ("text/position", "txt/pos_embedding", "text_model.embeddings.position_embedding.weight"),
    ("text/blocks", "txt/Encoder_0/encoderblock_{i}", "text_model.encoder.layers.{i}"),
    ("text/norm", "txt/Encoder_0/encoder_norm", "text_model.final_layer_norm"),
    ("text/pool", "txt/MAPHead_0", "not in Hugging Face's model"),
    ("text/head", "txt/head", "text_model.head"),
    ("log_t", "t", "logit_scale"),
    ("b", "b", "logit_bias"),
), (
    ("norm_attention", "LayerNorm_0", "layer_norm1"),
    ("attention/q", "MultiHeadDotProductAttention_0/query", "self_attn.q_proj"),
    ("attention/k", "MultiHeadDotProductAttention_0/key", "self_attn.k_proj"),
    ("attention/v", "MultiHeadDotProductAttention_0/value", "self_attn.v_proj"),
    ("attention/o", "MultiHeadDotProductAttention_0/out", "self_attn.out_proj"),
    ("norm_mlp", "LayerNorm_1", "layer_norm2"),
    ("norm", "LayerNorm_0", "layernorm"),  # of the pooling head
    ("mlp/up", "MlpBlock_0/Dense_0", "mlp.fc1"),
    ("mlp/down", "MlpBlock_0/Dense_1", "mlp.fc2"),
), (
    ("w", "kernel", "weight"),
    ("b", "bias", "bias"),
    ("scale", "scale", "weight"),
    ("bias", "bias", "bias"),
    ("probe", "probe", "probe"),
))


def their_name(key, scheme):
    """'image/blocks/mlp/up/w' -> 'vision_model.encoder.layers.{i}.mlp.fc1.weight'."""
    parts = []
    for table in PARTS:
        for row in table:
            if f"{key}/".startswith(f"{row[OURS]}/"):
                parts.append(row[scheme])
                key = key[len(row[OURS]) + 1:]
                break
    return {BIG_VISION: "/", HUGGING_FACE: "."}[scheme].join(parts)


# ------------------------------------------------------------------------------ shapes and values


def from_theirs(key, x, shape, scheme):
    """One tensor of a file as a float32 leaf of our tree, of the given shape."""
    if x.dtype.kind == "V":  # an .npz file keeps bfloat16 as bytes without a type
        x = x.view(jnp.bfloat16)
    if scheme == HUGGING_FACE and key == "image/embed/w":
        x = x.transpose(2, 3, 1, 0)  # D C P P -> P P C D
    elif scheme == HUGGING_FACE and key.endswith("/w"):
        x = x.T
    # The rest differs only in axes of length one and in heads that are split off the width.
    return np.asarray(x, np.float32).reshape(shape)


def init(key, model):
    """Parameters of both towers; t = exp(log_t) starts at 10 and b at -10."""
    key_image, key_text = jax.random.split(key)
    return {"image": vit.vit_init(key_image, model.image),
            "text": vit.text_init(key_text, model.text),
            "log_t": jnp.log(10.0), "b": jnp.array(-10.0)}


def to_ours(tensors, model, scheme):
    """Tensors by their names -> our parameters. Raises ValueError for a tensor without a place.

    Takes out of `tensors` what it uses, so that it can be freed."""
    def leaf(path, like):
        key = "/".join(part.key for part in path)
        name = their_name(key, scheme)
        if "{i}" not in name:
            return from_theirs(key, tensors.pop(name), like.shape, scheme)
        return np.stack([from_theirs(key, tensors.pop(name.format(i=i)), like.shape[1:], scheme)
                         for i in range(like.shape[0])])
    params = jax.tree_util.tree_map_with_path(
        leaf, jax.eval_shape(lambda: init(jax.random.key(0), model)))
    if tensors:
        raise ValueError(f"not a SigLIP, it has a tensor {min(tensors)!r}")
    return params


# ------------------------------------------------------------------------------- the two converters


def read_model(shape, tensors, patch, channels, heads, scheme):
    """The architecture.

    `shape(key)` is the shape of the file's tensor for one of our leaves, in the first block where
    every block has one. `heads` is {'image': n, 'text': n}, or {} if the file does not tell; then
    the sizes in vit.SIZES do. Without a pooling head, images are taken to be pooled by their mean
    and texts at their last token: no tensor tells."""
    def tower(name):
        (D,), (F,) = shape(f"{name}/norm/scale"), shape(f"{name}/blocks/mlp/up/b")
        block = their_name(f"{name}/blocks/norm_mlp/scale", scheme)
        L = next(i for i in range(len(tensors)) if block.format(i=i) not in tensors)
        published = {values[:3]: (size, values[3]) for size, values in vit.SIZES.items()}
        size, H = published.get((D, L, F), (None, None))
        if heads.get(name, H) is None:
            raise ValueError(f"no config.json tells the number of heads of the {name} tower")
        pool = their_name(f"{name}/pool/probe", scheme) in tensors
        head = their_name(f"{name}/head/b", scheme) in tensors
        return {"size": size if heads.get(name, H) == H else f"{D}/{L}/{F}/{heads[name]}",
                "n_out": shape(f"{name}/head/b")[0] if head else 0,
                "pool": "map" if pool else {"image": "gap", "text": "last"}[name]}

    side = math.isqrt(shape("image/position")[-2])
    # So400m/14 has 27 patches a side. That is 378 pixels, but its images have 384 and are cut.
    fitting = [r for r in RESOLUTIONS if r // patch == side]
    vocab, context = shape("text/embed")[0], shape("text/position")[-2]
    return SigLIP(vit.ViT(image_size=(fitting or [side * patch])[0], patch=patch, channels=channels,
                          **tower("image")),
                  vit.Text(vocab=vocab, context=context, mask_padding=False, **tower("text")))


def from_big_vision(tensors):
    """(model, params) of a two-tower model in big_vision's names. Raises KeyError for a tensor
    that is missing."""
    tensors = {name.removeprefix("params/"): x for name, x in tensors.items()
               if not name.startswith("opt/")}  # a checkpoint of a training has both
    for name in [name for name in tensors if "/encoderblock/" in name]:
        for i, x in enumerate(tensors.pop(name)):  # stacked blocks, of a model run by a scan
            tensors[name.replace("encoderblock", f"encoderblock_{i}")] = x
    if "txt/Encoder_0/pos_embedding" in tensors:  # some old models add positions twice
        twice = tensors.pop("txt/Encoder_0/pos_embedding")
        tensors["txt/pos_embedding"] = tensors["txt/pos_embedding"] + twice
    shape = lambda key: tensors[their_name(key, BIG_VISION).format(i=0)].shape
    if len(shape("image/embed/w")) == 2:
        raise NaFlex
    P, _, C, _ = shape("image/embed/w")
    heads = {tower: shape(f"{tower}/blocks/attention/q/b")[0] for tower in ("image", "text")}
    model = read_model(shape, tensors, P, C, heads, BIG_VISION)
    return model, to_ours(tensors, model, BIG_VISION)


def from_hugging_face(tensors, config):
    """(model, params) of a SiglipModel in Hugging Face's names; `config` is its config.json or {}.
    Raises KeyError for a tensor that is missing."""
    tensors = {name: x for name, x in tensors.items() if not name.endswith("position_ids")}
    # Of the pooling head, q, k and v are one matrix. Name its parts like those of a block.
    old, new = "vision_model.head.attention.", "vision_model.head.self_attn."
    for kind in ("weight", "bias"):
        parts = np.split(tensors.pop(f"{old}in_proj_{kind}"), 3)
        tensors |= {f"{new}{letter}_proj.{kind}": x for letter, x in zip("qkv", parts)}
        tensors[f"{new}out_proj.{kind}"] = tensors.pop(f"{old}out_proj.{kind}")
    shape = lambda key: tensors[their_name(key, HUGGING_FACE).format(i=0)].shape
    if len(shape("image/embed/w")) == 2:
        raise NaFlex
    _, C, P, _ = shape("image/embed/w")
    heads = {tower: config.get(f"{name}_config", {}).get("num_attention_heads", 12)  # their default
             for tower, name in (("image", "vision"), ("text", "text"))} if config else {}
    model = read_model(shape, tensors, P, C, heads, HUGGING_FACE)
    return model, to_ours(tensors, model, HUGGING_FACE)


# -------------------------------------------------------------------------------------------- files


class NaFlex(Exception):
    """Raised for a model that takes images of every shape: its embedding is a plain matrix."""


def load(path, *, image_size=None, vocab=None):
    """(model, params) from weights on disk.

    Args:
      path: big_vision's .npz file; a .safetensors file of Hugging Face's SiglipModel; or the
        directory with such files and their config.json, where the number of heads stands if it is
        not that of a published size.
      image_size: side in pixels of the images to come, for which positions are interpolated. By
        default the published resolution that has as many tokens as the file. The patch must divide
        any other.
      vocab: number of pieces of the tokenizer to be used, to be checked against the file.
    Raises: ValueError, one line, for a file that is damaged or not of a SigLIP.
    """
    path = pathlib.Path(path)
    try:
        tensors, config = read(path)
        if "img/embedding/kernel" in tensors or "params/img/embedding/kernel" in tensors:
            model, params = from_big_vision(tensors)
        else:
            model, params = from_hugging_face(tensors, config)
    except NaFlex:
        raise ValueError(
            f"{path}: a NaFlex model of SigLIP 2; use one of fixed resolution") from None
    except KeyError as e:
        raise ValueError(f"{path}: not a SigLIP, it has no tensor {e}") from None
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: {str(e).splitlines()[0]}") from None
    # The tokenizer of big_vision's multilingual model ends with 100 pieces that no text contains.
    if vocab is not None and not model.text.vocab <= vocab <= model.text.vocab + 100:
        raise ValueError(f"{path}: the tokenizer has {vocab:,} pieces and the text tower "
                         f"{model.text.vocab:,}")
    if image_size and image_size != model.image.image_size:
        if image_size % model.image.patch:
            raise ValueError(f"{path}: its patch of {model.image.patch} pixels does not divide an "
                             f"image side of {image_size}")
        image = dataclasses.replace(model.image, image_size=image_size)
        model = dataclasses.replace(model, image=image)
        params["image"]["position"] = resize(params["image"]["position"], image.tokens)
    return model, params


def resize(position_ND, n):
    """Positions on a square grid, interpolated (bilinear) to a grid of n."""
    if len(position_ND) == n:
        return position_ND
    old, new = math.isqrt(len(position_ND)), math.isqrt(n)
    grid = position_ND.reshape(old, old, -1)
    return np.array(jax.image.resize(grid, (new, new, grid.shape[-1]), "bilinear")).reshape(n, -1)


def read(path):
    """({name: array}, config.json or {})."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError("no .safetensors file in this directory")
    if files[0].suffix == ".npz":
        try:
            with np.load(files[0]) as tensors:
                return dict(tensors), {}
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as e:
            raise ValueError(f"the file is cut off or not an .npz file ({e})") from None
    if files[0].suffix != ".safetensors":
        raise ValueError("neither an .npz nor a .safetensors file")
    config = files[0].parent / "config.json"
    tensors = {}
    for file in files:
        tensors |= read_safetensors(file)
    return tensors, json.loads(config.read_text()) if config.exists() else {}


DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
          "I64": np.int64}  # the last only for the position_ids of old files


def read_safetensors(path):
    """{name: array}, each left on disk until it is used.

    The format needs no package: the length of the header as 8 bytes, the header as JSON, the data.
    """
    data = np.memmap(path, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > len(data):
        raise ValueError("the file is cut off or not a .safetensors file")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    if start + max(entry["data_offsets"][1] for entry in header.values()) > len(data):
        raise ValueError("the file is cut off")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"tensor {name!r} is of type {entry['dtype']}; want {list(DTYPES)}")
        begin, end = entry["data_offsets"]
        x = data[start + begin:start + end].view(DTYPES[entry["dtype"]])
        tensors[name] = x.reshape(entry["shape"])
    return tensors
