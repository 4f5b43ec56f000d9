"""JEST: Data Curation via Joint Example Selection (Evans et al., 2406.17711), and Flexi-JEST.

Contrastive learning of images and texts, where a batch is worth more than its examples one by one:
its negatives are in it. Per step
  1. draw a super-batch of B = b / (1 - f) pairs uniformly                    `data.batches`
  2. embed it with the learner, and with a frozen reference                   `embed`
  3. S[i,j] = loss of pair (i,j) under the learner - under the reference      `score_matrix`
  4. draw a sub-batch T of b in chunks; after the first chunk, candidate i not in T is drawn with
     probability softmax(S[i,i] + sum over j in T of S[i,j] + S[j,i])         `jointly_sample`
  5. update the learner on T, with the ordinary contrastive loss              `update`
Flexi-JEST scores at a coarser patch, and trains half of T at it (`at_patch`, `embed_flexi`).
`step_flops` keeps the bill. The reference is trained first, on a small curated part of the pool.

Dimension letters: B super-batch, N a device's share of it, S sub-batch (b), C chunk, K chunks, G
groups within one, A all rows of a batch on all devices, E embedding, P patch side, D width, H W
image. T is the sub-batch so far; as a dimension, tokens.

Minutes on a CPU:       python jest.py
README's measurements:  python jest.py --preset=emoji, and more flags: see there
Model of the paper:     python jest.py --preset=siglip_B  (a trial, on generated images)

Where the paper is silent there is a flag (first chunk, temperature, what an independent score is);
where we differ: README, "jest.py, beside the paper".
"""

import dataclasses
import functools
import os

from absl import flags
import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import checkpoint, data, devices, report, retrieval, run, stage, vit
from common.devices import AXIS

METHODS = ("uniform", "independent", "jest", "flexi_jest")
# score -> the sign of each model's loss in it: loss under the learner - loss under the reference
SCORES = {"learnability": {"learner": 1, "reference": -1}, "easy_reference": {"reference": -1},
          "hard_learner": {"learner": 1}}

PRESETS = {
    # minutes on two CPU cores
    "toy": dict(
        arms=["uniform", "jest", "flexi_jest"], caption_noise=0.8, toy_examples=16_000,
        model="48/2/192/3", patch=8, low_patch=16, context=72, filter_ratio=0.8, n_chunks=8,
        curated_fraction=0.25, reference_noise=0.0, steps=400, active_steps=200,
        reference_steps=600, batch_size=64, eval_every=50, learning_rate=1e-3,
        reference_learning_rate=2e-3),
    # the README's table
    "emoji": dict(
        dataset="emoji", caption_noise=0.8, image_size=32, patch=8, low_patch=16, context=32,
        model="64/2/256/4", filter_ratio=0.8, n_chunks=16, curated_fraction=0.2,
        reference_noise=0.0, steps=1200, active_steps=300, reference_steps=800, batch_size=128,
        eval_every=30, learning_rate=5e-4, active_learning_rate=1e-3,
        reference_learning_rate=1e-3),
    # the paper's models on generated images. Its run: --batch_size=32768 --steps=122070 (4e9 pairs)
    # --warmup=0.164 (20k steps), a 32k sentencepiece --tokenizer (bytes cut captions short) and a
    # --reference_dataset of about 1e8 curated pairs
    "siglip_B": dict(
        image_size=256, toy_examples=4096, model="B", patch=16, low_patch=32, context=64, embed=768,
        dtype="bfloat16", filter_ratio=0.8, n_chunks=16, batch_size=256, steps=1000,
        reference_steps=100, reference_scores="computed"),
}


def define_flags():
    run.define_flags("jest")
    flags.adopt_module_key_flags(run)  # so that --help shows them too
    f = flags
    # method
    f.DEFINE_list("arms", ["uniform", "independent", "jest", "flexi_jest"], "of "
                  f"{', '.join(METHODS)}, each but uniform also with _easy_reference or "
                  "_hard_learner behind it (plain: learnability); the first is the baseline")
    f.DEFINE_float("filter_ratio", 0.8, "f = 1 - b/B: part of the super-batch that is left out")
    f.DEFINE_integer("n_chunks", 16, "chunks in which jest draws its sub-batch")
    f.DEFINE_enum("first_chunk", "self", ["self", "uniform"], "drawn by the self-scores S[i,i] "
                  "(the paper's comment), or uniformly (its code)")
    f.DEFINE_float("temperature", 1.0, "T of softmax(logit / T) (paper: none printed)")
    f.DEFINE_enum("independent_score", "self", ["self", "super_batch"], "of the independent arm: "
                  "S[i,i] (jest's first chunk), or the example's loss in the super-batch")
    f.DEFINE_float("curated_fraction", 0.2, "part of the pool that is set apart to train the "
                   "reference")
    f.DEFINE_float("reference_noise", 0.0, "caption noise of that part; -1: the pool's")
    f.DEFINE_string("reference_dataset", None, "trains the reference on another data set, whole")
    f.DEFINE_string("reference", "curated", "'curated': trained first, on the curated part or on "
                    "--reference_dataset; or the checkpoint directory of such a stage ('{seed}' is "
                    "filled in)")
    f.DEFINE_enum("reference_scores", "cached", ["cached", "computed"], "'cached': the pool is "
                  "embedded once, by example id; 'computed': each super-batch as it comes")
    f.DEFINE_string("score_cache", None, "file of cached reference embeddings; '{seed}' is filled "
                    "in (default: in the work directory)")
    f.DEFINE_integer("low_patch", 32, "patch at which flexi_jest scores, and trains a half")
    f.DEFINE_bool("cotrain", True, "flexi_jest trains half of the sub-batch at --low_patch")
    # model
    f.DEFINE_enum("loss", "sigmoid", ["sigmoid", "softmax"], "contrastive loss (eq 1 softmax, eq 2 "
                  "sigmoid)")
    f.DEFINE_string("model", "B", "size of both towers: " + ", ".join(vit.SIZES)
                    + ", or width/depth/mlp/heads")
    f.DEFINE_string("reference_model", "", "size of the reference's towers; empty: --model")
    f.DEFINE_integer("patch", 16, "patch side in pixels, at full resolution")
    f.DEFINE_enum("pool", "map", ["gap", "map"], "'gap': mean of the tokens; 'map': attention "
                  "pooling")
    f.DEFINE_integer("embed", 64, "width E of the joint embedding")
    f.DEFINE_integer("context", 64, "tokens per caption; longer ones are cut")
    f.DEFINE_string("tokenizer", None, "sentencepiece model file; without it, the caption's bytes")
    f.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the activations")
    f.DEFINE_bool("remat", False, "recompute blocks in the backward pass: memory for time")
    f.DEFINE_string("prompt", "a {}", "zero-shot caption of a class, where the data has labels")
    # optimisation
    f.DEFINE_integer("steps", 1000, "updates of the learner")
    f.DEFINE_integer("active_steps", 0, "updates in every arm but uniform, whose schedule then "
                     "ends there; 0: as many as --steps")
    f.DEFINE_integer("reference_steps", 0, "updates of the reference; 0: as many as --steps")
    f.DEFINE_integer("batch_size", 128, "b: pairs per update")
    f.DEFINE_float("learning_rate", 1e-3, "peak, of Adam; linear warm-up, cosine to 0")
    f.DEFINE_float("active_learning_rate", 0.0, "peak in every arm but uniform, whose best is "
                   "lower where most captions are wrong; 0: --learning_rate")
    f.DEFINE_float("reference_learning_rate", 1e-3, "peak, of the reference")
    f.DEFINE_float("weight_decay", 1e-4, "AdamW's: times the learning rate, as in optax; on the "
                   "weights of linear maps")
    f.DEFINE_float("beta2", 0.95, "of Adam")
    f.DEFINE_float("clip_norm", 1.0, "gradients are scaled down to this global norm")
    f.DEFINE_float("warmup", 0.05, "fraction of the steps")


# ------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Model:
    """Two towers into one embedding space, and the loss ('sigmoid' or 'softmax') between them."""
    loss: str
    image: vit.ViT
    text: vit.Text


def init(key, model):
    """t = exp(log_t) starts at 10 and b at -10 (SigLIP): at first nearly all pairs count as
    negatives, which they are. The softmax has no b: it would cancel."""
    key_image, key_text = jax.random.split(key)
    bias = {"sigmoid": {"b": jnp.array(-10.0)}, "softmax": {}}[model.loss]
    return {"image": vit.vit_init(key_image, model.image),
            "text": vit.text_init(key_text, model.text), "log_t": jnp.log(10.0), **bias}


def embed(params, batch, model):
    """A side: L2-normalised embeddings 'image', 'text' [N, E] under one model, and what turns their
    products into logits, 'log_t' and (sigmoid) 'b'."""
    return {"image": embed_image(params, batch["image"], model),
            "text": unit(vit.text_apply(params["text"], batch["tokens"], model.text)),
            **affine(params)}


def embed_image(params, image_NHWC, model):
    image_NHWC = image_NHWC.astype(jnp.float32) / 127.5 - 1
    return unit(vit.vit_apply(params["image"], image_NHWC, model.image))


def unit(z_NE):
    return z_NE / (jnp.linalg.norm(z_NE, axis=-1, keepdims=True) + 1e-6)


def affine(params):
    return {k: params[k] for k in ("log_t", "b") if k in params}


def forward_flops(model):
    """FLOPs (a multiply-add is two) of one forward of one pair."""
    return vit.vit_flops(model.image) + vit.text_flops(model.text)


# --------------------------------------------------------------------- losses (eqs 1 and 2)


def contrastive_loss(side_S, loss, axis=None):
    """The loss of a sub-batch, a side. Inside `pmap` with `axis` named, this device's part of it:
    the mean over its rows, with the negatives of all devices. Its gradient, averaged over the
    devices, is that of the whole."""
    gather = rows_of_all(axis)
    offset = jax.lax.axis_index(axis) * len(side_S["image"]) if axis else 0  # of this device's rows
    image_AE, text_AE = gather(side_S["image"]), gather(side_S["text"])
    if loss == "sigmoid":
        return sigmoid_loss(side_S["image"], text_AE, side_S["log_t"], side_S["b"], offset)
    return 0.5 * (softmax_loss(side_S["image"], text_AE, side_S["log_t"], offset)
                  + softmax_loss(side_S["text"], image_AE, side_S["log_t"], offset))


def rows_of_all(axis):
    """x [N, ...] -> the rows of all devices, or what there is where no axis is named."""
    return (lambda x: jax.lax.all_gather(x, axis, tiled=True)) if axis else jnp.asarray


def softmax_loss(x_SE, y_AE, log_t, offset=0):
    """Eq 1, one direction: row i of x against all A rows of y; its own is offset + i."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE)
    own_S = offset + jnp.arange(len(x_SE))
    return optax.softmax_cross_entropy_with_integer_labels(logits_SA, own_S).mean()


def sigmoid_loss(x_SE, y_AE, log_t, b, offset=0):
    """Eq 2: mean over rows i of sum over j of -log sigmoid(+-(t x_i.y_j + b)), + for i's own j."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE) + b
    own_S = offset + jnp.arange(len(x_SE))
    sign_SA = 2 * jax.nn.one_hot(own_S, len(y_AE)) - 1
    return -jax.nn.log_sigmoid(sign_SA * logits_SA).sum(1).mean()


# ------------------------------------------- joint selection (Algorithm 1), as it is printed


def score_matrix(kind, learner, reference):
    """S [B, B], image i, text j: the sigmoid loss of each pair under each model, by the model's own
    t and b, summed with the signs of SCORES[kind] (learnability: learner - reference)."""
    def losses(side):
        logits_BB = (jnp.exp(side["log_t"]) * jnp.einsum("ie,je->ij", side["image"], side["text"])
                     + side["b"])
        sign_BB = 2 * jnp.eye(len(logits_BB)) - 1
        return -jax.nn.log_sigmoid(sign_BB * logits_BB)
    sides = {"learner": learner, "reference": reference}
    return sum(sign * losses(sides[name]) for name, sign in SCORES[kind].items())


def jointly_sample_dense(key, score_BB, n_select, n_chunks=16, *, first="self", temperature=1.0):
    """Algorithm 1 to be read, and to check `jointly_sample` by: the same picks [b], from S itself.
    first: 'self' is the print's comment, 'uniform' its code. The logits are sums: divided by the
    number of their terms they would have another temperature."""
    B = len(score_BB)
    sampled_B = jnp.zeros(B)
    picks = []
    for k, size in enumerate(chunk_sizes(n_select, n_chunks)):
        logits_B = jnp.diag(score_BB)
        logits_B += (score_BB * sampled_B[None, :]).sum(1)  # S[i, j] over j in T
        logits_B += (score_BB * sampled_B[:, None]).sum(0)  # S[j, i] over j in T
        if k == 0 and first == "uniform":
            logits_B = jnp.zeros(B)
        picks.append(draw(jax.random.fold_in(key, k), logits_B / temperature, sampled_B > 0, size))
        sampled_B = sampled_B.at[picks[-1]].set(1)
    return jnp.concatenate(picks)


def chunk_sizes(n_select, n_chunks):
    """n_chunks sizes that add up to n_select exactly and differ by one at most, in whole numbers
    (int(163840 * (1 - 0.8) / 16) is 2047: floating point has no place here)."""
    edges = [k * n_select // n_chunks for k in range(n_chunks + 1)]
    return [b - a for a, b in zip(edges, edges[1:])]


def draw(key, logits_B, taken_B, size):
    """Indices [size], drawn one after the other with probability softmax(logits) among what is left
    (Gumbel-top-k); those in `taken_B` never (want `size` others), and NaN last (top_k: first)."""
    logits_B = jnp.nan_to_num(logits_B.astype(jnp.float32), nan=-1e30, posinf=1e30, neginf=-1e30)
    logits_B += jax.random.gumbel(key, logits_B.shape)
    return jax.lax.top_k(jnp.where(taken_B, -jnp.inf, logits_B), size)[1]


# ------------------------------------------------- joint selection, without a B x B matrix


def jointly_sample(key, learner, reference, n_select, n_chunks=16, *, kind="learnability",
                   loss="sigmoid", first="self", temperature=1.0, axis=None, tile=2048):
    """Indices [b] of the sub-batch in the order drawn, chunk by chunk: the picks of Algorithm 1, in
    memory of order B. Want n_chunks <= n_select = b <= B.

    S never exists (107 GB at the paper's B = 163,840). Each candidate keeps a running sum of its
    terms with what was drawn so far; a new chunk adds one [B, C] block of each model and direction,
    computed from the embeddings, a `tile` of candidates at a time: 4 b B E FLOPs a model in all.
    To choose within each device's share would be another algorithm.

    Args:
      key: the same on every device.
      learner, reference: sides (see `embed`) of the B candidates; either may be None where `kind`
        does not ask for it. Inside `pmap` with `axis` named, a device's N = B / n rows of them: it
        keeps the sums of its own candidates, and every device draws the same global picks.
      kind: of SCORES. loss: 'sigmoid', or 'softmax' with its own, see `conditional_loss`.
      first: the first chunk is drawn by 'self'-scores, or 'uniform'ly. temperature: of the logits.
    """
    gather = rows_of_all(axis)
    sides = {name: {"learner": learner, "reference": reference}[name] for name in SCORES[kind]}
    everyone = {name: {k: gather(side[k]) for k in ("image", "text")}
                for name, side in sides.items()}
    own = {name: own_loss(side, loss) for name, side in sides.items()}
    sizes = chunk_sizes(n_select, n_chunks)
    C = max(sizes)
    real_KC = np.arange(C) < np.array(sizes)[:, None]  # some chunks are one short

    def pick(k, sums, taken_B):
        logits_N = sum(sign * conditional_loss(own[name], sums[name], loss)
                       for name, sign in SCORES[kind].items())
        if first == "uniform":
            logits_N = jnp.where(k == 0, 0.0, logits_N)
        return draw(jax.random.fold_in(key, k), gather(logits_N) / temperature, taken_B, C)

    def chunk(state, k_and_real):
        (sums, taken_B), (k, real_C) = state, k_and_real
        pick_C = pick(k, sums, taken_B)
        taken_B = taken_B.at[jnp.where(real_C, pick_C, len(taken_B))].set(True, mode="drop")
        sums = {name: add_chunk(sums[name], side, {k: v[pick_C] for k, v in everyone[name].items()},
                                real_C, loss, tile) for name, side in sides.items()}
        return (sums, taken_B), pick_C

    zero_N = sum_of_none(next(iter(sides.values()))["image"][:, 0], loss)
    n_all = len(next(iter(everyone.values()))["image"])
    state = {name: (zero_N, zero_N) for name in sides}, jnp.zeros(n_all, bool)
    state, pick_KC = jax.lax.scan(chunk, state, (np.arange(n_chunks - 1), real_KC[:-1]))
    last_C = pick(n_chunks - 1, *state)  # after the last chunk there is nothing to add up for
    return jnp.concatenate([pick_KC, last_C[None]])[np.nonzero(real_KC)]


def own_loss(side, loss):
    """l[i, i] [N]: a pair's loss by itself, -log sigmoid(t z.z + b), or -t z.z (softmax)."""
    logits_N = jnp.exp(side["log_t"]) * jnp.einsum("ne,ne->n", side["image"], side["text"])
    return jax.nn.softplus(-logits_N - side["b"]) if loss == "sigmoid" else -logits_N


def sum_of_none(like_N, loss):
    """The sum over nothing: 0, or -inf for a sum of exponentials that is kept as its logarithm."""
    return jnp.full_like(like_N, 0.0 if loss == "sigmoid" else -jnp.inf, jnp.float32)


def add_chunk(sums, side, chunk, real_C, loss, tile):
    """The running sums ([N] over texts, [N] over images) after one more chunk was drawn.

    sigmoid: sum over j of l[i, j], and of l[j, i]: every such pair is a negative, with loss
    -log sigmoid(-(t z_i.z_j + b)). softmax: log of the sum over j of exp(t z_i.z_j).
    """
    t, C, N = jnp.exp(side["log_t"]), len(real_C), len(side["image"])
    n_tiles, n_groups = -(-N // tile), -(-C // 64)

    def block(x_NE, y_CE):
        logits_CN = t * jnp.einsum("ce,ne->cn", y_CE, x_NE)
        if loss == "softmax":
            return jax.nn.logsumexp(logits_CN, axis=0, where=real_C[:, None])
        # -log sigmoid(-x) = max(x, 0) + log(1 + exp(-|x|)), and a sum of logarithms is the
        # logarithm of a product: one log for 64 factors in (1, 2], which are 2^64 at most
        logits_CN = jnp.where(real_C[:, None], logits_CN + side["b"], -jnp.inf)
        factor_CN = jnp.pad(1 + jnp.exp(-abs(logits_CN)), ((0, -C % n_groups), (0, 0)),
                            constant_values=1)
        product_GN = einops.rearrange(factor_CN, "(g c) n -> g c n", g=n_groups).prod(1)
        return jnp.maximum(logits_CN, 0).sum(0) + jnp.log(product_GN).sum(0)

    def over(x_NE, y_CE):
        x_NE = jnp.pad(x_NE, ((0, -N % n_tiles), (0, 0)))
        tiles = einops.rearrange(x_NE, "(k n) e -> k n e", k=n_tiles)
        return jax.lax.map(lambda x: block(x, y_CE), tiles).reshape(-1)[:N]

    new = over(side["image"], chunk["text"]), over(side["text"], chunk["image"])
    return jax.tree.map(jnp.add if loss == "sigmoid" else jnp.logaddexp, sums, new)


def conditional_loss(own_N, sums, loss):
    """Loss [N] that candidate i adds to the sub-batch drawn so far, by the running sums.

    sigmoid: l[i,i] + sum over j in T of l[i,j] + l[j,i], exactly what adding i adds.
    softmax: -t z_i.z_i + (the two logarithms of the sums over T) / 2: i's own loss in T, i's own
    term left out of the sums; nothing is summed before the first chunk.
    """
    if loss == "sigmoid":
        return own_N + sums[0] + sums[1]
    return own_N + jnp.where(jnp.isneginf(sums[0]), 0.0, 0.5 * (sums[0] + sums[1]))


def losses_in_batch(side, loss, axis=None, tile=2048):
    """Loss of each pair in its whole batch, [N]: row i of eq 2, or its part of eq 1 (both ways); in
    blocks of [A, tile]."""
    gather = rows_of_all(axis)
    everyone = {k: gather(side[k]) for k in ("image", "text")}
    zero_N = sum_of_none(side["image"][:, 0], loss)
    sums = add_chunk((zero_N, zero_N), side, everyone, np.ones(len(everyone["image"]), bool),
                     loss, tile)
    own_N = jnp.exp(side["log_t"]) * jnp.einsum("ne,ne->n", side["image"], side["text"])
    if loss == "softmax":
        return 0.5 * (sums[0] + sums[1]) - own_N
    return sums[0] - (own_N + side["b"])  # its own is positive: softplus(x) - x = softplus(-x)


def independently_sample(key, learner, reference, n_select, *, kind="learnability", loss="sigmoid",
                         score="self", temperature=1.0, axis=None):
    """Indices [b], each example by its own score: S[i,i] ('self': `jointly_sample` with one chunk),
    or the score of its loss among all negatives of the 'super_batch'."""
    if score == "self":
        return jointly_sample(key, learner, reference, n_select, 1, kind=kind, loss=loss,
                              temperature=temperature, axis=axis)
    gather = rows_of_all(axis)
    sides = {"learner": learner, "reference": reference}
    score_B = gather(sum(sign * losses_in_batch(sides[name], loss, axis)
                         for name, sign in SCORES[kind].items()))
    return draw(jax.random.fold_in(key, 0), score_B / temperature, jnp.zeros(len(score_B), bool),
                n_select)


# ----------------------------------------------------------- Flexi-JEST (FlexiViT, 2212.08013)


def at_patch(params, model, patch):
    """(params, model) that cut images into coarser or finer patches; differentiable, and always
    from the stored kernel, so that both resolutions train the same weights."""
    old, P, D = model.image, model.image.patch, params["image"]["position"].shape[1]
    kernel = einops.rearrange(params["image"]["embed"]["w"], "(p q c) d -> p q c d", p=P, q=P)
    resize = pi_resize(P, patch)
    kernel = jnp.einsum("ap,bq,pqcd->abcd", resize, resize, kernel)
    side_old, side_new = old.image_size // P, old.image_size // patch
    position = params["image"]["position"].reshape(side_old, side_old, D)
    position = jax.image.resize(position, (side_new, side_new, D), "linear", antialias=False)
    image = {**params["image"], "position": position.reshape(-1, D), "embed": {
        **params["image"]["embed"], "w": einops.rearrange(kernel, "p q c d -> (p q c) d")}}
    return {**params, "image": image}, cut_at(model, patch)


def cut_at(model, patch):
    return dataclasses.replace(model, image=dataclasses.replace(model.image, patch=patch))


@functools.lru_cache
def pi_resize(old, new):
    """pinv(R^T) [new, old] of one axis, where R resizes a signal bilinearly from old to new.

    A patch x seen by kernel w gives <x, w>; the resized patch R x should give the same, and
    w' = pinv(R^T) w does: exactly for new >= old, in the least-squares sense below. Resizing is
    separable, and so is its pseudo-inverse: two axes are two products with this matrix.
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    low = np.floor(place).astype(int)
    R = np.zeros((new, old))
    for row, (l, w) in enumerate(zip(low, place - low)):
        R[row, np.clip(l, 0, old - 1)] += 1 - w
        R[row, np.clip(l + 1, 0, old - 1)] += w
    return np.linalg.pinv(R.T).astype(np.float32)


def embed_flexi(params, batch, model, low_patch):
    """`embed`, with every second image cut into coarse patches. One batch, one loss: the two halves
    are each other's negatives (our reading: all we have of the paper is half and half). Rows are
    reordered, images and texts alike."""
    order = np.r_[0:len(batch["image"]):2, 1:len(batch["image"]):2]
    high = embed_image(params, batch["image"][0::2], model)
    params_low, model_low = at_patch(params, model, low_patch)
    low = embed_image(params_low, batch["image"][1::2], model_low)
    text = unit(vit.text_apply(params["text"], batch["tokens"][order], model.text))
    return {"image": jnp.concatenate([high, low]), "text": text, **affine(params)}


# -------------------------------------------------------------------------------- one step


def adam(peak, steps, *, warmup=0.05, weight_decay=1e-4, b2=0.95, clip_norm=1.0):
    """Clip, AdamW, linear warm-up, cosine that is 0 at `steps`. The decay is times the learning
    rate, as in optax, and of the leaves named 'w' only: linear maps."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, round(warmup * steps), steps, 0.0)
    linear = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "w", params)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(
        schedule, b2=b2, weight_decay=weight_decay, mask=linear))


def new_state(key, model, optimiser):
    params = init(key, model)
    return {"params": params, "opt": optimiser.init(params)}


def update(state, batch, model, optimiser, low_patch=0):
    """One step of {'params', 'opt'} on a sharded batch, and the loss before it. `low_patch`: cuts
    every second image that coarsely."""
    def loss_of(params):
        side = (embed_flexi(params, batch, model, low_patch) if low_patch else
                embed(params, batch, model))
        return contrastive_loss(side, model.loss, AXIS)

    loss, grads = devices.mean(jax.value_and_grad(loss_of)(state["params"]))
    updates, opt = optimiser.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def both_sides(state, batch_N, *, kind, model, reference_model, low_patch=0):
    """(learner, reference): the sides that `kind` asks for, else None. The learner is cut coarsely
    if there is a `low_patch`; the reference's embeddings are the cached ones if the batch has them.
    """
    learner = reference = None
    if "learner" in SCORES[kind]:
        params = state["learner"]["params"]
        if low_patch:
            params, model = at_patch(params, model, low_patch)
        learner = embed(params, batch_N, model)
    if "reference" in SCORES[kind]:
        if "reference_image" in batch_N:
            reference = {"image": batch_N["reference_image"], "text": batch_N["reference_text"],
                         **affine(state["reference"])}
        else:
            reference = embed(state["reference"], batch_N, reference_model)
    return jax.lax.stop_gradient((learner, reference))


def jest_step(state, index, key, batch_N, *, method, kind, n_select, model, reference_model,
              optimiser, n_chunks=16, first="self", independent_score="self", temperature=1.0,
              low_patch=0, cotrain=True):
    """(state, metrics) after step `index` (from 0), inside `pmap`.

    Args:
      state: {'learner': {'params', 'opt'}, 'reference': its params, or only its t and b where its
        embeddings are cached}.
      batch_N: this device's share of the super-batch (of 'uniform': of the n_select pairs, all of
        which it trains on): 'image' uint8 [N, H, W, channels], 'tokens' [N, T], bool truths that
        are reported on only, 'reference_image', 'reference_text' [N, E] where they are cached.
      method: of METHODS. kind: of SCORES. low_patch: flexi_jest's; 0 for the others.
    """
    key_select = jax.random.fold_in(key, index)
    truth_B = {k: devices.gather(v) for k, v in batch_N.items() if v.dtype == bool}
    batch_S = {k: batch_N[k] for k in ("image", "tokens")}
    pick_S, state = jnp.arange(n_select), dict(state)
    if method != "uniform":
        sides = both_sides(state, batch_N, kind=kind, model=model, reference_model=reference_model,
                           low_patch=low_patch)
        common = dict(kind=kind, loss=model.loss, temperature=temperature, axis=AXIS)
        if method == "independent":
            pick_S = independently_sample(key_select, *sides, n_select, score=independent_score,
                                          **common)
        else:
            pick_S = jointly_sample(key_select, *sides, n_select, n_chunks, first=first, **common)
        pick_S = jnp.sort(pick_S)  # in the super-batch's random order, not in that of the draw
        batch_S = {k: devices.take(v, pick_S) for k, v in batch_S.items()}
    state["learner"], loss = update(state["learner"], batch_S, model, optimiser,
                                    low_patch if cotrain else 0)
    metrics = {"loss": loss}
    for k, v_B in truth_B.items():
        metrics |= {f"picked_{k}": v_B[pick_S].mean(), f"pool_{k}": v_B.mean()}
    return state, metrics


def step_flops(method, kind, batch_size, B, F, *, F_low=0, F_reference=0, n_chunks=16, embed=64,
               cotrain=True, reuse=False, independent_score="self"):
    """FLOPs of one step by role (a training step is three forwards).

    Over uniform's 3 b F, with r = B / b and A = F_low / F: jest 1 + r/3 (267 % at f = 0.8),
    flexi_jest (1 + A)/2 + r A/3 (110 % at the paper's A = 0.28; ours is computed). `reuse`: as if
    the forward that scored the picked pairs were the one that trains them, 1 + (r - 1)/3 (233 %):
    Table 1 counts so, the paper's compute figure and this code do not, two resolutions cannot.
    F, F_low: `forward_flops` of the learner at its full and at the coarse patch; F_reference: of
    the reference, 0 where it is cached.
    """
    b, flexi = batch_size, method == "flexi_jest"
    scores = method != "uniform"
    reused = b if reuse and not flexi else 0
    return {
        "learner": 3 * b * (F + F_low) / 2 if flexi and cotrain else 3 * b * F,
        "actor_scoring": (B - reused) * (F_low if flexi else F)
                         if scores and "learner" in SCORES[kind] else 0,
        "selection": sampler_flops(kind, b, B, n_chunks if "jest" in method else 1, embed,
                                   independent_score if method == "independent" else "self")
                     if scores else 0,
        "reference_scoring": B * F_reference if scores and "reference" in SCORES[kind] else 0,
    }


def sampler_flops(kind, b, B, n_chunks, embed, score="self"):
    """FLOPs of `jointly_sample`: per model, two [B, C] blocks a chunk but the last, each element
    2 E for the product and 5 for scale, shift, exp and its share of logarithms and sums; the
    diagonal; and per chunk noise, mask and log2(B) comparisons a candidate. score
    'super_batch', of `independently_sample`: two [B, B] blocks."""
    added = B if score == "super_batch" else b - chunk_sizes(b, n_chunks)[-1]
    per_model = 2 * B * added * (2 * embed + 5) + B * (2 * embed + 5)
    return len(SCORES[kind]) * per_model + n_chunks * B * (3 + max(B, 2).bit_length())


# --------------------------------------------------------------------------------- evaluation


def evaluate(params, forwards, pool, batch_size, class_tokens):
    """Retrieval recall at 1, 5 and 10, both ways and their mean; with labels, the accuracy of the
    nearest class prompt. `forwards`: `make_forwards(model)`; class_tokens [classes, T] or None."""
    parts = [got for got, _ in stage.forward_all(params, forwards[0], pool, batch_size)]
    got = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    metrics = retrieval.recalls(got["image"], got["text"], got["tokens"], ks=(1, 5, 10))
    if class_tokens is not None:
        n = len(class_tokens)
        padded = np.pad(class_tokens, ((0, -n % jax.device_count()), (0, 0)))
        rows = len(padded) // jax.process_count()
        mine = padded[jax.process_index() * rows:][:rows]
        class_CE = jax.device_get(forwards[1](params, devices.shard(mine)))[:n]
        nearest = (got["image"] @ class_CE.T).argmax(1)
        metrics["zero_shot"] = float((nearest == got["label"]).mean())
    return metrics


def make_forwards(model):
    """Programs (params, sharded batch) -> embeddings and what came along, gathered; and (params,
    sharded tokens) -> text embeddings."""
    def both(params, batch):
        side = embed(params, batch, model)
        return {**{k: devices.gather(v) for k, v in batch.items() if k != "image"},
                "image": devices.gather(side["image"]), "text": devices.gather(side["text"])}

    def text(params, tokens):
        return devices.gather(unit(vit.text_apply(params["text"], tokens, model.text)))
    return devices.Program(both, in_axes=(None, 0)), devices.Program(text, in_axes=(None, 0))


def diagnose(state, key, batch_N, *, kind, n_select, model, reference_model, n_chunks, first,
             temperature, low_patch, independent_score):
    """What selection does to one super-batch, inside `pmap`: mean score S of a uniform, an
    independent and a joint sub-batch, per row; with `low_patch`, how well coarse scores stand in
    for full ones; the self-scores [B] and the joint picks [b]."""
    def sides_at(patch):
        return both_sides(state, batch_N, kind=kind, model=model, reference_model=reference_model,
                          low_patch=patch)

    def joint(sides):
        return jointly_sample(key, *sides, n_select, n_chunks, first=first, **common)

    def own_B(sides):
        named = dict(zip(("learner", "reference"), sides))
        return devices.gather(sum(sign * own_loss(named[name], model.loss)
                                  for name, sign in SCORES[kind].items()))

    def value(pick_S):
        total = 0.0
        for sign, side in zip((1, -1), full):
            if side is not None:
                rows = {k: devices.gather(side[k])[pick_S] for k in ("image", "text")}
                total += sign * losses_in_batch({**side, **rows}, model.loss).mean()
        return total

    common = dict(kind=kind, loss=model.loss, temperature=temperature, axis=AXIS)
    full = sides_at(0)
    used = sides_at(low_patch) if low_patch else full
    pick_S = joint(used)
    alone_S = independently_sample(key, *used, n_select, score=independent_score, **common)
    metrics = {"score_uniform": value(jnp.arange(n_select)), "score_independent": value(alone_S),
               "score_joint": value(pick_S)}
    if low_patch:
        metrics["rank_correlation"] = spearman(own_B(used), own_B(full))
        metrics["pick_overlap"] = jnp.isin(pick_S, joint(full)).mean()
    return metrics, own_B(used), pick_S


def spearman(x_B, y_B):
    """Rank correlation."""
    rank = lambda v: jnp.argsort(jnp.argsort(v)).astype(jnp.float32)
    return jnp.corrcoef(rank(x_B), rank(y_B))[0, 1]


# --------------------------------------------------------------------------------------- main


def split_arm(arm):
    """'jest_hard_learner' -> ('jest', 'hard_learner'); without a score it is learnability's."""
    for method in METHODS:
        for kind in SCORES:
            scored = method != "uniform" and arm == f"{method}_{kind}"
            if scored or (arm == method and kind == "learnability"):
                return method, kind
    raise ValueError(f"--arms: {arm!r} is none of {', '.join(METHODS)}, nor one of them with a "
                     f"score behind it ({', '.join('_' + k for k in SCORES)})")


def super_batch_size(config):
    """B = b / (1 - f), which must be a whole number."""
    B = config.batch_size / (1 - config.filter_ratio)
    if abs(B - round(B)) > 1e-6 * B:
        raise ValueError(f"--filter_ratio={config.filter_ratio}: want a whole super-batch: "
                         f"batch_size / (1 - filter_ratio) is {B:.3f}")
    return round(B)


def check(config, typed=()):
    """Raises ValueError, naming the flag, for what cannot work whatever the data."""
    want = functools.partial(run.want, config)
    methods = [split_arm(arm)[0] for arm in config.arms]
    want(config.arms and len(set(config.arms)) == len(config.arms), "arms", "each arm once")
    for flag in ("steps", "batch_size", "patch", "low_patch", "embed", "n_chunks"):
        want(config[flag] >= 1, flag, "at least 1")
    want(0 <= config.filter_ratio < 1, "filter_ratio", "a fraction in [0, 1)")
    want(config.n_chunks <= config.batch_size, "n_chunks",
         f"at most one chunk per example of the sub-batch, {config.batch_size}")
    want(config.temperature > 0, "temperature", "more than 0")
    want(0 < config.curated_fraction < 1, "curated_fraction", "a fraction between 0 and 1")
    want(config.reference_noise == -1 or 0 <= config.reference_noise <= 1, "reference_noise",
         "a fraction from 0 to 1, or -1 for the pool's")
    for flag in ("reference_steps", "active_steps", "active_learning_rate", "weight_decay"):
        want(config[flag] >= 0, flag, "at least 0")
    for flag in ("learning_rate", "reference_learning_rate", "clip_norm"):
        want(config[flag] > 0, flag, "more than 0")
    for flag in ("warmup", "beta2"):
        want(0 <= config[flag] < 1, flag, "a fraction below 1")
    want(config.context >= 2, "context", "at least 2")
    if "label_noise" in typed:
        raise ValueError("--label_noise is not read here: give --caption_noise")
    devices.divides(batch_size=config.batch_size)
    n = jax.device_count()
    want(super_batch_size(config) % n == 0, "filter_ratio", "a super-batch, batch_size / (1 - "
         f"filter_ratio), that divides over {n} devices")
    if "flexi_jest" in methods:
        want(config.batch_size % (2 * n) == 0, "batch_size", f"a multiple of {2 * n}: flexi_jest "
             "halves each device's share")


def build_model(config, size, source, vocab):
    """A Model of that size for the images of a source."""
    side = source.image_shape[0]
    flexi = any(split_arm(arm)[0] == "flexi_jest" for arm in config.arms)
    for flag in ("patch", "low_patch") if flexi else ("patch",):
        if side % config[flag]:
            raise ValueError(f"--{flag}={config[flag]} does not divide the image side {side}")
    try:
        vit.size(size)
    except ValueError as e:
        raise ValueError(f"--model or --reference_model: {e}") from None
    shared = dict(pool=config.pool, dtype=config.dtype, remat=config.remat)
    return Model(config.loss,
                 vit.ViT(size, side, config.patch, config.embed, source.image_shape[2], **shared),
                 vit.Text(size, vocab, config.context, config.embed, **shared))


def make_arm(arm, config, model, reference_model):
    """'steps', 'optimiser', 'step' (`jest_step`) and 'look' (`diagnose`) of an arm, or of the
    'reference', whose training is a uniform run."""
    method, kind = ("uniform", "learnability") if arm == "reference" else split_arm(arm)
    if arm == "reference":
        steps, rate = config.reference_steps or config.steps, config.reference_learning_rate
        model = reference_model
    elif method == "uniform":
        steps, rate = config.steps, config.learning_rate
    else:
        steps = config.active_steps or config.steps
        rate = config.active_learning_rate or config.learning_rate
    optimiser = adam(rate, steps, warmup=config.warmup, weight_decay=config.weight_decay,
                     b2=config.beta2, clip_norm=config.clip_norm)
    knobs = dict(kind=kind, model=model, reference_model=reference_model,
                 n_select=config.batch_size, n_chunks=config.n_chunks, first=config.first_chunk,
                 temperature=config.temperature, independent_score=config.independent_score,
                 low_patch=config.low_patch if method == "flexi_jest" else 0)
    step = functools.partial(jest_step, method=method, optimiser=optimiser, cotrain=config.cotrain,
                             **knobs)
    return run.Namespace(
        steps=steps, optimiser=optimiser,
        step=devices.Program(step, (None, None, None, 0), donate=True),
        look=devices.Program(functools.partial(diagnose, **knobs), (None, None, 0)))


def arm_cost(arm, reuse=False, *, config, model, reference_model):
    """`step_flops` of an arm."""
    method, kind = split_arm(arm)
    computed = config.reference_scores == "computed"
    return step_flops(
        method, kind, config.batch_size, super_batch_size(config), forward_flops(model),
        F_low=forward_flops(cut_at(model, config.low_patch)) if method == "flexi_jest" else 0,
        F_reference=forward_flops(reference_model) if computed else 0, n_chunks=config.n_chunks,
        embed=config.embed, cotrain=config.cotrain, reuse=reuse,
        independent_score=config.independent_score)


def embed_pool(params, pool, forward, batch_size, path):
    """The reference's embeddings of a whole pool, {'image', 'text'} [len(pool), E], in the order of
    its ids, and the seconds they took; cached in the file `path`."""
    def make():
        parts = list(stage.forward_all(params, forward, pool, batch_size))
        return ({k: np.concatenate([got[k] for got, _ in parts]) for k in ("image", "text")},
                sum(seconds for _, seconds in parts))
    arrays, seconds = stage.cached(path, params, pool, make)
    return {k: arrays[k] for k in ("image", "text")}, seconds  # a file has 'id' too


def iteration_cost(arms, cost):
    """What an iteration of each arm costs relative to uniform, one line an arm, reference passes
    left out as in the paper. cost(arm, reuse) -> FLOPs by role."""
    lines, of = [], lambda arm, reuse: report.total_flops(cost(arm, reuse), "foundation_dataset")
    for arm in arms:
        if arm != "uniform":
            once, reused = (of(arm, reuse) / of("uniform", False) for reuse in (False, True))
            share = cost(arm, False)["selection"] / of(arm, False)
            lines.append(f"an iteration of {arm} costs {100 * once:.0f} % of uniform's; "
                         f"{100 * reused:.0f} % if the forward of what is picked were reused; the "
                         f"sampler is {100 * share:.1f} % of it")
    return "\n".join(lines)


def main():
    config, typed = run.resolve(PRESETS)
    devices.start(config.coordinator, config.num_processes, config.process_id)
    check(config, typed)
    encode, vocab = data.tokenizer(config.tokenizer or "bytes")
    open_split = lambda dataset, split: data.open_source(
        dataset, split, data_dir=config.data_dir, image_size=config.image_size,
        context=config.context, encode=encode, need=("caption",), toy_knobs=run.toy_knobs(config))
    source, test_source = (open_split(config.dataset, split)
                           for split in (config.split, config.eval_split))
    curated_source = config.reference_dataset and open_split(config.reference_dataset, "train")
    model = build_model(config, config.model, source, vocab)
    reference_model = build_model(config, config.reference_model or config.model, source, vocab)
    if curated_source and curated_source.image_shape != source.image_shape:
        raise ValueError(f"--reference_dataset={config.reference_dataset}: its images are "
                         f"{curated_source.image_shape}, not {source.image_shape}: give "
                         "--image_size")
    like = jax.eval_shape(lambda: init(jax.random.key(0), reference_model))
    stage.check_given(config, like, trains=("curated",))
    run.open_workdir(config)
    for part, flag in ((source, "split"), (test_source, "eval_split")):
        data.count_captions(part, encode, config.context, f"--{flag}={config[flag]}")

    metrics_file = report.MetricsFile(os.path.join(config.workdir, "metrics.jsonl"))
    stop, test_pool = run.Stop(), data.Pool(test_source)
    forwards = {m: make_forwards(m) for m in (model, reference_model)}
    class_tokens = None
    if test_source.class_names and "label" in test_source.read(test_source.ids[:1]):
        class_tokens = np.stack([data.tokenize(config.prompt.format(name), config.context, encode)
                                 for name in test_source.class_names])
    b, B, F_reference = config.batch_size, super_batch_size(config), forward_flops(reference_model)
    made = {arm: make_arm(arm, config, model, reference_model)
            for arm in ("reference", *config.arms)}
    cost = functools.partial(arm_cost, config=config, model=model, reference_model=reference_model)

    def load(pool, seed, start, stop_at, n, given):
        """Sharded batches of n pairs, with what the reference said of them."""
        for batch in data.batches(pool, seed=seed, batch_size=n, start=start, stop=stop_at,
                                  host=devices.host()):
            rows = np.searchsorted(pool.ids, batch["id"])
            batch |= {f"reference_{k}": v[rows] for k, v in (given or {}).items()}
            yield devices.shard({k: v for k, v in batch.items() if k not in ("id", "label")})

    def train(name, seed, pool, state, key, model, *, per_step, n_scored=b, given=None, look=None,
              **rest):
        """One stage or arm, evaluated as it goes."""
        def metrics_of(state):
            metrics = evaluate(state["learner"]["params"], forwards[model], test_pool, b,
                               class_tokens)
            return metrics | (look(state)[0] if look else {})
        return stage.fit(
            name, seed, made[name].step, state, key,
            lambda start: load(pool, seed, start, made[name].steps, n_scored, given),
            steps=made[name].steps, batch_size=b, n_scored=n_scored, per_step=per_step,
            config=config, stop=stop, metrics_file=metrics_file, metrics_of=metrics_of, **rest)

    def frozen_reference(seed, curated, pool, key_init, key_steps):
        """Weights, cached embeddings of `pool` (or None), FLOPs by role and seconds of it all."""
        if config.reference == "curated":
            state = {"learner": new_state(key_init, reference_model, made["reference"].optimiser)}
            train("reference", seed, curated, state, key_steps, reference_model, one_off={},
                  setup_seconds=0.0, per_step={"reference_training": 3 * b * F_reference})
            where = os.path.join(config.workdir, "checkpoints", f"reference-{seed}")
        else:
            where = config.reference.format(seed=seed)
        params, books = checkpoint.restore_params(where, like, "reference")
        flops, seconds, given = {"reference_training": books["flops"]}, books["seconds"], None
        if config.reference_scores == "cached":
            path = config.score_cache or os.path.join(config.workdir, "embeddings-{seed}.npz")
            given, took = embed_pool(params, pool, forwards[reference_model][0], b,
                                     path.format(seed=seed))
            flops["reference_scoring"] = len(pool) * F_reference
            seconds += took
        return params, given, flops, seconds

    shown = None
    for seed in config.seeds:
        whole = data.Pool(source, noise=config.caption_noise, field="tokens", seed=seed)
        ids, rest_ids = data.split(whole.ids, config.curated_fraction, seed)
        curated, rest = whole.subset(ids), whole.subset(rest_ids)
        if curated_source:
            curated, rest = data.Pool(curated_source, field="tokens", seed=seed), whole
        if config.reference_noise >= 0:
            curated = curated.replant(config.reference_noise)
        key_init, key_reference, key_steps = jax.random.split(jax.random.key(seed), 3)
        reference = None
        for arm in config.arms:
            method, kind = split_arm(arm)
            state = {"learner": new_state(key_init, model, made[arm].optimiser)}
            pool, n, given, one_off, seconds, look = whole, b, None, {}, 0.0, None
            if method != "uniform" and "reference" in SCORES[kind]:
                reference = reference or frozen_reference(seed, curated, rest, key_reference,
                                                          key_steps)
                params, given, one_off, seconds = reference
                state["reference"] = affine(params) if given else params
            if method != "uniform":
                pool, n = rest, B  # the curated part is the reference's; uniform has the whole pool
                batch = next(load(pool, seed, made[arm].steps, made[arm].steps + 1, B, given))
                look = lambda state, batch=batch, arm=arm: jax.device_get(made[arm].look(
                    state, key_steps, batch))
            state = train(arm, seed, pool, state, key_steps, model, n_scored=n, given=given,
                          look=look, one_off=one_off, setup_seconds=seconds, per_step=cost(arm))
            # picks.png: of the first arm that selects, but rather of jest than of independent
            if look and (shown is None or (method == "jest" and shown["arm"] == "independent")):
                _, score_B, pick_S = look(state)
                shown = dict(arm=arm, pool=pool, score_B=score_B, pick_S=pick_S,
                             ids=data.batch_ids(pool.ids, seed, made[arm].steps, B))

    if jax.process_index() == 0:
        report.conclude(metrics_file.rows(), config.workdir, picks=shown, script="jest",
                        arms=config.arms, metric="recall@10",
                        dataset=run.dataset_name(config.dataset))
        print("", iteration_cost(config.arms, cost), sep="\n")


if __name__ == "__main__":
    define_flags()
    run.main(main)
