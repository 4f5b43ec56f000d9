"""Random views of an image, drawn on the device, with BYOL's recipe (2006.07733, appendix B).

A view depends only on the key and on the image's place in the whole batch. The probability of each
transform is where the transform is applied, in `view` and `recolour`. What a small image needs
otherwise is set in `Views`. Images are square.

Two transforms differ from BYOL's code. It crops to whole pixels before it resizes, while `crop`
has fractional boxes, whose border also reads the pixels just outside. It does not blur below 20
pixels, where its kernel has a single weight, while `blur` has three weights there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

# of ImageNet, for every data set: BYOL normalises its inputs with them
MEAN, DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
LUMA = np.float32([0.2989, 0.5870, 0.1140])  # the part of red, green and blue in grey


@dataclasses.dataclass(frozen=True)
class Views:
    """How views are drawn. The defaults are BYOL's table 6. Blur and solarisation have one
    probability for the first view and one for the second."""
    crop_area: float = 0.08
    jitter: float = 1.0
    blur: tuple = (1.0, 0.1)
    solarise: tuple = (0.0, 0.2)


def draw_views(key, place_N, image_NHWC, views, n_views):
    """The first one or two views of each image: float32 [n_views, N, H, W, 3], normalised.

    image_NHWC: bytes with one or three channels. place_N: where each image stands in the whole
    batch. Its views are drawn from the key and that place, so that they are the same on any number
    of devices.
    """
    def one(v, place, image_HWC):
        key_view = jax.random.fold_in(jax.random.fold_in(key, place), v)
        return view(key_view, image_HWC, views, v)
    every_image = jax.vmap(one, in_axes=(None, 0, 0))
    return jax.vmap(every_image, in_axes=(0, None, None))(
        jnp.arange(n_views), place_N, rgb(image_NHWC))


def rgb(image_NHWC):
    """Bytes with one or three channels to floats in [0, 1] with three."""
    return jnp.broadcast_to(image_NHWC.astype(jnp.float32) / 255, (*image_NHWC.shape[:-1], 3))


def normalise(image_HWC):
    """Colours in [0, 1] to what the encoder reads."""
    return (image_HWC - MEAN) / DEVIATION


def view(key, image_HWC, views, v):
    """View `v` (0 or 1) of an image in [0, 1], normalised. The transforms are applied in BYOL's
    order: crop, flip (p .5), colour jitter (p .8), grey (p .2), blur, solarisation."""
    keys = jax.random.split(key, 5)
    happens = lambda i, p: jax.random.bernoulli(keys[i], p)
    p_blur, p_solarise = jnp.array(views.blur)[v], jnp.array(views.solarise)[v]
    image = crop(keys[0], image_HWC, views.crop_area)
    image = jnp.where(happens(1, 0.5), image[:, ::-1], image)
    image = recolour(keys[2], image, views.jitter)
    if any(views.blur):
        key_happens, key_blur = jax.random.split(keys[3])
        image = jnp.where(jax.random.bernoulli(key_happens, p_blur), blur(key_blur, image), image)
    if any(views.solarise):
        image = jnp.where(happens(4, p_solarise) & (image >= 0.5), 1 - image, image)
    return normalise(image)


def crop(key, image_HWC, least):
    """A random box, resized to the whole image with bicubic interpolation.

    The area of the box is U(least, 1) of the image. Its aspect is log-uniform from 3/4 to 4/3. A
    side that would be longer than the image is cut to the image, as in BYOL (torchvision draws the
    box again).
    """
    key_area, key_aspect, key_place = jax.random.split(key, 3)
    area = jax.random.uniform(key_area, minval=least)
    aspect = jnp.exp(jax.random.uniform(key_aspect, minval=-np.log(4 / 3), maxval=np.log(4 / 3)))
    box = jnp.minimum(1.0, jnp.sqrt(jnp.stack([area / aspect, area * aspect])))
    corner = jax.random.uniform(key_place, (2,)) * (1 - box)
    return jnp.clip(jax.image.scale_and_translate(
        image_HWC, image_HWC.shape, (0, 1), 1 / box, -corner * image_HWC.shape[0] / box, "cubic",
        antialias=False), 0, 1)


def recolour(key, image_HWC, strength):
    """Colour jitter with probability .8, then grey with probability .2.

    The jitter draws four amounts, each within `strength` times BYOL's reach: what is added to the
    brightness (.4), the factors of contrast (1 +- .4) and saturation (1 +- .2), and the part of a
    circle by which the hue turns (.1).
    """
    key_amount, key_order, key_jitter, key_grey = jax.random.split(key, 4)
    reach = strength * np.float32([0.4, 0.4, 0.2, 0.1])
    amount = jax.random.uniform(key_amount, (4,), minval=-reach, maxval=reach)
    jittered = jitter(image_HWC, jax.random.permutation(key_order, 4),
                      *(amount + np.float32([0, 1, 1, 0])))
    image_HWC = jnp.where(jax.random.bernoulli(key_jitter, 0.8), jittered, image_HWC)
    grey = (image_HWC @ LUMA)[..., None]
    return jnp.where(jax.random.bernoulli(key_grey, 0.2), grey, image_HWC)


def jitter(image_HWC, order, brightness, contrast, saturation, hue):
    """Changes brightness (0), contrast (1), saturation (2) and hue (3) of an image in [0, 1].

    order: those four numbers in the order in which the changes are made. It matters, because the
    colours are clipped to [0, 1] after each change.
    """
    def change_contrast(x_CHW):
        mean_C11 = x_CHW.mean((1, 2), keepdims=True)
        return mean_C11 + contrast * (x_CHW - mean_C11)
    changes = [lambda x_CHW: x_CHW + brightness, change_contrast,
               lambda x_CHW: saturate(x_CHW, saturation), lambda x_CHW: turn_hue(x_CHW, hue)]
    # Under vmap `switch` makes all four changes and keeps one: in a loop they are compiled once.
    # With the channels first, what is done to one channel runs along the memory.
    image_CHW = jax.lax.fori_loop(
        0, 4, lambda i, x_CHW: jnp.clip(jax.lax.switch(order[i], changes, x_CHW), 0, 1),
        jnp.moveaxis(image_HWC, -1, 0))
    return jnp.moveaxis(image_CHW, 0, -1)


def saturate(image_CHW, factor):
    """Multiplies the saturation in HSV, at most up to 1, and leaves hue and value.

    With value V = max(r, g, b) and chroma C = V - min(r, g, b), the saturation is C / V. A colour
    that keeps its hue keeps the proportions of V - r, V - g and V - b, the largest of which is C.
    So all three are scaled: by the factor, or by V / C where the factor would take C beyond V.
    """
    value_HW, chroma_HW = value_and_chroma(image_CHW)
    scale_HW = jnp.minimum(factor, value_HW / chroma_HW)
    return value_HW - (value_HW - image_CHW) * scale_HW


def turn_hue(image_CHW, turn):
    """Turns the hue in HSV by a part of a circle, and leaves saturation and value.

    The hue counts sixths of the circle: red 0, yellow 1, green 2, cyan 3, blue 4, magenta 5. Each
    channel is read off at the hue's distance from the channel's own colour: V up to a distance of
    one sixth, V - C from two sixths on, and a line between. Example: orange (1, .5, 0) has V = 1,
    C = 1 and hue .5. Turned by 1 / 6 it has hue 1.5, which is .5 from green and 1.5 from red: the
    colour (.5, 1, 0).
    """
    value_HW, chroma_HW = value_and_chroma(image_CHW)
    r, g, b = image_CHW
    red, green = r == value_HW, g == value_HW  # the largest channel; of equal ones the first
    difference_HW = jnp.where(red, g - b, jnp.where(green, b - r, r - g))
    hue_HW = jnp.where(red, 0, jnp.where(green, 2, 4)) + difference_HW / chroma_HW + 6 * turn
    distance_CHW = hue_HW - np.float32([0, 2, 4])[:, None, None]
    distance_CHW = jnp.abs(distance_CHW - 6 * jnp.round(distance_CHW / 6))  # on the circle
    return value_HW - chroma_HW * jnp.clip(distance_CHW - 1, 0, 1)


def value_and_chroma(image_CHW):
    """V and C of HSV. C of a grey pixel is 0; it is a little more here, as a divisor."""
    value_HW = image_CHW.max(0)
    return value_HW, jnp.maximum(value_HW - image_CHW.min(0), 1e-9)


def blur(key, image_HWC):
    """Gaussian of standard deviation U(.1, 2) pixels, cut off at a twentieth of the side. Outside
    the image is black, as in BYOL, so that blurred edges are darker."""
    sigma, radius = jax.random.uniform(key, minval=0.1, maxval=2.0), max(
        1, image_HWC.shape[0] // 20)
    weight = lambda distance: jnp.exp(-0.5 * jnp.square(distance / sigma))
    distance = np.abs(np.subtract.outer(*[np.arange(image_HWC.shape[0])] * 2))
    kernel = jnp.where(distance <= radius, weight(distance), 0) / weight(
        np.arange(-radius, radius + 1)).sum()
    return jnp.einsum("ih,jw,hwc->ijc", kernel, kernel, image_HWC)
