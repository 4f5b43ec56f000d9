"""Vision transformer and text transformer as pure functions of nested dicts, with their FLOPs.

`*_init(key, config) -> params`, `*_apply(params, x, config) -> array`, `*_flops(config) -> int`.
The encoder is the pre-norm transformer of Dosovitskiy et al. (2010.11929). The sizes are those of
Zhai et al. (2106.04560), for So400m of Alabdulmohsin et al. (2305.13035), and for g-opt of SigLIP 2
(2502.14786). The parameters of the blocks are stacked along a leading axis of length L, and
`lax.scan` runs over them.

Dimension letters: B batch, T tokens, D width, F mlp width, H heads, K width of a head, E embedding,
L layers, V vocabulary, P patch side, C channels.
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp

# name: (width D, depth L, mlp width F, heads H)
SIZES = {
    "mu": (32, 1, 128, 2),
    "toy": (64, 4, 256, 4),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "g-opt": (1536, 40, 6144, 16),
}

# An encoder of at most so many blocks is unrolled: each block gets its own code instead of one loop
# that slices its parameters and stacks its activations. A step of Ti is 1.2 times faster on a CPU;
# its compilation takes 6 s instead of 5.
MAX_UNROLLED = 12


def size(name):
    """(width, depth, mlp width, heads) of a model size.

    `name` is a key of SIZES, or the four numbers themselves: 'width/depth/mlp/heads'. Raises
    ValueError for anything else, and where the heads do not divide the width."""
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
    """What an image tower looks like. `n_out` is the number of classes, or the width of the
    embedding that images and texts share. With 0 there is no head, and the output has the width of
    the tower, as in the published SigLIP. Where the patch does not divide the side of the image,
    the rest at the right and at the bottom is not seen."""
    size: str
    image_size: int
    patch: int
    n_out: int
    channels: int = 3
    pool: str = "gap"  # 'gap': the mean of the tokens; 'map': an attention-pooling head
    dtype: str = "float32"  # of the activations; parameters are always float32
    remat: bool = False  # recompute each block in the backward pass: slower, but needs less memory

    @property
    def tokens(self):
        return (self.image_size // self.patch) ** 2


@dataclasses.dataclass(frozen=True)
class Text:
    """What a text tower looks like. It reads token ids. Every token sees every other, and the
    positions are learned. `n_out` is that of `ViT`."""
    size: str
    vocab: int
    context: int
    n_out: int
    pool: str = "gap"  # 'gap' and 'map' as in `ViT`; 'last': the last token
    dtype: str = "float32"
    remat: bool = False
    mask_padding: bool = True  # tokens of id 0 are padding. The published SigLIP looks at it too.

    @property
    def tokens(self):
        return self.context


def architecture(tower):
    """The fields of a ViT or a Text that its weights depend on, as JSON values. Two models of equal
    shapes can differ in them, in the number of heads for example."""
    fields = dataclasses.asdict(tower) | {"size": list(size(tower.size))}
    return {k: v for k, v in fields.items() if k not in ("dtype", "remat")}


# ------------------------------------------------------------------------------------- layers


def dense_init(key, n_in, n_out):
    """Glorot-uniform weight [n_in, n_out] and a zero bias."""
    return {"w": jax.nn.initializers.glorot_uniform()(key, (n_in, n_out)),
            "b": jnp.zeros(n_out)}


def dense(p, x):
    """x @ w + b on the last axis of x."""
    # With one leading axis the gradient of w is one matrix product too. With several it is not, and
    # then it is 1.4 times slower on CPUs.
    y = x.reshape(-1, x.shape[-1]) @ p["w"].astype(x.dtype) + p["b"].astype(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def norm_init(width):
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def layer_norm(p, x, eps=1e-6):
    """Layer norm (1607.06450) over the last axis of x. It is computed in float32 even where x is
    bfloat16.

    Autodiff's backward pass goes over the tokens several times and is bound by memory. The usual
    closed form, written out below, makes a training step 1.1 times faster."""
    return layer_norm_forward(p, x, eps)[0]


def layer_norm_forward(p, x, eps):
    """-> the output, and what the backward pass needs."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = y.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(((y - mean)**2).mean(-1, keepdims=True) + eps)
    y = (y - mean) * inverse_std * p["scale"] + p["bias"]
    return y.astype(x.dtype), (p, x, mean, inverse_std)


def layer_norm_backward(_, saved, grad_out):
    """Gradients of p and x. With z = (x - mean) / std and g = dL/dz, each a vector of one token,

        dL/dx = (g - mean(g) - z mean(g z)) / std

    The two means are what reaches x through its own mean and its own std."""
    p, x, mean, inverse_std = saved
    z = (x.astype(mean.dtype) - mean) * inverse_std
    grad_out = grad_out.astype(mean.dtype)
    tokens = tuple(range(x.ndim - 1))
    grad_p = {"scale": (grad_out * z).sum(tokens), "bias": grad_out.sum(tokens)}
    g = grad_out * p["scale"]
    grad_x = g - g.mean(-1, keepdims=True) - z * (g * z).mean(-1, keepdims=True)
    return grad_p, (grad_x * inverse_std).astype(x.dtype)


layer_norm.defvjp(layer_norm_forward, layer_norm_backward)


def mlp_init(key, width, hidden):
    key_up, key_down = jax.random.split(key)
    return {"up": dense_init(key_up, width, hidden), "down": dense_init(key_down, hidden, width)}


def mlp(p, x):
    """Two linear maps with a GELU between them (its tanh approximation)."""
    # The GELU is computed again in the backward pass. This costs no time, and of its five arrays of
    # width F only the input has to be kept.
    return dense(p["down"], jax.checkpoint(jax.nn.gelu)(dense(p["up"], x)))


def attention_init(key, width):
    """The maps to queries, keys and values, and the output map: four square matrices."""
    keys = jax.random.split(key, 4)
    return dict(zip("qkvo", (dense_init(k, width, width) for k in keys)))


def attention(p, q_BTD, kv_BSD, heads, mask_BS=None):
    """Multi-head attention of T queries over S keys. No query sees a key whose mask is False."""
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
    """One transformer block: attention, then the MLP. Each reads x normalised and is added to x."""
    y = layer_norm(p["norm_attention"], x_BTD)
    x_BTD = x_BTD + attention(p["attention"], y, y, heads, mask_BT)
    return x_BTD + mlp(p["mlp"], layer_norm(p["norm_mlp"], x_BTD))


def encoder_init(key, config):
    """The blocks, stacked so that every leaf is [L, ...]; the final norm; with pool 'map', the
    pooling head."""
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
    """Tokens -> [B, D]: the blocks, the final norm and the pooling.

    A token whose mask is False is padding. No other token sees it, and it is not pooled."""
    _, depth, _, heads = size(config.size)
    body = lambda x, p_block: (block(p_block, x, heads, mask_BT), None)
    x_BTD, _ = jax.lax.scan(jax.checkpoint(body) if config.remat else body, x_BTD, p["blocks"],
                            unroll=depth if depth <= MAX_UNROLLED else 1)
    x_BTD = layer_norm(p["norm"], x_BTD)
    # Attention pooling (Lee et al., 1810.00825), as in SigLIP: one learned query looks at all
    # tokens, and an MLP with a residual connection follows.
    if config.pool == "map":
        probe = einops.repeat(p["pool"]["probe"].astype(x_BTD.dtype), "t d -> b t d", b=len(x_BTD))
        y = attention(p["pool"]["attention"], probe, x_BTD, heads, mask_BT)
        return (y + mlp(p["pool"]["mlp"], layer_norm(p["pool"]["norm"], y)))[:, 0]
    if config.pool == "last":
        return x_BTD[:, -1]
    if mask_BT is None:
        return x_BTD.mean(1)
    weight = mask_BT / jnp.maximum(mask_BT.sum(1, keepdims=True), 1)
    return jnp.einsum("btd,bt->bd", x_BTD, weight.astype(x_BTD.dtype))


def encoder_flops(config):
    """FLOPs of `encode` for one example. Only matrix products count, a multiply-add as two."""
    D, L, F, _ = size(config.size)
    T = config.tokens
    flops = L * (T * (8 * D**2 + 4 * D * F) + 4 * T**2 * D)
    if config.pool == "map":
        # The maps q and o of one query, k and v of all tokens; attention's two products; the MLP.
        flops += (4 + 4 * T) * D**2 + 4 * T * D + 4 * D * F
    return flops


# ------------------------------------------------------------------------------------- towers


def head_init(key, config):
    """The linear map behind the pooling, or nothing where n_out is 0."""
    return {"head": dense_init(key, size(config.size)[0], config.n_out)} if config.n_out else {}


def head(p, x_BD, config):
    x_BD = x_BD.astype(jnp.float32)
    return dense(p["head"], x_BD) if config.n_out else x_BD


def vit_init(key, config):
    width = size(config.size)[0]
    key_embed, key_position, key_encoder, key_head = jax.random.split(key, 4)
    P, C = config.patch, config.channels
    return {"embed": dense_init(key_embed, P * P * C, width),
            "position": jax.random.normal(key_position, (config.tokens, width)) / width**0.5,
            **encoder_init(key_encoder, config), **head_init(key_head, config)}


def vit_apply(p, image_BHWC, config):
    """Images with pixels in [-1, 1] -> float32 [B, n_out], or [B, D] without a head."""
    _, H, W, _ = image_BHWC.shape
    P = config.patch
    x = einops.rearrange(image_BHWC[:, :H - H % P, :W - W % P],
                         "b (h p) (w q) c -> b (h w) (p q c)", p=P, q=P).astype(config.dtype)
    x_BTD = dense(p["embed"], x) + p["position"].astype(config.dtype)
    return head(p, encode(p, x_BTD, config), config)


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
            **encoder_init(key_encoder, config), **head_init(key_head, config)}


def text_apply(p, tokens_BT, config):
    """Token ids -> float32 [B, n_out], or [B, D] without a head."""
    x_BTD = (p["embed"][tokens_BT] + p["position"]).astype(config.dtype)
    mask_BT = tokens_BT != 0 if config.mask_padding else None
    return head(p, encode(p, x_BTD, config, mask_BT), config)


def text_flops(config):
    """FLOPs of `text_apply` for one text. Padding costs as much as a word; looking up the embedding
    costs nothing."""
    # The mean of the tokens that are not padding is a matrix product.
    pool = 2 * config.tokens * size(config.size)[0] if (
        config.pool == "gap" and config.mask_padding) else 0
    return encoder_flops(config) + pool + 2 * size(config.size)[0] * config.n_out
