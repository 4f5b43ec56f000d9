"""ResNet v1 as pure functions of parameters and batch-norm statistics, with its FLOPs.

`resnet_init(key, config) -> (params, stats)`, `resnet_apply(params, stats, x, config, train) ->
(features, stats)`, `resnet_flops(config) -> int`. The network ends with the mean over the last map:
there is no classifier. The sizes are 18 and 50 of He et al. (1512.03385), and their family of
6n + 2 layers for small images, spelled 'depth/width'. In training, batch norm averages over all
devices.

Padding is SAME, as in BYOL's haiku. Where a stride is 2 it pads otherwise than torchvision, so
weights trained there give other features here.

Dimension letters: N images, H W image or map, C channels, D features.
"""

import dataclasses

import jax
import jax.numpy as jnp

from common import devices

DECAY, EPSILON = 0.9, 1e-5  # of batch norm, as in BYOL's code


def size(name):
    """(number of blocks in each stage, width of the first stage, whether blocks are bottlenecks).

    name: '18', '50' or 'depth/width'. Depth 6n + 2 has three stages of n blocks, as for CIFAR.
    '18/16' is a narrow ResNet-18.
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
    dtype: str = "float32"  # of the activations; parameters and statistics are always float32

    @property
    def small(self):
        """Whether the stem is 3 x 3 without pooling, as in SimCLR's appendix on CIFAR."""
        return self.image_size <= 64

    @property
    def features(self):
        """D, the width of the features that `resnet_apply` returns."""
        stages, width, bottleneck = size(self.size)
        return width * 2 ** (len(stages) - 1) * (4 if bottleneck else 1)


def blocks(config):
    """[(name, channels in, channels inside, channels out, stride)] of all blocks, in order."""
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
    """{name: (kernel side, channels in, channels out, stride)} of a block's convolutions.

    'short' is the convolution of the shortcut. It is there only where the shape changes. A
    bottleneck has its stride in the 3 x 3 convolution, as in all public code; in the paper's figure
    the stride is one convolution earlier.
    """
    if size(config.size)[2]:
        out = {"conv0": (1, c_in, inside, 1), "conv1": (3, inside, inside, stride),
               "conv2": (1, inside, c_out, 1)}
    else:
        out = {"conv0": (3, c_in, inside, stride), "conv1": (3, inside, c_out, 1)}
    return out | ({"short": (1, c_in, c_out, stride)} if (stride, c_in) != (1, c_out) else {})


def stem(config):
    """(kernel side, channels in, channels out, stride) of the first convolution."""
    return (3, config.channels, size(config.size)[1], 1) if config.small else (
        7, config.channels, size(config.size)[1], 2)


# ------------------------------------------------------------------------------------- layers


def conv_init(key, side, c_in, c_out, last=False):
    """(params, stats) of a convolution and its batch norm. Weights have variance 1 / inputs of a
    unit (0.77 of that in BYOL's haiku); the norm behind them removes their scale.

    last: the norm ends a block. It starts at scale 0, so that the block starts as its shortcut
    (Goyal et al., 1706.02677).
    """
    kernel = jax.nn.initializers.lecun_normal()
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
    """(params, stats) of a batch norm. count: how many batches its statistics have seen."""
    return ({"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            {"mean": jnp.zeros(width), "var": jnp.ones(width), "count": jnp.zeros(())})


def batch_norm(p, stats, x, train):
    """(y, stats): scale (x - mean) / sqrt(var + epsilon) + bias for each channel, in float32.

    In training, mean and (biased) variance are those of the whole batch on all devices, inside
    `pmap`, and the running statistics are updated with them. Otherwise the running ones are used.
    The variance takes a second pass: E[x^2] - E[x]^2 loses its digits where the mean is large.
    """
    x32 = x.astype(jnp.float32)
    if train:
        axes = tuple(range(x.ndim - 1))
        mean = devices.mean(x32.mean(axes))
        var = devices.mean(jnp.square(x32 - mean).mean(axes))
        stats = running_statistics(stats, jax.lax.stop_gradient({"mean": mean, "var": var}))
    else:
        mean, var = stats["mean"], stats["var"]
    y = (x32 - mean) * (jax.lax.rsqrt(var + EPSILON) * p["scale"]) + p["bias"]
    return y.astype(x.dtype), stats


def running_statistics(stats, new):
    """The statistics after one more batch: the average over all batches so far, of weights 1, .9,
    .81 and so on from the newest to the oldest, divided by the sum of these weights.

    The newest has weight (1 - .9) / (1 - .9^count). So the first batch replaces the initial values
    and none of them remains, as in haiku's ExponentialMovingAverage (`zero_debias`).
    """
    count = stats["count"] + 1
    weight = (1 - DECAY) / (1 - DECAY**count)
    return {"count": count, **{k: stats[k] + weight * (new[k] - stats[k]) for k in new}}


# ------------------------------------------------------------------------------------ network


def resnet_init(key, config):
    """(params, stats): nested dicts by block and convolution."""
    params, stats = {}, {}
    key_stem, key_blocks = jax.random.split(key)
    side, c_in, c_out, _ = stem(config)
    params["stem"], stats["stem"] = conv_init(key_stem, side, c_in, c_out)
    for i, (name, *shape) in enumerate(blocks(config)):
        layers = convs(config, *shape)
        last = max(k for k in layers if k != "short")
        keys = jax.random.split(jax.random.fold_in(key_blocks, i), len(layers))
        pairs = {k: conv_init(key, side, c_in, c_out, last=k == last)
                 for key, (k, (side, c_in, c_out, _)) in zip(keys, layers.items())}
        params[name], stats[name] = ({k: pair[j] for k, pair in pairs.items()} for j in (0, 1))
    return params, stats


def resnet_apply(params, stats, image_NHWC, config, train):
    """(features float32 [N, D], stats) of normalised images [N, H, W, C]. The statistics are new if
    `train`, and those that were given otherwise."""
    x, new = image_NHWC.astype(config.dtype), {}
    x, new["stem"] = conv(params["stem"], stats["stem"], x, stem(config)[3], train)
    x = jax.nn.relu(x)
    if not config.small:
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for name, *shape in blocks(config):
        x, new[name] = block(params[name], stats[name], x, convs(config, *shape), train)
    return x.astype(jnp.float32).mean((1, 2)), new


def block(p, stats, x, layers, train):
    """relu(shortcut + convolutions). There is a relu between two convolutions."""
    short, y, new = x, x, {}
    for k, (*_, stride) in layers.items():
        if k == "short":
            short, new[k] = conv(p[k], stats[k], x, stride, train)
        else:
            y, new[k] = conv(p[k], stats[k], jax.nn.relu(y) if k != "conv0" else y, stride, train)
    return jax.nn.relu(short + y), new


def resnet_flops(config):
    """FLOPs of the convolutions in one forward of one image. A multiply-add counts as two."""
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
