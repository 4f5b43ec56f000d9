"""Published SigLIP weights as jest.py's reference, and the file of its embeddings."""

import json
import os
import shutil
import sys
import tracemalloc
import types

import jax
import numpy as np
import pytest

import jest
from common import data, flags, prepared as prepared_sets, reference, siglip, vit
from processes import Command, assert_refused, refusals, rows
import write_siglip

# A tokenizer of 256 pieces. It stands in for the package, which the tests do without.
STAND_IN = '''
class SentencePieceProcessor:
    def __init__(self, model_file):
        name, self.pieces = open(model_file).read().split()
        assert name == "tiny"

    def encode(self, text):
        return [2 + byte % 250 for byte in text.encode()]

    def vocab_size(self):
        return int(self.pieces)
'''
# Other sides, widths, contexts and vocabularies than those of the learner.
MODEL = siglip.SigLIP(vit.ViT("16/1/24/2", 12, 4, 0, pool="map"),
                      vit.Text("16/2/24/2", 256, 20, 16, pool="last", mask_padding=False))
LEARNER = ("--steps=3", "--active_steps=0", "--batch_size=8", "--eval_every=3",
           "--model=16/1/32/1", "--patch=8", "--context=24", "--embed=8", "--n_chunks=3",
           "--filter_ratio=0.5", "--caption_noise=0.5")


def encode(text):
    return [2 + byte % 250 for byte in text.encode()]


@pytest.fixture(scope="module")
def params():
    params = jax.jit(siglip.init, static_argnums=1)(jax.random.key(0), MODEL)
    rng = np.random.default_rng(0)  # no zeros and ones, which would hide a mistake
    return jax.tree.map(lambda x: np.float32(rng.normal(0, 0.4, x.shape)) if x.ndim else
                        np.asarray(x), params)


@pytest.fixture(scope="module")
def weights(params, tmp_path_factory):
    """A directory with the model as Hugging Face's files and as big_vision's, its tokenizer, and
    the module that stands in for sentencepiece."""
    folder = tmp_path_factory.mktemp("weights")
    write_siglip.write_safetensors(folder / "model.safetensors",
                                   write_siglip.to_hugging_face(params, MODEL))
    heads = {"num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps({"text_config": heads, "vision_config": heads}))
    np.savez(folder / "model.npz", **write_siglip.to_big_vision(params, MODEL))
    (folder / "spiece.model").write_text("tiny 256")
    (folder / "sentencepiece.py").write_text(STAND_IN)
    return folder


@pytest.fixture
def stand_in(weights, monkeypatch):
    """sentencepiece, in this process and in those that it starts."""
    module = types.ModuleType("sentencepiece")
    exec(STAND_IN, vars(module))
    monkeypatch.setitem(sys.modules, "sentencepiece", module)
    monkeypatch.setenv("PYTHONPATH", str(weights))


@pytest.fixture(scope="module")
def source(prepared):
    return data.open_source(str(prepared["captioned"]), "train", context=24, need=("caption",))


@pytest.fixture(scope="module")
def shown(source, prepared):
    return reference.as_shown(source, MODEL, encode, dataset=str(prepared["captioned"]),
                              split="train")


def embeddings(params, image, tokens):
    """The reference's own forward, of everything at once."""
    model = jest.Model("sigmoid", MODEL.image, MODEL.text)
    got = jest.embed(params, {"image": image, "tokens": tokens}, model)
    return {k: np.asarray(got[k]) for k in ("image", "text")}


# ------------------------------------------------------------------------------ what it is shown


def test_it_sees_its_own_pixels_and_tokens_and_not_the_learners(shown, source):
    ids = source.ids[[5, 0, 31]]
    got = shown.read(ids)
    for i, image, tokens, text in zip(ids, got["image"], got["tokens"], source.describe(ids)):
        stored = source.read([i])["image"][0]  # this set has images of one size
        np.testing.assert_array_equal(image, siglip.preprocess(stored, 12))
        np.testing.assert_array_equal(tokens, siglip.tokenize(text, encode, MODEL.text))
    assert got["image"].dtype == np.uint8 and got["tokens"].shape == (3, 20)


def test_images_of_all_shapes_are_squashed_from_the_files(prepared):
    part = reference.Uncut(str(prepared["labelled"]), "train", data_dir=None, image_size=12,
                           captions=False, need=(), flags=("dataset", "split"))
    ids = part.ids[:6]
    shapes = set()
    for row, image in zip(part.parse(ids, part.records(ids), "image"), part.read(ids)["image"]):
        stored = np.asarray(prepared_sets.pixels(row["image"]))
        shapes.add(stored.shape[:2])
        np.testing.assert_array_equal(image, siglip.preprocess(stored, 12))
    assert shapes == {(16, 16), (24, 19), (16, 40)}


def test_toys_pictures_are_enlarged():
    toy = data.open_source("toy", "train", context=24, toy_knobs=dict(
        n=20, tail=1.0, duplicates=0.1, hopeless=0.0))
    got = reference.as_shown(toy, MODEL, encode, dataset="toy", split="train").read(toy.ids[3:5])
    np.testing.assert_array_equal(
        got["image"][1], siglip.preprocess(toy.read(toy.ids[4:5])["image"][0], 12))
    np.testing.assert_array_equal(
        got["tokens"][1], siglip.tokenize(toy.describe([4])[0], encode, MODEL.text))


def test_both_formats_are_the_same_reference(weights, params, stand_in):
    for name in ("model.npz", "model.safetensors", "."):
        model, loaded, its_encode = reference.load_published(
            str(weights / name), str(weights / "spiece.model"), dtype="bfloat16")
        assert its_encode("Bee") == encode("Bee")
        assert (model.image.dtype, model.text.dtype) == ("bfloat16", "bfloat16")
        assert (vit.architecture(model.image), vit.architecture(model.text)) == (
            vit.architecture(MODEL.image), vit.architecture(MODEL.text))
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert reference.load_published(str(weights), str(weights / "spiece.model"), image_size=24)[
        0].image.tokens == 36


def test_a_real_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    path, sentences = tmp_path / "spiece.model", [f"a picture of {i} bees" for i in range(30)]
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=f, vocab_size=60,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    its_encode, pieces = data.open_sentencepiece(path, "reference_tokenizer")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert pieces == theirs.vocab_size() and its_encode(sentences[3]) == theirs.encode(sentences[3])
    assert 1 not in its_encode(sentences[3])
    with pytest.raises(ValueError, match="--reference_tokenizer=.*not a sentencepiece model"):
        data.open_sentencepiece(__file__, "reference_tokenizer")


# ------------------------------------------------------------------------- the embeddings of a pool


@pytest.fixture(scope="module")
def embed_shown(params, shown):
    """The embeddings of all shown examples in a file, over all devices."""
    model = jest.Model("sigmoid", MODEL.image, MODEL.text)
    forward = jest.make_forwards(model)[0]
    return lambda path, **more: jest.embed_pool(str(path), params, model, forward,
                                                data.Pool(shown), 8, **more)


def test_planted_noise_moves_the_embeddings_of_captions(embed_shown, params, shown, source,
                                                        tmp_path):
    array, _ = embed_shown(tmp_path / "embeddings.npy")
    assert type(array) is np.memmap and not array.flags.writeable
    pool = data.Pool(source, noise=0.5, field="tokens", seed=3)
    pool = pool.subset(pool.ids[7:])  # some captions come from outside
    cached = lambda ids: reference.take(array, data.Pool(shown), pool, ids)
    batch = next(jest.load_batches(pool, 0, 16, 3, 2, cached, selects=True))
    ids = data.batch_ids(pool.ids, 0, 2, 16)
    texts = source.describe(pool.donor(ids))
    captions = np.stack([siglip.tokenize(text, encode, MODEL.text) for text in texts])
    assert (pool.donor(ids) != ids).sum() > 3
    # It is the same donor whose tokens the learner gets.
    np.testing.assert_array_equal(batch["tokens"].reshape(16, -1), np.stack(
        [data.tokenize(text, 24) for text in texts]))
    direct = embeddings(params, shown.read(ids)["image"], captions)
    for k in ("image", "text"):
        np.testing.assert_allclose(batch[f"reference_{k}"].reshape(16, 16), direct[k], atol=2e-6)


def test_a_trained_reference_has_the_noise_in_its_rows(tmp_path):
    """A pool that was embedded with the captions that it has is asked by the same ids."""
    toy = data.open_source("toy", "train", context=24, toy_knobs=dict(
        n=20, tail=1.0, duplicates=0.0, hopeless=0.0))
    pool = data.Pool(toy, noise=0.8, field="tokens").subset(toy.ids[5:])
    array = np.random.default_rng(0).normal(size=(15, 2, 3))
    got = reference.take(array, pool, pool, pool.ids[[4, 2]])
    np.testing.assert_array_equal(got["image"], array[[4, 2], 0])
    np.testing.assert_array_equal(got["text"], array[[4, 2], 1])


class Killed(Exception):
    pass


N, WIDTH, BATCH = 23, 6, 4
ROWS = np.random.default_rng(0).normal(size=(N, 2, WIDTH)).astype(np.float32)


def embed(start, kill_after=None, starts=None):
    """Batches of ROWS; raises Killed after so many."""
    if starts is not None:
        starts.append(start)
    for n, begin in enumerate(range(start, N, BATCH)):
        if n == kill_after:
            raise Killed
        yield ROWS[begin:begin + BATCH], 0.5


def write(path, embed=embed, made_by="w", **more):
    return reference.embed_pool(str(path), {"weights": made_by}, (N, 2, WIDTH), embed,
                                **{"record_after": 0.0, **more})


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole" / "e.npy")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("kill_after, record_after, kept", [
    (0, 0.0, 0), (1, 0.0, 4), (5, 0.0, 20), (3, 1e9, 0)])
def test_killed_and_resumed_the_file_has_the_same_bytes(tmp_path, whole, kill_after, record_after,
                                                        kept):
    folder, starts = tmp_path / "killed", []
    folder.mkdir()
    with pytest.raises(Killed):
        write(folder / "e.npy", lambda start: embed(start, kill_after), record_after=record_after)
    array, seconds = write(folder / "e.npy", lambda start: embed(start, starts=starts))
    assert starts == [kept] and seconds == 6 * 0.5
    np.testing.assert_array_equal(array, ROWS)
    assert contents(folder) == whole
    np.testing.assert_array_equal(write(folder / "e.npy", lambda start: 1 / 0)[0], ROWS)


def test_rows_that_were_written_without_their_record_are_written_again(tmp_path, whole):
    folder = tmp_path / "torn"
    folder.mkdir()
    with pytest.raises(Killed):
        write(folder / "e.npy", lambda start: embed(start, 3))
    with open(folder / "e.npy", "r+b") as f:
        f.seek(-(N - 13) * 2 * WIDTH * 4, os.SEEK_END)
        f.write(b"x" * 50)
    write(folder / "e.npy")
    assert contents(folder) == whole


def test_a_stop_that_was_asked_for_keeps_what_is_done(tmp_path, whole):
    folder, asked = tmp_path / "stopped", []
    folder.mkdir()
    with pytest.raises(flags.Stopped, match="after 8 of 23 examples"):
        write(folder / "e.npy", stop=lambda: asked.append(1) or len(asked) == 2, record_after=1e9)
    starts = []
    write(folder / "e.npy", lambda start: embed(start, starts=starts), stop=lambda: False)
    assert starts == [8] and contents(folder) == whole


def test_a_model_that_is_stopped_goes_on_with_the_same_bytes(embed_shown, tmp_path):
    embed_shown(tmp_path / "whole.npy")
    with pytest.raises(flags.Stopped, match="after 8 of 48"):
        embed_shown(tmp_path / "resumed.npy", stop=lambda: True)
    array, _ = embed_shown(tmp_path / "resumed.npy")
    assert (np.linalg.norm(array, axis=-1) > 0.999).all()
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "resumed.npy").read_bytes()


def test_memory_does_not_grow_with_the_pool(tmp_path):
    def peak(n):
        batches = lambda start: ((np.zeros((64, 2, 64), np.float32), 0.0)
                                 for _ in range(start, n, 64))
        tracemalloc.start()
        try:
            for _ in range(2):  # made, and found
                array, _ = reference.embed_pool(str(tmp_path / f"{n}.npy"), {}, (n, 2, 64),
                                                batches, record_after=1e9)
            assert isinstance(array, np.memmap)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    peak(64)
    assert peak(64 * 200) < peak(64 * 20) + 2**21  # files of 6.5 and 0.65 MB


@pytest.mark.parametrize("rows_done", [N, 12])
@pytest.mark.parametrize("change, words", [
    ("cut", "damaged"), ("value", "damaged .its hash differs"), ("record", "damaged"),
    ("gone", "damaged .FileNotFoundError"), ("weights", "other weights")])
def test_embeddings_that_are_damaged_or_of_another_model_are_refused(tmp_path, change, words,
                                                                     rows_done):
    path, record = tmp_path / "e.npy", tmp_path / "e.npy.json"
    try:
        write(path, lambda start: embed(start, None if rows_done == N else 3))
    except Killed:
        pass
    size = os.path.getsize(path)
    if change == "cut":
        os.truncate(path, size - 40)
    if change == "value":
        with open(path, "r+b") as f:
            f.seek(size - N * 2 * WIDTH * 4 + 100)
            f.write(b"x")
    if change == "record":
        record.write_text(record.read_text()[:20])
    if change == "gone":
        path.unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        write(path, lambda start: 1 / 0, made_by="v" if change == "weights" else "w")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------- the command


def test_jest_is_steered_by_published_weights(weights, params, shown, source, prepared, stand_in,
                                              tmp_path):
    workdir = tmp_path / "run"
    Command(tmp_path, "jest.py").good(
        *LEARNER, f"--dataset={prepared['captioned']}", f"--reference={weights}",
        f"--reference_tokenizer={weights}/spiece.model", "--arms=uniform,jest_easy_reference",
        "--seeds=0,1", f"--workdir={workdir}", PYTHONPATH=str(weights))
    last = {r["arm"]: r for r in rows(workdir) if r["seed"] == 0}
    model = jest.Model("sigmoid", MODEL.image, MODEL.text)
    flops = last["jest_easy_reference"]["flops"]
    assert flops["reference_training"] == 0
    assert flops["reference_scoring"] == 48 * jest.forward_flops(model)
    assert flops["selection"] == 3 * jest.sampler_flops("easy_reference", 8, 16, 3, 8, 16)
    assert flops["selection"] > 3 * jest.sampler_flops("easy_reference", 8, 16, 3, 8)
    assert set(last) == {"uniform", "jest_easy_reference"}

    # The score of a uniform sub-batch, by the whole pool with its noise: the reference's alone.
    pool = data.Pool(source, noise=0.5, field="tokens", seed=0)
    ids = data.batch_ids(pool.ids, 0, 3, 16)[:8]
    got = embeddings(params, shown.read(ids)["image"], shown.read(pool.donor(ids))["tokens"])
    loss = jest.contrastive_loss({**got, **jest.logit_scale_and_bias(params)}, "sigmoid")
    assert last["jest_easy_reference"]["score_uniform"] == pytest.approx(-float(loss), rel=1e-4)

    # The second seed finds the embeddings of the first, and bears their whole cost too.
    assert {p.name for p in workdir.glob("embeddings*")} == {"embeddings.npy",
                                                             "embeddings.npy.json"}
    second = rows(workdir)[-1]
    assert (second["arm"], second["seed"]) == ("jest_easy_reference", 1)
    for k in ("flops", "setup_seconds"):
        assert second[k] == last["jest_easy_reference"][k]


def test_what_cannot_be_a_reference_is_refused_before_any_work(weights, params, stand_in,
                                                               tmp_path):
    bad = {name: tmp_path / f"{name}.safetensors" for name in ("cut", "clip", "naflex")}
    good = weights / "model.safetensors"
    bad["cut"].write_bytes(good.read_bytes()[:3000])
    shutil.copy(weights / "config.json", tmp_path)
    tensors = siglip.read_safetensors(good)
    write_siglip.write_safetensors(bad["clip"], {k: v for k, v in tensors.items()
                                                 if "vision_model.head" not in k})
    name = "vision_model.embeddings.patch_embedding.weight"
    write_siglip.write_safetensors(bad["naflex"], {**tensors, name: tensors[name].reshape(16, -1)})
    (tmp_path / "big.model").write_text("tiny 32000")
    (tmp_path / "empty").mkdir()
    tokenizer, npz = f"--reference_tokenizer={weights}/spiece.model", f"{weights}/model.npz"
    cases = [
        ([f"--reference={npz}"], "--reference=.*npz: .*--reference_tokenizer"),
        ([f"--reference={npz}", "--reference_tokenizer=none.model"],
         "--reference_tokenizer=none.model: no such"),
        ([f"--reference={npz}", f"--reference_tokenizer={__file__}"],
         "--reference_tokenizer=.*: not a sentencepiece"),
        ([f"--reference={npz}", f"--reference_tokenizer={tmp_path}/big.model"],
         "--reference=.*npz: .*32,000 pieces.*256"),
        ([f"--reference={bad['cut']}", tokenizer], "--reference=.*cut.*cut off"),
        ([f"--reference={bad['clip']}", tokenizer], "--reference=.*clip.*not a SigLIP"),
        ([f"--reference={bad['naflex']}", tokenizer], "--reference=.*naflex.*NaFlex"),
        ([f"--reference={tmp_path}/none.npz", tokenizer], "--reference=.*none.npz: .*[Nn]o such"),
        ([f"--reference={tmp_path}/empty", tokenizer], "--reference=.*empty: holds no checkpoint"),
        ([f"--reference={npz}", tokenizer, "--reference_image_size=26"],
         "--reference=.*npz: .*patch of 4.*26"),
        ([f"--reference={npz}", tokenizer, "--reference_scores=computed"],
         "--reference_scores=computed: want cached"),
        ([f"--reference={npz}", tokenizer, "--loss=softmax"], "--loss=softmax: want sigmoid"),
        ([f"--reference={npz}", tokenizer, "--reference_dataset=toy"],
         "--reference_dataset=toy: want none"),
    ]
    workdir = f"--workdir={tmp_path}/run"
    toy = ("--arms=uniform,jest", "--batch_size=8", "--toy_examples=100", "--n_chunks=2",
           "--filter_ratio=0.5")
    for done, (_, words) in zip(refusals("jest", [[*toy, workdir, *given] for given, _ in cases],
                                         devices=1), cases, strict=True):
        assert_refused(done, words)
    assert not (tmp_path / "run").exists()
