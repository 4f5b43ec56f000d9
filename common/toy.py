"""A world of small drawn images with captions, so that every script runs without a download.

Each picture shows one object in a bright colour on a dull, textured ground. The object's colour
and shape are the class. Many pictures also show a small white, grey or black object, the
distractor. Picture and caption are made from the same parameters, so every caption is true.
Rare classes, near-copies and images of pure noise are planted in known amounts. With `domains` the
class is the object's shape and its domain, which is a ground that looks the same in every picture.

    data = world(20_000)        # about 3 s on one core
    test = world(2_000, seed=1, duplicates=0, hopeless=0)

Dimensions: N examples, B examples of a chunk, H = W = image_size, C = 3 colours. The unit of length
is the width of the image. v points down. Colours are in [0, 1] until bytes are made of them.
"""

import itertools

import numpy as np


def star(u, v):
    # A star is one edge, mirrored ten times: the angle is folded into a tenth of a turn. The edge
    # goes from the tip at radius 1 to the notch at radius 0.45. The line through it is 0.384 away
    # from the middle, and its normal points to 1.177 rad.
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)
    return np.hypot(u, v) * np.cos(angle - 1.177) - 0.384


# The signed distance to a shape's outline, in radii. It is negative inside. The constants make all
# shapes look equally large.
SHAPES = {"circle": lambda u, v: np.hypot(u, v) - 0.92,
          "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.76,
          "triangle": lambda u, v: np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.5,
          "cross": lambda u, v: np.maximum(np.maximum(np.abs(u), np.abs(v)) - 0.96,
                                           np.minimum(np.abs(u), np.abs(v)) - 0.3),
          "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.73) - 0.25,
          "star": star}
COLOURS = {"red": (220, 40, 45), "yellow": (250, 212, 35), "green": (40, 165, 65),
           "blue": (40, 85, 225), "purple": (150, 50, 190)}
TONES = {"white": (245, 245, 245), "grey": (158, 158, 158), "black": (15, 15, 15)}
# The lightness of a ground, to be clipped to [-1, 1]. a and b are the phases along u and v, in
# radians. k is a slope that makes the edges of a pattern about one pixel wide.
GROUNDS = {"stripes": lambda u, a, b, k: k * np.sin(a),
           "checks": lambda u, a, b, k: k * np.sin(a) * np.sin(b),
           "dots": lambda u, a, b, k: k * (np.cos(a) + np.cos(b) - 0.7),
           "gradient": lambda u, a, b, k: 1.8 * u,
           "grain": lambda u, a, b, k: GRAIN[np.int32(3 * a) % 256, np.int32(3 * b) % 256]}
GROUND_COLOURS = {"tan": (188, 168, 138), "brown": (112, 86, 66), "olive": (112, 114, 74),
                  "slate": (84, 98, 114), "mauve": (146, 116, 132), "teal": (78, 122, 120)}
PLACES = ("top left", "top", "top right", "left", "centre", "right",
          "bottom left", "bottom", "bottom right")

WORDS = {"size": ("small", "medium", "large"), "colour": COLOURS, "shape": SHAPES, "place": PLACES,
         "ground_colour": GROUND_COLOURS, "ground": GROUNDS, "tone": TONES, "other_shape": SHAPES}
# The longest filling of the longest template is 80 characters.
TEMPLATES = ("a {size} {colour} {shape} at {place} on {ground_colour} {ground}{and_other}",
             "on {ground_colour} {ground}: a {size} {colour} {shape}, {place}{and_other}",
             "{place}: a {size} {colour} {shape} on {ground_colour} {ground}{and_other}",
             "{colour} {shape}, {size}, at {place} on {ground_colour} {ground}{and_other}",
             "{other_and}a {size} {colour} {shape} at {place} on {ground_colour} {ground}")

# The ground of a near-copy is shifted with the rest of its picture. So grain is read from a fixed
# tile, by position, and is not drawn anew.
GRAIN = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)
GRAIN = sum(np.roll(GRAIN, (i, j), (0, 1)) for i in range(3) for j in range(3)) / 4


def class_names(domains=0):
    """The names of the classes, in the order of the labels."""
    if not domains:
        return tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
    # 5 grounds and 6 colours have no common factor, so no two of 30 domains share both.
    grounds = zip(itertools.cycle(GROUNDS), itertools.cycle(GROUND_COLOURS))
    return tuple(f"{shape} on {colour} {ground}"
                 for ground, colour in itertools.islice(grounds, domains) for shape in SHAPES)


def world(n, *, image_size=32, seed=0, tail=1.0, duplicates=0.1, hopeless=0.05, radius=0.25,
          domains=0):
    """Draws a world of n examples. The same arguments give the same world.

    Args:
      tail: exponent of the class frequencies, p_k ~ 1 / (k + 1)^tail; 0 makes them equal.
      duplicates: fraction of near-copies, another example's scene moved by at most a pixel.
      hopeless: fraction of images of pure noise, with an ordinary label and caption.
      radius: mean radius of the objects, which differ by up to 0.05. Large ones are easy to learn.
      domains: number of domains; 0 for colour and shape as the class. See `class_names`.
    Returns {'image': uint8 [N, H, W, C], 'label': int32 [N], 'caption': a list of N strings,
    'duplicate' and 'hopeless': bool [N], never both True}. No method may look at the last two.
    Raises: ValueError that names the flag.
    """
    check(n, image_size, tail, duplicates, hopeless, radius, domains)
    rng = np.random.default_rng(seed)
    scene = draw_scenes(rng, n, tail, radius, domains)
    n_hopeless, n_copies = round(hopeless * n), round(duplicates * n)
    noise, copy, ordinary = np.split(rng.permutation(n), [n_hopeless, n_hopeless + n_copies])

    # A few originals are copied very often and most never, as on the web.
    popularity = 1 / np.arange(1, len(ordinary) + 1)
    source = rng.choice(ordinary, n_copies, p=popularity / popularity.sum())
    for values in scene.values():
        values[copy] = values[source]
    scene["shift"][copy] = rng.uniform(-1, 1, (n_copies, 2)) / image_size

    image = render(rng, scene, image_size)
    image[noise] = rng.integers(0, 256, (n_hopeless, *image.shape[1:]), dtype=np.uint8)
    rows = np.arange(n)
    return {"image": image, "label": scene["label"].astype(np.int32), "caption": describe(scene),
            "duplicate": np.isin(rows, copy), "hopeless": np.isin(rows, noise)}


def check(n, image_size, tail, duplicates, hopeless, radius, domains):
    """Raises ValueError, naming the flag, if there is no such world."""
    for flag, value, low, high in (
            ("--toy_examples", n, 1, 10**9), ("--image_size", image_size, 8, 10**4),
            ("--toy_tail", tail, 0, 10), ("--toy_duplicates", duplicates, 0, 1),
            ("--toy_hopeless", hopeless, 0, 1), ("--toy_radius", radius, 0.15, 0.4),
            ("--toy_domains", domains, 0, len(GROUNDS) * len(GROUND_COLOURS))):
        if not low <= value <= high:
            raise ValueError(f"{flag}={value}: want a value from {low} to {high}")
    if round(duplicates * n) + round(hopeless * n) >= n:
        raise ValueError("--toy_duplicates plus --toy_hopeless leave no ordinary example: "
                         f"{duplicates} + {hopeless} of {n}")


def draw_scenes(rng, n, tail, radius, domains):
    """The parameters of n scenes: a dict of arrays [N, ...]. "other" is the distractor."""
    # Training and test worlds have different seeds and must agree on which classes are common.
    rank = np.random.default_rng(0).permutation(len(class_names(domains)))
    p = (1.0 + rank) ** -tail
    label = rng.choice(len(p), n, p=p / p.sum())
    any_of = lambda table: rng.integers(len(table), size=n)
    if domains:
        domain, shape = np.divmod(label, len(SHAPES))
        ground, ground_colour = domain % len(GROUNDS), domain % len(GROUND_COLOURS)
        colour = any_of(COLOURS)
        # Multiples of the golden ratio are spread evenly: two domains differ in angle and scale.
        half_turns, cycles = 0.618 * domain % 1, 2.5 + 2 * (0.382 * domain % 1)
    else:
        shape, colour = np.divmod(label, len(COLOURS))
        ground, ground_colour = any_of(GROUNDS), any_of(GROUND_COLOURS)
        half_turns, cycles = rng.random(n), rng.uniform(2.5, 4.5, n)
    radius = rng.uniform(radius - 0.05, radius + 0.05, n)
    # The object is put into a cell of a 3 x 3 grid, and well inside it. So an object that the
    # caption calls "left" is never nearly at the "centre".
    cell = rng.integers(-1, 2, (n, 2))
    offset = cell * rng.uniform(0.6, 1, (n, 2)) + (cell == 0) * rng.uniform(-0.2, 0.2, (n, 2))
    centre = 0.5 + offset * (0.5 - radius)[:, None]

    # The distractor takes the first of 16 random spots that does not touch the object.
    other_radius = rng.uniform(0.11, 0.15, n)
    spots = 0.5 + rng.uniform(-1, 1, (n, 16, 2)) * (0.5 - other_radius)[:, None, None]
    gap = np.linalg.norm(spots - centre[:, None], axis=-1) - (radius + other_radius)[:, None]
    clear = gap > 0.04
    tone = any_of(TONES)
    return {
        "label": label, "shape": shape, "colour": colour, "place": cell @ (1, 3) + 4,
        "rgb": rgb(COLOURS, colour) + rng.normal(0, 0.03, (n, 3)), "radius": radius,
        "size": np.digitize(2 * radius, (0.45, 0.55)), "centre": centre,
        "turn": rng.uniform(-0.5, 0.5, n), "other": clear.any(1) & (rng.random(n) < 0.55),
        "tone": tone, "other_shape": any_of(SHAPES), "other_rgb": rgb(TONES, tone),
        "other_radius": other_radius, "other_centre": spots[np.arange(n), clear.argmax(1)],
        "other_turn": rng.uniform(-0.5, 0.5, n), "ground": ground,
        "ground_turn": np.pi * half_turns, "ground_colour": ground_colour,
        "ground_rgb": rgb(GROUND_COLOURS, ground_colour), "cycles": cycles,
        "phase": rng.uniform(0, 600, (n, 2)), "shift": np.zeros((n, 2)),
        "template": any_of(TEMPLATES)}


def rgb(table, index):
    return np.array(list(table.values()))[index] / 255


def describe(scene):
    """One English sentence for each scene: a list of N strings."""
    words = {name: np.array(list(table))[scene[name]] for name, table in WORDS.items()}
    captions = []
    for i, template in enumerate(scene["template"]):
        word = {name: column[i] for name, column in words.items()}
        other = "a {tone} {other_shape}".format(**word) if scene["other"][i] else ""
        captions.append(TEMPLATES[template].format(
            **word, and_other=other and f", and {other}", other_and=other and f"{other} and "))
    return captions


def render(rng, scene, image_size):
    """Draws the scenes -> uint8 [N, H, W, C]. Chunks keep the memory small."""
    n = len(scene["shape"])
    image = np.empty((n, image_size, image_size, 3), np.uint8)
    chunk = max(1, 2**17 // image_size**2)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        pixels_BHWC = 255 * paint(take(scene, rows), image_size)
        pixels_BHWC += 6 * rng.standard_normal(pixels_BHWC.shape, np.float32)
        image[rows] = np.clip(pixels_BHWC, 0, 255)
    return image


def paint(scene, image_size):
    """Pictures without noise [B, H, W, C]: the ground, the distractor on it, then the object."""
    pixel = (np.arange(image_size) + 0.5) / image_size
    grid = pixel[:, None] + scene["shift"][:, None]  # [B, H, 2]: x of a column, y of a row
    light_BHW = texture(scene, grid)
    canvas_BHWC = (1 + 0.2 * light_BHW[..., None]) * spread(scene["ground_rgb"])
    rows = np.flatnonzero(scene["other"])
    canvas_BHWC[rows] = stamp(canvas_BHWC[rows], take(scene, rows), grid[rows], "other_")
    return stamp(canvas_BHWC, scene, grid)


def texture(scene, grid):
    """The lightness of the grounds, from -1 to 1, [B, H, W]."""
    u, v = turned(grid, np.full_like(scene["centre"], 0.5), scene["ground_turn"])
    cycles, phase = spread(2 * np.pi * scene["cycles"]), spread(scene["phase"])
    slope = np.broadcast_to(2 * grid.shape[1] / cycles, u.shape)
    return np.clip(by_kind(GROUNDS, scene["ground"], u, u * cycles + phase[..., 0],
                           v * cycles + phase[..., 1], slope), -1, 1)


def stamp(canvas_BHWC, scene, grid, prefix=""):
    """Paints one shape on each picture, with edges one pixel wide and a dark rim around it."""
    u, v = turned(grid, scene[prefix + "centre"], scene[prefix + "turn"])
    radius = spread(scene[prefix + "radius"])
    distance_BHW = radius * by_kind(SHAPES, scene[prefix + "shape"], u / radius, v / radius)
    # With a rim, a shape shows on a ground that has nearly its colour.
    rim, ink = (np.clip(0.5 - (distance_BHW - edge) * grid.shape[1], 0, 1)[..., None]
                for edge in (0.02, 0))
    canvas_BHWC = canvas_BHWC * (1 - 0.45 * rim)
    return canvas_BHWC + ink * (spread(scene[prefix + "rgb"]) - canvas_BHWC)


def turned(grid, centre, turn):
    """Coordinates u, v [B, H, W] from a centre [B, 2], along axes turned by an angle [B]."""
    x, y = np.moveaxis((grid - centre[:, None]).astype(np.float32), -1, 0)
    x, y, cos, sin = x[:, None, :], y[:, :, None], spread(np.cos(turn)), spread(np.sin(turn))
    return cos * x + sin * y, cos * y - sin * x


def by_kind(table, kind, *arrays):
    """Applies to each row the function of its kind, and no other: that would be wasted time."""
    out = np.empty_like(arrays[0])
    for i, draw in enumerate(table.values()):
        out[kind == i] = draw(*(array[kind == i] for array in arrays))
    return out


def take(scene, rows):
    return {name: values[rows] for name, values in scene.items()}


def spread(values):
    """[B, ...] -> float32 [B, 1, 1, ...], which broadcasts over images."""
    return values.astype(np.float32)[:, None, None]
