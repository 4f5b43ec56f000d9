"""Vision transformer and text transformer as pure functions of nested dicts, with their FLOPs.

`*_init(key, config) -> params`, `*_apply(params, x, config) -> array`, `*_flops(config) -> int`.
Pre-norm encoder of Dosovitskiy et al. (2010.11929); the sizes are those of Zhai et al. (2106.04560)
and, for So400m, of Alabdulmohsin et al. (2305.13035). The blocks are stacked along a leading axis
and run by one `lax.scan`, so that compilation takes as long for 24 layers as for one.

Dimension letters: B batch, T tokens, D width, F mlp width, H heads, K width of a head, E embedding,
L layers, V vocabulary, P patch side, C channels.
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp

# name: width D, depth L, mlp F, heads H
SIZES = {
    "mu": (32, 1, 128, 2),
    "toy": (64, 4, 256, 4),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
}


def size(name):
    """(width, depth, mlp, heads) of a size in SIZES, or of one spelled 'width/depth/mlp/heads'."""
    if name in SIZES:
        return SIZES[name]
    parts = name.split("/")
    if len(parts) != 4 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"model size {name!r}: want one of {', '.join(SIZES)}, or four numbers "
                         "'width/depth/mlp/heads' such as '64/4/256/4'")
    if int(parts[0]) % int(parts[3]):
        raise ValueError(f"model size {name!r}: the heads must divide the width")
    return tuple(map(int, parts))


@dataclasses.dataclass(frozen=True)
class ViT:
    """Image tower. `n_out` is the number of classes, or the width of the joint embedding."""
    size: str
    image_size: int
    patch: int
    n_out: int
    channels: int = 3
    pool: str = "gap"  # 'gap': mean of the tokens; 'map': one attention-pooling head
    dtype: str = "float32"  # of the activations; the parameters are float32 always
    remat: bool = False  # recompute each block in the backward pass: memory for time

    @property
    def tokens(self):
        return (self.image_size // self.patch) ** 2


@dataclasses.dataclass(frozen=True)
class Text:
    """Text tower on token ids, 0 being padding. Bidirectional attention, learned positions."""
    size: str
    vocab: int
    context: int
    n_out: int
    pool: str = "gap"
    dtype: str = "float32"
    remat: bool = False

    @property
    def tokens(self):
        return self.context


# ------------------------------------------------------------------------------------- layers


def dense_init(key, n_in, n_out):
    """Glorot-uniform weight [n_in, n_out] and a zero bias."""
    return {"w": jax.nn.initializers.glorot_uniform()(key, (n_in, n_out)),
            "b": jnp.zeros(n_out)}


def dense(p, x):
    """x @ w + b on the last axis, as ONE matrix product forward and back (1.4 times faster on CPUs
    than leaving two leading axes to the weight's gradient)."""
    y = x.reshape(-1, x.shape[-1]) @ p["w"].astype(x.dtype) + p["b"].astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def norm_init(width):
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def layer_norm(p, x, eps=1e-6):
    """Layer norm over the last axis, computed in float32 whatever the type of x."""
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + eps)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def mlp_init(key, width, hidden):
    key_up, key_down = jax.random.split(key)
    return {"up": dense_init(key_up, width, hidden), "down": dense_init(key_down, hidden, width)}


def mlp(p, x):
    return dense(p["down"], jax.nn.gelu(dense(p["up"], x)))


def attention_init(key, width):
    """Query, key and value maps drawn each as a square matrix; output map."""
    keys = jax.random.split(key, 4)
    return dict(zip("qkvo", (dense_init(k, width, width) for k in keys)))


def attention(p, q_BTD, kv_BSD, heads, mask_BS=None):
    """Multi-head attention of T queries over S keys; where `mask_BS` is False a key is not seen."""
    split = functools.partial(einops.rearrange, pattern="b t (h k) -> b t h k", h=heads)
    y = jax.nn.dot_product_attention(
        split(dense(p["q"], q_BTD)), split(dense(p["k"], kv_BSD)), split(dense(p["v"], kv_BSD)),
        mask=None if mask_BS is None else mask_BS[:, None, None, :])
    return dense(p["o"], einops.rearrange(y, "b t h k -> b t (h k)"))


# ------------------------------------------------------------------------------------ encoder


def block_init(key, width, hidden):
    key_attention, key_mlp = jax.random.split(key)
    return {"norm_attention": norm_init(width), "attention": attention_init(key_attention, width),
            "norm_mlp": norm_init(width), "mlp": mlp_init(key_mlp, width, hidden)}


def block(p, x_BTD, heads, mask_BT=None):
    y = layer_norm(p["norm_attention"], x_BTD)
    x_BTD = x_BTD + attention(p["attention"], y, y, heads, mask_BT)
    return x_BTD + mlp(p["mlp"], layer_norm(p["norm_mlp"], x_BTD))


def encoder_init(key, config):
    """Blocks (stacked: every leaf [L, ...]), the final norm and, for 'map', the pooling head."""
    width, depth, hidden, _ = size(config.size)
    key_blocks, key_pool = jax.random.split(key)
    params = {"blocks": jax.vmap(lambda k: block_init(k, width, hidden))(
        jax.random.split(key_blocks, depth)), "norm": norm_init(width)}
    if config.pool == "map":
        key_probe, key_attention, key_mlp = jax.random.split(key_pool, 3)
        params["pool"] = {"probe": jax.nn.initializers.glorot_uniform()(key_probe, (1, width)),
                          "attention": attention_init(key_attention, width),
                          "norm": norm_init(width), "mlp": mlp_init(key_mlp, width, hidden)}
    return params


def encode(p, x_BTD, config, mask_BT=None):
    """Tokens [B, T, D] through blocks, norm, pool: [B, D]. Padding is neither seen nor pooled."""
    heads = size(config.size)[3]
    body = lambda x, p_block: (block(p_block, x, heads, mask_BT), None)
    x_BTD, _ = jax.lax.scan(jax.checkpoint(body) if config.remat else body, x_BTD, p["blocks"])
    x_BTD = layer_norm(p["norm"], x_BTD)
    if config.pool == "map":  # Lee et al. (1810.00825), as in SigLIP: a learned query, then an MLP
        probe = einops.repeat(p["pool"]["probe"].astype(x_BTD.dtype), "t d -> b t d", b=len(x_BTD))
        y = attention(p["pool"]["attention"], probe, x_BTD, heads, mask_BT)
        return (y + mlp(p["pool"]["mlp"], layer_norm(p["pool"]["norm"], y)))[:, 0]
    if mask_BT is None:
        return x_BTD.mean(1)
    weight = mask_BT / jnp.maximum(mask_BT.sum(1, keepdims=True), 1)
    return jnp.einsum("btd,bt->bd", x_BTD, weight.astype(x_BTD.dtype))


def encoder_flops(config):
    """FLOPs (a multiply-add is two) of `encode` for one example: matrix products only."""
    D, L, F, _ = size(config.size)
    T = config.tokens
    flops = L * (T * (8 * D**2 + 4 * D * F) + 4 * T**2 * D)
    if config.pool == "map":  # q and o for one token, k and v for all; scores and sum; the MLP
        flops += (4 + 4 * T) * D**2 + 4 * T * D + 4 * D * F
    return flops


# ------------------------------------------------------------------------------------- towers


def vit_init(key, config):
    width = size(config.size)[0]
    key_embed, key_position, key_encoder, key_head = jax.random.split(key, 4)
    P, C = config.patch, config.channels
    return {"embed": dense_init(key_embed, P * P * C, width),
            "position": jax.random.normal(key_position, (config.tokens, width)) / width**0.5,
            **encoder_init(key_encoder, config), "head": dense_init(key_head, width, config.n_out)}


def vit_apply(p, image_BHWC, config):
    """Images scaled to [-1, 1] -> float32 [B, n_out]."""
    x = einops.rearrange(image_BHWC, "b (h p) (w q) c -> b (h w) (p q c)",
                         p=config.patch, q=config.patch).astype(config.dtype)
    x_BTD = dense(p["embed"], x) + p["position"].astype(config.dtype)
    return dense(p["head"], encode(p, x_BTD, config).astype(jnp.float32))


def vit_flops(config):
    """FLOPs of `vit_apply` for one image."""
    D = size(config.size)[0]
    embed = 2 * config.tokens * config.patch**2 * config.channels * D
    return embed + encoder_flops(config) + 2 * D * config.n_out


def text_init(key, config):
    width = size(config.size)[0]
    key_embed, key_position, key_encoder, key_head = jax.random.split(key, 4)
    return {"embed": jax.random.normal(key_embed, (config.vocab, width)) / width**0.5,
            "position": jax.random.normal(key_position, (config.context, width)) / width**0.5,
            **encoder_init(key_encoder, config), "head": dense_init(key_head, width, config.n_out)}


def text_apply(p, tokens_BT, config):
    """Token ids, 0 for padding -> float32 [B, n_out]."""
    x_BTD = (p["embed"][tokens_BT] + p["position"]).astype(config.dtype)
    return dense(p["head"], encode(p, x_BTD, config, tokens_BT != 0).astype(jnp.float32))


def text_flops(config):
    """FLOPs of `text_apply` for one text, padding included; the embedding is a look-up."""
    pool = 2 * config.tokens * size(config.size)[0] if config.pool == "gap" else 0
    return encoder_flops(config) + pool + 2 * size(config.size)[0] * config.n_out
