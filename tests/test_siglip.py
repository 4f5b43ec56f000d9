"""common/siglip.py against transformers' SiglipModel and big_vision's two_towers, whose outputs
tests/make_siglip.py has put into tests/siglip/."""

import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import siglip, vit
import write_siglip

FOLDER = pathlib.Path(__file__).parent / "siglip"
FILES = {"hugging_face": FOLDER, "big_vision": FOLDER / "big_vision.npz"}
OUTPUTS = dict(np.load(FOLDER / "outputs.npz"))
IMAGE, TOKENS = OUTPUTS["input/image"], OUTPUTS["input/tokens"]


@pytest.fixture(scope="module", params=FILES)
def loaded(request):
    """(name of the other implementation, model, params)"""
    return request.param, *siglip.load(FILES[request.param])


def forward(params, model):
    """What the others give: embeddings of unit length, logits and the sigmoid loss."""
    unit = lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    image = unit(vit.vit_apply(params["image"], IMAGE, model.image))
    text = unit(vit.text_apply(params["text"], TOKENS, model.text))
    logits = jnp.exp(params["log_t"]) * image @ text.T + params["b"]
    sign = 2 * jnp.eye(len(logits)) - 1
    loss = jnp.log1p(jnp.exp(-sign * logits)).sum(1).mean()
    return {"image": image, "text": text, "logits": logits, "loss": loss}


def assert_outputs(name, model, params):
    with jax.default_matmul_precision("float32"):
        ours = forward(params, model)
    for key, x in ours.items():
        theirs = OUTPUTS[f"{name}/{key}"]
        np.testing.assert_allclose(x, theirs, rtol=1e-5, atol=1e-5, err_msg=key)


def test_the_outputs_are_those_of_the_other_implementation(loaded):
    assert_outputs(*loaded)


def test_the_architecture_is_read_off_the_shapes(loaded):
    _, model, params = loaded
    assert model == siglip.SigLIP(
        vit.ViT("16/2/24/2", 12, 4, 0, pool="map"),
        vit.Text("12/3/20/3", 20, 6, 16, pool="last", mask_padding=False))
    shapes = jax.eval_shape(lambda: siglip.init(jax.random.key(0), model))
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for x, like in zip(jax.tree.leaves(params), jax.tree.leaves(shapes)):
        assert x.shape == like.shape and x.dtype == np.float32


def exported(name, params, model, folder):
    if name == "big_vision":
        np.savez(folder / "out.npz", **write_siglip.to_big_vision(params, model))
        return folder / "out.npz"
    shutil.copy(FOLDER / "config.json", folder)
    write_siglip.write_safetensors(folder / "out.safetensors",
                                   write_siglip.to_hugging_face(params, model))
    return folder


def test_weights_written_back_are_the_file_again(loaded, tmp_path):
    name, model, params = loaded
    path = exported(name, params, model, tmp_path)
    ours, theirs = siglip.read(path)[0], siglip.read(FILES[name])[0]
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_weights_pass_from_one_scheme_to_the_other(loaded, tmp_path):
    name, model, params = loaded
    other, = set(FILES) - {name}
    model_2, params_2 = siglip.load(exported(other, params, model, tmp_path))
    assert model_2 == model
    assert_outputs(name, model_2, params_2)


def test_heads_and_pooling_that_no_published_model_has_are_read_off_the_shapes(tmp_path):
    model = siglip.SigLIP(vit.ViT("8/2/12/2", 8, 4, 5),
                          vit.Text("8/1/12/2", 9, 6, 5, pool="map", mask_padding=False))
    params = jax.jit(siglip.init, static_argnums=1)(jax.random.key(0), model)
    model_2, params_2 = siglip.load(exported("big_vision", params, model, tmp_path))
    assert model_2 == model
    jax.tree.map(np.testing.assert_array_equal, params, params_2)


def write_npz(path, tensors):
    np.savez(path, **tensors)
    return path


def test_old_and_stacked_files_of_big_vision(tmp_path):
    """A checkpoint with the optimiser's state, blocks stacked by a scan, positions stored twice."""
    old = dict(np.load(FILES["big_vision"]))
    for tower in ("img/Transformer", "txt/Encoder_0"):
        depth = {"img/Transformer": 2, "txt/Encoder_0": 3}[tower]
        for name in [name for name in old if name.startswith(f"{tower}/encoderblock_0/")]:
            old[name.replace("block_0", "block")] = np.stack(
                [old.pop(name.replace("block_0", f"block_{i}")) for i in range(depth)])
    part = np.float32(0.25) * old["txt/pos_embedding"]
    old["txt/pos_embedding"], old["txt/Encoder_0/pos_embedding"] = 3 * part, part
    old = {f"params/{name}": x for name, x in old.items()} | {"opt/0/count": np.array(3)}
    model, params = siglip.load(write_npz(tmp_path / "old.npz", old))
    assert model == siglip.load(FILES["big_vision"])[0]
    assert_outputs("big_vision", model, params)


def test_half_precision_files_are_read_to_float32(tmp_path):
    source = siglip.read_safetensors(FOLDER / "model.safetensors")
    shutil.copy(FOLDER / "config.json", tmp_path)
    header, data = {}, b""
    for i, (name, x) in enumerate(source.items()):
        kind, dtype = [("BF16", jnp.bfloat16), ("F16", np.float16)][i % 2]
        raw = np.asarray(x).astype(dtype).tobytes()
        header[name] = {"dtype": kind, "shape": x.shape,
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    npz = {name: x.astype(jnp.bfloat16) for name, x in np.load(FILES["big_vision"]).items()}
    write_npz(tmp_path / "half.npz", npz)
    for exact, half in ((FOLDER, tmp_path), (FILES["big_vision"], tmp_path / "half.npz")):
        for x, y in zip(*(jax.tree.leaves(siglip.load(path)[1]) for path in (exact, half))):
            assert y.dtype == np.float32
            np.testing.assert_allclose(y, x, rtol=2**-8, atol=1e-6)


# The counts are those of transformers' SiglipModel with the published configurations.
@pytest.mark.parametrize("image,text,side,patch,vocab,context,count", [
    ("B", "B", 224, 16, 32_000, 64, 203_155_970),
    ("B", "B", 256, 16, 32_000, 64, 203_202_050),
    ("L", "L", 256, 16, 32_000, 64, 652_150_786),
    ("So400m", "So400m", 224, 14, 32_000, 16, 877_360_306),
    ("So400m", "So400m", 384, 14, 32_000, 64, 877_960_498),
    ("B", "B", 224, 16, 256_000, 64, 375_187_970),
    ("So400m", "So400m", 256, 16, 256_000, 64, 1_135_670_962),
    ("g-opt", "So400m", 384, 16, 256_000, 64, 1_871_885_426),
])
def test_parameter_counts_of_published_models(image, text, side, patch, vocab, context, count):
    width = vit.SIZES[image][0]
    model = siglip.SigLIP(vit.ViT(image, side, patch, 0, pool="map"),
                          vit.Text(text, vocab, context, width, pool="last", mask_padding=False))
    shapes = jax.eval_shape(lambda: siglip.init(jax.random.key(0), model))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_a_published_model_is_known_by_its_shapes_alone():
    """So400m/14 at 384 pixels: 27 patches a side, the rest cut; heads by the size."""
    model = siglip.SigLIP(vit.ViT("So400m", 384, 14, 0, pool="map"),
                          vit.Text("So400m", 32_000, 64, 1152, pool="last", mask_padding=False))
    assert model.image.tokens == 729
    params = jax.eval_shape(lambda: siglip.init(jax.random.key(0), model))
    shapes = {siglip.their_name("/".join(k.key for k in path), siglip.HUGGING_FACE): x.shape
              for path, x in jax.tree_util.tree_leaves_with_path(params)}
    blocks = {name.format(i=i) for name in shapes for i in range(27)}
    shape = lambda key: params["image"]["blocks"]["mlp"]["up"]["b"].shape[1:] if (
        key.endswith("blocks/mlp/up/b")) else shapes[siglip.their_name(key, siglip.HUGGING_FACE)]
    assert siglip.read_model(shape, blocks, 14, 3, {}, siglip.HUGGING_FACE) == model


def test_positions_are_interpolated_for_images_of_another_size():
    model, params = siglip.load(FOLDER, image_size=24)
    assert model.image.tokens == 36 == len(params["image"]["position"])
    x = np.arange(3.0)
    plane = (2 * x[:, None] - x)[..., None].reshape(9, 1)
    big = siglip.resize(plane, 36).reshape(6, 6)
    # Between the outermost centres of the old grid, a plane stays a plane.
    np.testing.assert_allclose(np.diff(big[1:5, 1:5], axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(np.diff(big[1:5, 1:5], axis=1), -0.5, rtol=1e-6)


# -------------------------------------------------------------------------------------- bad files


def refusal(path, **options):
    with pytest.raises(ValueError) as e:
        siglip.load(path, **options)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(name, share, tmp_path):
    source = {"hugging_face": FOLDER / "model.safetensors"}.get(name, FILES[name])
    whole = source.read_bytes()
    (tmp_path / source.name).write_bytes(whole[:int(share * len(whole))])
    message = refusal(tmp_path / source.name)
    assert "cut off" in message


def test_other_models_are_refused(tmp_path):
    with np.load(FILES["big_vision"]) as file:
        tensors = dict(file)
    zeros = lambda *shape: np.zeros(shape, np.float32)
    clip = tmp_path / "clip.safetensors"
    write_siglip.write_safetensors(clip, {
        "logit_scale": zeros(), "text_projection.weight": zeros(4, 4),
        "vision_model.embeddings.class_embedding": zeros(4),
        "vision_model.embeddings.patch_embedding.weight": zeros(4, 3, 2, 2)})
    assert "not a SigLIP" in refusal(clip)
    token = write_npz(tmp_path / "token.npz", {**tensors, "img/cls": zeros(1, 1, 16)})
    assert "not a SigLIP" in refusal(token) and "img/cls" in refusal(token)
    softmax = write_npz(tmp_path / "softmax.npz", {k: x for k, x in tensors.items() if k != "b"})
    assert "no tensor 'b'" in refusal(softmax)
    assert "no such" in refusal(tmp_path / "nothing.npz").lower()
    (tmp_path / "pytorch_model.bin").write_bytes(b"abc")
    assert "neither" in refusal(tmp_path / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    assert "no .safetensors" in refusal(tmp_path / "empty")
    shutil.copy(FOLDER / "model.safetensors", tmp_path)  # without its config.json
    assert "config.json" in refusal(tmp_path / "model.safetensors")


def test_a_naflex_model_is_refused(tmp_path):
    with np.load(FILES["big_vision"]) as file:
        tensors = dict(file)
    kernel = tensors["img/embedding/kernel"]
    tensors["img/embedding/kernel"] = kernel.reshape(-1, kernel.shape[-1])
    assert "NaFlex" in refusal(write_npz(tmp_path / "naflex.npz", tensors))
    tensors = siglip.read_safetensors(FOLDER / "model.safetensors")
    name = "vision_model.embeddings.patch_embedding.weight"
    tensors[name] = tensors[name].reshape(16, -1)
    write_siglip.write_safetensors(tmp_path / "naflex.safetensors", tensors)
    assert "NaFlex" in refusal(tmp_path / "naflex.safetensors")


def test_a_tokenizer_with_another_vocabulary_is_refused():
    assert "19 pieces" in refusal(FOLDER, vocab=19)
    assert "32,000 pieces" in refusal(FOLDER, vocab=32_000)
    siglip.load(FOLDER, vocab=20)
    siglip.load(FOLDER, vocab=120)  # 100 more that no text contains


# ---------------------------------------------------------------------------------------- inputs


def test_texts_are_lower_case_end_with_1_and_are_padded_as_their_model_was():
    encode = lambda text: [ord(c) for c in text]
    first = vit.Text("B", 32_000, 5, 768)
    second = vit.Text("B", 256_000, 5, 768)
    assert siglip.tokenize("aB", encode, first).tolist() == [97, 98, 1, 1, 1]
    assert siglip.tokenize("aB", encode, second).tolist() == [97, 98, 1, 0, 0]
    assert siglip.tokenize("abcdef", encode, second).tolist() == [97, 98, 99, 100, 1]
    assert siglip.tokenize("", encode, second).dtype == np.int32


def test_images_are_squashed_and_not_cut():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 40:] = 240  # the right third
    square = siglip.preprocess(image, 30)
    assert square.shape == (30, 30, 3) and square.dtype == np.uint8
    assert (square[:, :18] == 0).all() and (square[:, 22:] == 240).all()
    np.testing.assert_array_equal(siglip.preprocess(square, 30), square)
    np.testing.assert_array_equal(siglip.preprocess(image[..., :1], 30), square)
