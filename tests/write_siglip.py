"""Writes weights as big_vision and Hugging Face do, so that the tests have files to load."""

import json

import numpy as np
import jax

from common import siglip, vit


def to_big_vision(params, model):
    """Our weights as tensors in big_vision's names, for `np.savez(path, **tensors)`."""
    return to_names(params, model, siglip.BIG_VISION)


def to_hugging_face(params, model):
    """Our weights as tensors in Hugging Face's names, for `write_safetensors`."""
    tensors = to_names(params, model, siglip.HUGGING_FACE)
    old, new = "vision_model.head.self_attn.", "vision_model.head.attention."
    for kind in ("weight", "bias"):
        parts = [tensors.pop(f"{old}{letter}_proj.{kind}") for letter in "qkv"]
        tensors[f"{new}in_proj_{kind}"] = np.concatenate(parts)
        tensors[f"{new}out_proj.{kind}"] = tensors.pop(f"{old}out_proj.{kind}")
    return tensors


def to_names(params, model, scheme):
    """Our parameters -> tensors by their names."""
    tensors = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        key = "/".join(part.key for part in path)
        name = siglip.their_name(key, scheme)
        blocks = enumerate(np.asarray(x)) if "{i}" in name else [(None, x)]
        tensors |= {name.format(i=i): to_theirs(key, one, model, scheme) for i, one in blocks}
    return tensors


def to_theirs(key, x, model, scheme):
    """The inverse of `siglip.from_theirs`; x is one block's leaf where blocks are stacked."""
    x = np.asarray(x)
    P, C = model.image.patch, model.image.channels
    if key == "image/embed/w":
        x = x.reshape(P, P, C, -1)
        return x.transpose(3, 2, 0, 1) if scheme == siglip.HUGGING_FACE else x
    if key in ("log_t", "b") or key.endswith("/probe") or (
            key.endswith("/position") and scheme == siglip.BIG_VISION):
        return x[None]
    if scheme == siglip.HUGGING_FACE:
        return x.T if key.endswith("/w") else x
    if "/attention/" in key:
        tower = model.image if key.startswith("image") else model.text
        width, _, _, heads = vit.size(tower.size)
        split = (heads, width // heads)
        if "/o/" not in key:
            return x.reshape(*x.shape[:-1], *split)  # D D -> D H K, and D -> H K for a bias
        if key.endswith("/w"):
            return x.reshape(*split, width)
    return x


def write_safetensors(path, tensors):
    """Writes {name: float32 array} so that `read_safetensors` and others can read it."""
    header, end = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [end, end + 4 * x.size]}
        end += 4 * x.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(np.ascontiguousarray(x, np.float32).tobytes())
