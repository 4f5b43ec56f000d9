"""ResNet v1 as pure functions of parameters and batch-norm statistics, with its FLOPs.

`resnet_init(key, config) -> (params, stats)`, `resnet_apply(params, stats, x, config, train) ->
(features, stats)`, `resnet_flops(config) -> int`. The network ends at the mean over the last map:
there is no classifier. Sizes 18 and 50 of He et al. (1512.03385), and their 6n + 2 family for
small images, by 'depth/width'. In training, batch norm averages over all devices.

Dimension letters: N images, H W image or map, C channels, D features.
"""

import dataclasses

import jax
import jax.numpy as jnp

from common import devices

DECAY, EPSILON = 0.9, 1e-5  # of batch norm (BYOL's code)


def size(name):
    """(blocks of each stage, width of the first, whether bottlenecks) of '18', '50', 'depth/width'.

    Depth 6n + 2 has three stages of n blocks, the sizes for CIFAR; '18/16' is a narrow ResNet-18.
    """
    depth, _, width = name.partition("/")
    if depth.isdigit() and (width or "64").isdigit() and int(width or 64) > 0:
        depth, width = int(depth), int(width or 64)
        if depth == 18:
            return (2, 2, 2, 2), width, False
        if depth == 50:
            return (3, 4, 6, 3), width, True
        if depth >= 8 and depth % 6 == 2:
            return ((depth - 2) // 6,) * 3, width, False
    raise ValueError(f"model size {name!r}: want 18 or 50, or 'depth/width' with depth 18, 50 or "
                     "6n + 2, such as '8/16'")


@dataclasses.dataclass(frozen=True)
class ResNet:
    size: str
    image_size: int
    channels: int = 3
    dtype: str = "float32"  # of the activations; parameters and statistics are float32 always

    @property
    def small(self):
        """Small images get a 3 x 3 stem without pooling (SimCLR's appendix on CIFAR)."""
        return self.image_size <= 64

    @property
    def features(self):
        """D, the width of what `resnet_apply` returns."""
        stages, width, bottleneck = size(self.size)
        return width * 2 ** (len(stages) - 1) * (4 if bottleneck else 1)


def blocks(config):
    """[(name, channels in, channels inside, channels out, stride)] in order."""
    stages, width, bottleneck = size(config.size)
    out, c_in = [], width
    for i, n in enumerate(stages):
        inside = width * 2**i
        for j in range(n):
            c_out = inside * (4 if bottleneck else 1)
            out.append((f"stage{i}_block{j}", c_in, inside, c_out, 2 if i and j == 0 else 1))
            c_in = c_out
    return out


def convs(config, c_in, inside, c_out, stride):
    """{name: (kernel side, channels in, channels out, stride)} of a block; 'short' is its shortcut.

    A bottleneck strides in its 3 x 3, as all public code does; the paper's figure strides before.
    """
    if size(config.size)[2]:
        out = {"conv0": (1, c_in, inside, 1), "conv1": (3, inside, inside, stride),
               "conv2": (1, inside, c_out, 1)}
    else:
        out = {"conv0": (3, c_in, inside, stride), "conv1": (3, inside, c_out, 1)}
    return out | ({"short": (1, c_in, c_out, stride)} if (stride, c_in) != (1, c_out) else {})


def stem(config):
    return (3, config.channels, size(config.size)[1], 1) if config.small else (
        7, config.channels, size(config.size)[1], 2)


# ------------------------------------------------------------------------------------- layers


def conv_init(key, side, c_in, c_out, last=False):
    """(params, stats) of a convolution and its batch norm. The norm that ends a block starts at
    scale 0, so that the block starts as its shortcut (Goyal et al., 1706.02677)."""
    kernel = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    params, stats = norm_init(c_out)
    if last:
        params["scale"] = jnp.zeros(c_out)
    return {"w": kernel(key, (side, side, c_in, c_out)), "norm": params}, stats


def conv(p, stats, x_NHWC, stride, train):
    """Convolution without bias, then batch norm."""
    y = jax.lax.conv_general_dilated(x_NHWC, p["w"].astype(x_NHWC.dtype), (stride, stride), "SAME",
                                     dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return batch_norm(p["norm"], stats, y, train)


def norm_init(width):
    return ({"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            {"mean": jnp.zeros(width), "var": jnp.ones(width)})


def batch_norm(p, stats, x, train):
    """(y, stats): scale (x - mean) / sqrt(var + eps) + bias by channel, in float32.

    In training mean and variance (biased) are those of the whole batch on all devices, inside
    `pmap`, and the running ones move towards them; else they are the running ones.
    """
    x32 = x.astype(jnp.float32)
    if train:
        axes = tuple(range(x.ndim - 1))
        mean, square = devices.mean((x32.mean(axes), jnp.square(x32).mean(axes)))
        var = jnp.maximum(square - jnp.square(mean), 0)
        stats = {k: DECAY * stats[k] + (1 - DECAY) * jax.lax.stop_gradient(new)
                 for k, new in (("mean", mean), ("var", var))}
    else:
        mean, var = stats["mean"], stats["var"]
    y = (x32 - mean) * (jax.lax.rsqrt(var + EPSILON) * p["scale"]) + p["bias"]
    return y.astype(x.dtype), stats


# ------------------------------------------------------------------------------------ network


def resnet_init(key, config):
    params, stats = {}, {}
    key_stem, key_blocks = jax.random.split(key)
    side, c_in, c_out, _ = stem(config)
    params["stem"], stats["stem"] = conv_init(key_stem, side, c_in, c_out)
    for i, (name, *shape) in enumerate(blocks(config)):
        layers = convs(config, *shape)
        last = max(k for k in layers if k != "short")
        keys = jax.random.split(jax.random.fold_in(key_blocks, i), len(layers))
        made = {k: conv_init(key, side, c_in, c_out, last=k == last)
                for key, (k, (side, c_in, c_out, _)) in zip(keys, layers.items())}
        params[name], stats[name] = ({k: v[j] for k, v in made.items()} for j in (0, 1))
    return params, stats


def resnet_apply(params, stats, image_NHWC, config, train):
    """Images scaled to [-1, 1] -> (float32 [N, D], statistics, new ones if `train`)."""
    x, new = image_NHWC.astype(config.dtype), {}
    x, new["stem"] = conv(params["stem"], stats["stem"], x, stem(config)[3], train)
    x = jax.nn.relu(x)
    if not config.small:
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for name, *shape in blocks(config):
        x, new[name] = block(params[name], stats[name], x, convs(config, *shape), train)
    return x.astype(jnp.float32).mean((1, 2)), new


def block(p, stats, x, layers, train):
    """relu(shortcut + convolutions with a relu between them)."""
    short, y, new = x, x, {}
    for k, (*_, stride) in layers.items():
        if k == "short":
            short, new[k] = conv(p[k], stats[k], x, stride, train)
        else:
            y, new[k] = conv(p[k], stats[k], jax.nn.relu(y) if k != "conv0" else y, stride, train)
    return jax.nn.relu(short + y), new


def resnet_flops(config):
    """FLOPs (a multiply-add is two) of the convolutions of one forward of one image."""
    half = lambda side, stride: -(-side // stride)
    side, c_in, c_out, stride = stem(config)
    at = half(config.image_size, stride)
    flops = 2 * at**2 * side**2 * c_in * c_out
    at = at if config.small else half(at, 2)
    for _, *shape in blocks(config):
        here = at
        for k, (side, c_in, c_out, stride) in convs(config, *shape).items():
            out = half(at if k == "short" else here, stride)
            flops += 2 * out**2 * side**2 * c_in * c_out
            here = here if k == "short" else out
        at = here
    return flops
