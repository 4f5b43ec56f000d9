"""Two random views of an image, drawn on the device: BYOL's recipe (2006.07733, appendix B).

A view is a function of the key and of the image's place in the whole batch. Each transform has its
probability where it is applied, in `view` and `recolour`; what a small image wants otherwise is in
`Views`. Images are square.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Views:
    """How views are drawn: BYOL's table 6, probabilities by view where the two differ."""
    crop_area: float = 0.08
    jitter: float = 1.0
    blur: tuple = (1.0, 0.1)
    solarise: tuple = (0.0, 0.2)


def two_views(key, place_N, image_NHWC, views):
    """Two views of each image, float32 in [-1, 1], drawn from its place in the whole batch: the
    same on any number of devices."""
    def one(place, image_HWC):
        key_place = jax.random.fold_in(key, place)
        return tuple(view(jax.random.fold_in(key_place, v), image_HWC, views, v) for v in (0, 1))
    return jax.vmap(one)(place_N, rgb(image_NHWC))


def rgb(image_NHWC):
    """Bytes to [0, 1], and one channel to three."""
    return jnp.broadcast_to(image_NHWC.astype(jnp.float32) / 255, (*image_NHWC.shape[:-1], 3))


def view(key, image_HWC, views, v):
    """In BYOL's order: crop, flip (p .5), jitter (p .8), grey (p .2), blur, solarise."""
    keys = jax.random.split(key, 5)
    happens = lambda i, p: jax.random.bernoulli(keys[i], p)
    image = crop(keys[0], image_HWC, views.crop_area)
    image = jnp.where(happens(1, 0.5), image[:, ::-1], image)
    image = recolour(keys[2], image, views.jitter)
    if views.blur[v]:
        key_draw, key_blur = jax.random.split(keys[3])
        image = jnp.where(jax.random.bernoulli(key_draw, views.blur[v]), blur(key_blur, image),
                          image)
    if views.solarise[v]:
        image = jnp.where(happens(4, views.solarise[v]) & (image >= 0.5), 1 - image, image)
    return 2 * image - 1


def crop(key, image_HWC, least):
    """A box of area U(least, 1) of the image and aspect 3/4 to 4/3 (log-uniform), resized to the
    whole, bicubic. A side longer than the image is cut to it (torchvision would draw again)."""
    key_area, key_aspect, key_place = jax.random.split(key, 3)
    area = jax.random.uniform(key_area, minval=least)
    aspect = jnp.exp(jax.random.uniform(key_aspect, minval=-np.log(4 / 3), maxval=np.log(4 / 3)))
    box = jnp.minimum(1.0, jnp.sqrt(jnp.stack([area / aspect, area * aspect])))
    corner = jax.random.uniform(key_place, (2,)) * (1 - box)
    return jnp.clip(jax.image.scale_and_translate(
        image_HWC, image_HWC.shape, (0, 1), 1 / box, -corner * image_HWC.shape[0] / box, "cubic",
        antialias=False), 0, 1)


LUMA = np.array([0.299, 0.587, 0.114], np.float32)
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)


def recolour(key, image_HWC, strength):
    """Jitter (p .8) in random order: brightness and contrast times 1 +- .4, saturation times
    1 +- .2, hue turned by +-.1 of a circle; then grey (p .2).

    All four are affine maps of the colours of one image (contrast knows its mean; hue turns in YIQ,
    not in HSV), so they are composed first and applied once; colours are clipped at the end only.
    """
    key_factor, key_order, key_jitter, key_grey = jax.random.split(key, 4)
    reach = strength * jnp.array([0.4, 0.4, 0.2, 0.1])
    bright, contrast, saturate, hue = jax.random.uniform(key_factor, (4,), minval=-reach,
                                                         maxval=reach) + jnp.array([1, 1, 1, 0])
    grey, I = jnp.tile(LUMA, (3, 1)), jnp.eye(3)
    cos, sin = jnp.cos(2 * jnp.pi * hue), jnp.sin(2 * jnp.pi * hue)
    turn = I.at[1:, 1:].set(jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])]))
    maps = jnp.stack([bright * I, contrast * I, saturate * I + (1 - saturate) * grey,
                      np.linalg.inv(YIQ) @ turn @ YIQ])
    mean_C = image_HWC.mean((0, 1))
    A, shift = I, jnp.zeros(3)
    for kind in jax.random.permutation(key_order, 4):
        shift_to = (kind == 1) * (1 - contrast) * (LUMA @ (A @ mean_C + shift))
        A, shift = maps[kind] @ A, maps[kind] @ shift + shift_to
    jittered = jax.random.bernoulli(key_jitter, 0.8)
    A, shift = jnp.where(jittered, A, I), jnp.where(jittered, shift, 0)
    to = jnp.where(jax.random.bernoulli(key_grey, 0.2), grey, I)
    return jnp.clip(jnp.einsum("cd,hwd->hwc", to @ A, image_HWC) + to @ shift, 0, 1)


def blur(key, image_HWC):
    """Gaussian of sigma U(.1, 2) pixels, cut at a twentieth of the side; rows, then columns."""
    sigma = jax.random.uniform(key, minval=0.1, maxval=2.0)
    d = np.abs(np.subtract.outer(*[np.arange(image_HWC.shape[0])] * 2))
    weight = jnp.exp(-0.5 * jnp.square(d / sigma)) * (d <= max(1, image_HWC.shape[0] // 20))
    weight /= weight.sum(1, keepdims=True)
    return jnp.einsum("ih,jw,hwc->ijc", weight, weight, image_HWC)
