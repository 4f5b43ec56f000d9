"""Makes tests/siglip/: two tiny models with random weights, and their outputs on a batch.

    python tests/make_siglip.py PATH_OF_BIG_VISION

One is Hugging Face's SiglipModel, the other big_vision's two_towers. Their outputs are what
tests/test_siglip.py wants of common/siglip.py. The test itself needs neither of them; this script
needs transformers with torch, flax, and a copy of github.com/google-research/big_vision.
"""

import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "siglip"
# The side is not a multiple of the patch, and the towers differ in every number.
SIDE, PATCH, VOCAB, CONTEXT = 14, 4, 20, 6
IMAGE = dict(width=16, depth=2, mlp=24, heads=2)
TEXT = dict(width=12, depth=3, mlp=20, heads=3)


def hugging_face(image, tokens):
    sizes = lambda tower: dict(
        hidden_size=tower["width"], num_hidden_layers=tower["depth"],
        intermediate_size=tower["mlp"], num_attention_heads=tower["heads"])
    model = transformers.SiglipModel(transformers.SiglipConfig(
        text_config=dict(sizes(TEXT), vocab_size=VOCAB, max_position_embeddings=CONTEXT,
                         projection_size=IMAGE["width"]),
        vision_config=dict(sizes(IMAGE), image_size=SIDE, patch_size=PATCH))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros and ones, which would hide a mistake
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        out = model(input_ids=torch.tensor(tokens).long(), return_loss=True,
                    pixel_values=torch.tensor(image).permute(0, 3, 1, 2))
    model.save_pretrained(FOLDER)
    return {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image,
            "loss": out.loss}


def big_vision(image, tokens):
    sys.path.insert(0, sys.argv[1])
    # Its models use this module to load files only, and it imports TensorFlow.
    sys.modules["big_vision.utils"] = types.ModuleType("big_vision.utils")
    import big_vision
    big_vision.utils = sys.modules["big_vision.utils"]
    from big_vision.models.proj.image_text import two_towers
    sizes = lambda tower: dict(width=tower["width"], depth=tower["depth"], mlp_dim=tower["mlp"],
                               num_heads=tower["heads"])
    model = two_towers.Model(
        image=dict(sizes(IMAGE), patch_size=(PATCH, PATCH), pool_type="map"),
        text=dict(sizes(TEXT), vocab_size=VOCAB), out_dim=(None, IMAGE["width"]),
        temperature_init=10.0, bias_init=-10.0)
    params = model.init(jax.random.key(0), image, tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), params)
    z_image, z_text, out = model.apply({"params": params}, image, tokens)
    logits = z_image @ z_text.T * out["t"] + out["b"]
    # The sigmoid loss of SigLIP, eq. 1: pairs on the diagonal are positive, all others negative.
    sign = 2 * jnp.eye(len(image)) - 1
    loss = -jax.nn.log_sigmoid(sign * logits).sum(-1).mean()
    names = jax.tree_util.tree_leaves_with_path(params)
    np.savez(FOLDER / "big_vision.npz",
             **{"/".join(part.key for part in path): x for path, x in names})
    return {"image": z_image, "text": z_text, "logits": logits, "loss": loss}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, (4, SIDE, SIDE, 3)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (4, CONTEXT)).astype(np.int32)
    tokens[0, 3:] = 0  # what our own text tower takes for padding
    outputs = {"input/image": image, "input/tokens": tokens}
    with jax.default_matmul_precision("float32"):
        for make in (hugging_face, big_vision):
            for name, x in make(image, tokens).items():
                outputs[f"{make.__name__}/{name}"] = np.asarray(x)
    np.savez(FOLDER / "outputs.npz", **outputs)
