"""JEST: Data Curation via Joint Example Selection (Evans et al., 2406.17711), and Flexi-JEST.

Contrastive learning of images and texts. The pairs of a batch are each other's negatives, so a
batch is worth more than the sum of its examples. JEST therefore chooses a batch jointly. Per step
  1. draw a super-batch of B = b / (1 - f) pairs uniformly                    `data.batches`
  2. embed it with the learner, and with a frozen reference                   `embed`
  3. S[i,j] = loss of pair (i,j) under the learner - under the reference      `score_matrix`
  4. draw a sub-batch T of b pairs in chunks. Candidate i, not in T, is drawn with probability
     softmax(gain * (S[i,i] + sum over j in T of S[i,j] + S[j,i]))            `jointly_sample`
  5. update the learner on T, with the ordinary contrastive loss              `update`
With the softmax loss, 3 and 4 are `jointly_sample_softmax` (Algorithm 3). Flexi-JEST scores at a
coarser patch, and trains half of T at it (`at_patch`, `embed_flexi`). `step_flops` keeps the bill.
The reference is trained first, on a small curated part of the pool.

Dimension letters: B super-batch, N a device's share of it, S sub-batch (b), C chunk, K chunks,
A all rows of a batch on all devices, E embedding, P patch side, D width, H W image. T is the
sub-batch so far; as a dimension, tokens.

Minutes on a CPU:       python jest.py
README's measurements:  python jest.py --preset=emoji, and more flags: see there
Model of the paper:     python jest.py --preset=siglip_B  (a trial, on generated images)

Where we differ from the paper, or its print from its text: README, "jest.py, beside the paper".
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
    # The paper's models and optimiser (A.1) on generated images. Its run also has
    # --batch_size=32768 --steps=91553 (3e9 pairs), a 32k sentencepiece --tokenizer (bytes cut
    # captions short) and a --reference_dataset of about 1e8 curated pairs.
    "siglip_B": dict(
        image_size=256, toy_examples=4096, model="B", patch=16, low_patch=32, context=64, embed=768,
        dtype="bfloat16", filter_ratio=0.8, n_chunks=16, batch_size=256, steps=1000, warmup=0.01,
        beta2=0.95, reference_steps=100, reference_scores="computed"),
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
    f.DEFINE_float("score_gain", 100.0, "multiplies the scores before a chunk is drawn from their "
                   "softmax (Algorithm 2 prints 100, close to greedy); 1 / temperature")
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
    f.DEFINE_float("weight_decay", 1e-4, "part of the weights of linear maps that a step at the "
                   "peak takes off; follows the schedule, not times the learning rate")
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
    """The embeddings of a batch under one model, with its logit scale and bias.

    Returns a dict: 'image', 'text' [N, E], L2-normalised, and the scalars 'log_t' and (for the
    sigmoid loss) 'b'. The logit of image i and text j is exp(log_t) image_i.text_j + b.
    """
    return {"image": embed_image(params, batch["image"], model),
            "text": unit(vit.text_apply(params["text"], batch["tokens"], model.text)),
            **logit_scale_and_bias(params)}


def embed_image(params, image_NHWC, model):
    """uint8 images -> their embeddings [N, E]."""
    image_NHWC = image_NHWC.astype(jnp.float32) / 127.5 - 1
    return unit(vit.vit_apply(params["image"], image_NHWC, model.image))


def unit(x_NE):
    """Rows of length 1. The small number is under the root, where it keeps the gradient of a row
    of zeros finite."""
    return x_NE * jax.lax.rsqrt(jnp.square(x_NE).sum(-1, keepdims=True) + 1e-12)


def logit_scale_and_bias(params):
    """{'log_t'} of the softmax loss, {'log_t', 'b'} of the sigmoid loss."""
    return {k: params[k] for k in ("log_t", "b") if k in params}


def forward_flops(model):
    """FLOPs (a multiply-add is two) of one forward of one pair."""
    return vit.vit_flops(model.image) + vit.text_flops(model.text)


# --------------------------------------------------------------------- losses (eqs 1 and 2)


def contrastive_loss(embeddings_S, loss, axis=None):
    """The loss of a sub-batch, from its embeddings (see `embed`).

    Inside `pmap` with `axis` named, this returns the device's part of the loss: the mean over its
    own rows, with the negatives of all devices. The gradient of that part, averaged over the
    devices, is the gradient of the whole loss.
    """
    image_SE, text_SE = embeddings_S["image"], embeddings_S["text"]
    image_AE, text_AE = gather(image_SE, axis), gather(text_SE, axis)
    offset = jax.lax.axis_index(axis) * len(image_SE) if axis else 0  # where our rows begin
    if loss == "sigmoid":
        return sigmoid_loss(image_SE, text_AE, embeddings_S["log_t"], embeddings_S["b"], offset)
    return 0.5 * (softmax_loss(image_SE, text_AE, embeddings_S["log_t"], offset)
                  + softmax_loss(text_SE, image_AE, embeddings_S["log_t"], offset))


def gather(x, axis=None):
    """x [N, ...] of every device, in order, [A, ...]; without an axis, x as it is."""
    return jax.lax.all_gather(x, axis, tiled=True) if axis else jnp.asarray(x)


def softmax_loss(x_SE, y_AE, log_t, offset=0):
    """Eq 1, one direction: cross-entropy of row i of x against all A rows of y. The right one for
    row i is row offset + i."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE)
    own_S = offset + jnp.arange(len(x_SE))
    return optax.softmax_cross_entropy_with_integer_labels(logits_SA, own_S).mean()


def sigmoid_loss(x_SE, y_AE, log_t, b, offset=0):
    """Eq 2: mean over rows i of the sum over j of -log sigmoid(label (t x_i.y_j + b)). The label is
    1 for i's own row of y, which is row offset + i, and -1 for all others."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE) + b
    own_S = offset + jnp.arange(len(x_SE))
    label_SA = 2 * jax.nn.one_hot(own_S, len(y_AE)) - 1
    return -jax.nn.log_sigmoid(label_SA * logits_SA).sum(1).mean()


# ------------------------------------------- joint selection (Algorithm 1), as it is printed


def score_matrix(kind, learner, reference):
    """S [B, B], image i, text j: the sigmoid loss of each pair under each model, by the model's own
    t and b, summed with the signs of SCORES[kind] (learnability: learner - reference)."""
    def losses(embeddings):
        t, b = jnp.exp(embeddings["log_t"]), embeddings["b"]
        logits_BB = t * jnp.einsum("ie,je->ij", embeddings["image"], embeddings["text"],
                                   precision="highest") + b
        label_BB = 2 * jnp.eye(len(logits_BB)) - 1
        return -jax.nn.log_sigmoid(label_BB * logits_BB)
    models = {"learner": learner, "reference": reference}
    return sum(sign * losses(models[name]) for name, sign in SCORES[kind].items())


def jointly_sample_dense(key, score_BB, n_select, n_chunks=16, *, score_gain=100.0):
    """Algorithm 1 on the whole matrix S, written to be read. `jointly_sample` makes the same picks
    without the matrix and is tested against this.

    The first chunk is drawn by the self-scores S[i,i], as section 3.2 defines it. (Read as code, the
    print would draw it uniformly.) A chunk is drawn from one set of logits, so that its members do
    not see each other. The logits
    are sums, as printed: dividing them by the size of T would change the temperature as T grows.

    Args:
      score_BB: `score_matrix`.

    Returns: indices [n_select] in the order drawn.
    """
    dot = functools.partial(jnp.dot, precision="highest")
    drawn_B = jnp.zeros(len(score_BB))  # 1 for the members of T
    picks = []
    for k, size in enumerate(chunk_sizes(n_select, n_chunks)):
        # Sums over T as two matrix-vector products. Do not write them as masked sums over the two
        # axes: jaxlib 0.10.2 on a CPU fuses those under jit(vmap) and adds up wrongly.
        score_B = jnp.diag(score_BB) + dot(score_BB, drawn_B) + dot(drawn_B, score_BB)
        pick_C = draw(jax.random.fold_in(key, k), score_gain * score_B, drawn_B > 0, size)
        drawn_B = drawn_B.at[pick_C].set(1)
        picks.append(pick_C)
    return jnp.concatenate(picks)


def chunk_sizes(n_select, n_chunks):
    """n_chunks sizes that add up to n_select exactly and differ by one at most. Whole numbers only:
    in floating point int(163840 * (1 - 0.8) / 16) is 2047, one short."""
    edges = [k * n_select // n_chunks for k in range(n_chunks + 1)]
    return [end - begin for begin, end in zip(edges, edges[1:])]


def draw(key, logits_B, taken_B, size):
    """Draws `size` candidates without replacement and returns their indices.

    Each is drawn with probability softmax(logits) among the candidates that are left. Adding Gumbel
    noise and taking the largest does exactly that, and never takes an exponential of a logit, which
    at a gain of 100 would overflow. Candidates in `taken_B` are never drawn; at least `size` others
    must be left. A logit that is NaN is drawn last, where top_k would take it first.
    """
    logits_B = jnp.nan_to_num(logits_B.astype(jnp.float32), nan=-1e30, posinf=1e30, neginf=-1e30)
    logits_B += jax.random.gumbel(key, logits_B.shape)
    return jax.lax.top_k(jnp.where(taken_B, -jnp.inf, logits_B), size)[1]


# ------------------------------------------------- joint selection, without a B x B matrix


def jointly_sample(key, learner, reference, n_select, n_chunks=16, *, kind="learnability",
                   score_gain=100.0, axis=None, tile=2048):
    """Algorithm 1 (sigmoid loss) in memory of order B: the picks of `jointly_sample_dense`.

    At the paper's B = 163,840 the matrix S would take 107 GB. It is never made. Each candidate
    keeps one running sum, S[i,i] + sum over j in T of S[i,j] + S[j,i]. It starts at S[i,i]. After a
    chunk is drawn, the terms with that chunk are computed from the embeddings, `tile` candidates at
    a time, and added: 4 b B E FLOPs for each model in all.

    Inside `pmap` with `axis` named, a device keeps the sums of its own N = B / n candidates. The
    logits are gathered and `key` is the same everywhere, so that all devices draw the same picks
    out of all B candidates. Selecting within each device's share would be another algorithm.

    Args:
      learner, reference: embeddings (see `embed`) of the candidates. The model that `kind` does not
        use may be None.
      n_select, n_chunks: needs n_chunks <= n_select = b <= B.
      kind: one of SCORES.

    Returns: indices [n_select] into the B candidates, in the order drawn.
    """
    models = models_of(kind, learner, reference)

    def add_chunk(score_N, chunk, used_C):
        for name, sign in SCORES[kind].items():
            score_N += sign * negative_terms(models[name], chunk[name], used_C, tile)
        return score_N

    return draw_in_chunks(
        key, models, n_select, n_chunks, self_score(kind, learner, reference, "sigmoid"),
        lambda k, score_N: score_N, add_chunk, score_gain=score_gain, axis=axis)


def models_of(kind, learner, reference):
    """{name: embeddings} of the models that the score `kind` is made of."""
    return {name: {"learner": learner, "reference": reference}[name] for name in SCORES[kind]}


def self_score(kind, learner, reference, loss):
    """S[i,i] [N]: the score of each pair by itself."""
    models = models_of(kind, learner, reference)
    return sum(sign * positive_term(models[name], loss) for name, sign in SCORES[kind].items())


def positive_term(embeddings, loss):
    """The loss of each pair by itself under one model, [N]: -log sigmoid(t z_i.z_i + b) for the
    sigmoid loss, -t z_i.z_i for the softmax loss."""
    logits_N = jnp.exp(embeddings["log_t"]) * jnp.einsum(
        "ne,ne->n", embeddings["image"], embeddings["text"], precision="highest")
    return jax.nn.softplus(-logits_N - embeddings["b"]) if loss == "sigmoid" else -logits_N


def negative_terms(embeddings, chunk, used_C, tile):
    """Sum over the members j of a chunk of l[i,j] + l[j,i] under one model, [N]. Candidate i is not
    among them, so every such pair is a negative."""
    t, b = jnp.exp(embeddings["log_t"]), embeddings["b"]
    return (sum_of_softplus(embeddings["image"], chunk["text"], t, b, used_C, tile)
            + sum_of_softplus(embeddings["text"], chunk["image"], t, b, used_C, tile))


def sum_of_softplus(x_NE, y_CE, t, b, used_C, tile):
    """For each row x_i the sum over the used rows y_j of softplus(t x_i.y_j + b), [N].

    softplus(z) = -log sigmoid(-z) is the loss of a negative pair of logit z.
    """
    def of_row(x_E):
        # full precision: the gain turns an error of 0.001 in a score into one of 0.1 in a logit
        logits_C = t * jnp.einsum("ce,e->c", y_CE, x_E, precision="highest") + b
        return jax.nn.softplus(logits_C).sum(where=used_C)
    return jax.lax.map(of_row, x_NE, batch_size=tile)  # one matrix product for each tile of rows


def draw_in_chunks(key, models, n_select, n_chunks, state, score_of, add_chunk, *, score_gain,
                   axis):
    """The loop that the sigmoid and the softmax sampler share. Returns indices [n_select].

    Args:
      models: `models_of`.
      state: what the sampler keeps of the pairs drawn so far, at first of none.
      score_of: (k, state) -> the conditional scores [N] by which chunk k is drawn.
      add_chunk: (state, chunk, used_C) -> the state once a chunk is drawn. chunk has the chunk's
        embeddings by each model, {name: {'image', 'text'}} [C, E].

    Every turn draws C pairs, as many as the largest chunk has, because a loop needs the same shapes
    in all turns. If a chunk is one pair short, used_C is False at its last pick. That pick is left
    out of the sums and stays a candidate.
    """
    sizes = np.array(chunk_sizes(n_select, n_chunks))
    C = sizes.max()
    used_KC = np.arange(C) < sizes[:, None]
    everyone = {name: {k: gather(embeddings[k], axis) for k in ("image", "text")}
                for name, embeddings in models.items()}
    n_candidates = len(next(iter(everyone.values()))["image"])

    def pick(k, state, taken_B):
        logits_B = gather(score_gain * score_of(k, state), axis)
        return draw(jax.random.fold_in(key, k), logits_B, taken_B, C)

    def turn(carry, inputs):
        (state, taken_B), (k, used_C) = carry, inputs
        pick_C = pick(k, state, taken_B)
        chunk = jax.tree.map(lambda x_BE: x_BE[pick_C], everyone)
        return (add_chunk(state, chunk, used_C), taken_B.at[pick_C].set(used_C)), pick_C

    carry = state, jnp.zeros(n_candidates, bool)
    carry, pick_KC = jax.lax.scan(turn, carry, (np.arange(n_chunks - 1), used_KC[:-1]))
    last_C = pick(n_chunks - 1, *carry)  # nothing is drawn after the last chunk: no need to add it
    return jnp.concatenate([pick_KC, last_C[None]])[np.nonzero(used_KC)]


# ------------------------------------------------- joint selection, softmax loss (Algorithm 3)


def jointly_sample_softmax(key, learner, reference, n_select, n_chunks=16, *, kind="learnability",
                           score_gain=100.0, axis=None, tile=2048):
    """Algorithm 3: joint selection by the softmax loss. Arguments and result as `jointly_sample`.

    Under one model candidate i, given T, has the loss
        -t z_i.z_i + (log sum over j in T of exp(t image_i.text_j)
                      + log sum over j in T of exp(t text_i.image_j)) / 2.
    Its own pair is not in the sums. The first chunk is drawn by the first term alone. The score is
    the learner's loss minus the reference's (in the first chunk of the paper's print both are the
    learner's, a slip).

    The two logarithms are what is kept for each model and candidate. After a chunk is drawn they
    take in its members: log(exp(old) + exp(new)).
    """
    models = models_of(kind, learner, reference)
    self_N = self_score(kind, learner, reference, "softmax")
    empty_sum_N = jnp.full_like(self_N, -jnp.inf)

    def score_of(k, log_sums):
        negative_N = sum(sign * (log_sums[name]["texts"] + log_sums[name]["images"]) / 2
                         for name, sign in SCORES[kind].items())
        return self_N + jnp.where(k == 0, 0.0, negative_N)  # at k = 0, inf - inf

    def add_chunk(log_sums, chunk, used_C):
        new = {name: log_sums_over(models[name], chunk[name], used_C, tile) for name in models}
        return jax.tree.map(jnp.logaddexp, log_sums, new)

    return draw_in_chunks(
        key, models, n_select, n_chunks,
        {name: {"texts": empty_sum_N, "images": empty_sum_N} for name in models},
        score_of, add_chunk, score_gain=score_gain, axis=axis)


def log_sums_over(embeddings, chunk, used_C, tile):
    """For each candidate i the logarithm of the sum over the chunk's members j of exp(logit), [N]:
    'texts' by the logits of image i and text j, 'images' by those of text i and image j."""
    t = jnp.exp(embeddings["log_t"])
    return {"texts": log_sum_exp(embeddings["image"], chunk["text"], t, used_C, tile),
            "images": log_sum_exp(embeddings["text"], chunk["image"], t, used_C, tile)}


def log_sum_exp(x_NE, y_CE, t, used_C, tile):
    """For each row x_i the logarithm of the sum over the used rows y_j of exp(t x_i.y_j), [N]."""
    def of_row(x_E):
        logits_C = t * jnp.einsum("ce,e->c", y_CE, x_E, precision="highest")
        return jax.nn.logsumexp(logits_C, where=used_C)
    return jax.lax.map(of_row, x_NE, batch_size=tile)


SAMPLERS = {"sigmoid": jointly_sample, "softmax": jointly_sample_softmax}  # by the loss


def independently_sample(key, learner, reference, n_select, *, kind="learnability", loss="sigmoid",
                         score_gain=100.0, axis=None):
    """Indices [n_select], each pair drawn by its own score S[i,i], which is the first chunk of the
    joint samplers. Arguments as theirs."""
    logits_B = gather(score_gain * self_score(kind, learner, reference, loss), axis)
    return draw(jax.random.fold_in(key, 0), logits_B, jnp.zeros(len(logits_B), bool), n_select)


# ----------------------------------------------------------- Flexi-JEST (FlexiViT, 2212.08013)


def at_patch(params, model, patch):
    """(params, model) that cut images into coarser or finer patches.

    The kernel is resized by the pseudo-inverse (`pi_resize`), the positions bilinearly and
    antialiased (as in FlexiViT's code). Both are always made from the stored ones and the map is
    differentiable, so that both resolutions train the same weights.
    """
    old, P, D = model.image, model.image.patch, params["image"]["position"].shape[1]
    kernel = einops.rearrange(params["image"]["embed"]["w"], "(p q c) d -> p q c d", p=P, q=P)
    resize = pi_resize(P, patch)
    kernel = jnp.einsum("ap,bq,pqcd->abcd", resize, resize, kernel)
    side_old, side_new = old.image_size // P, old.image_size // patch
    position = params["image"]["position"].reshape(side_old, side_old, D)
    position = jax.image.resize(position, (side_new, side_new, D), "bilinear", antialias=True)
    image = {**params["image"], "position": position.reshape(-1, D), "embed": {
        **params["image"]["embed"], "w": einops.rearrange(kernel, "p q c d -> (p q c) d")}}
    return {**params, "image": image}, cut_at(model, patch)


def cut_at(model, patch):
    """The model at another patch size."""
    return dataclasses.replace(model, image=dataclasses.replace(model.image, patch=patch))


@functools.lru_cache
def pi_resize(old, new):
    """FlexiViT's PI-resize along one axis: pinv(R^T) [new, old], where R resizes a signal
    bilinearly, without antialiasing, from old to new.

    A patch x and a kernel w give the token <x, w>. The resized patch R x and the kernel
    w' = pinv(R^T) w give the same token, exactly if new >= old and in the least-squares sense
    otherwise. Resizing an image treats its two axes alike and one after the other. So does the
    pseudo-inverse, which is why this matrix is all that is needed.
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    low = np.floor(place).astype(int)
    R = np.zeros((new, old))
    for row, (l, w) in enumerate(zip(low, place - low)):
        R[row, np.clip(l, 0, old - 1)] += 1 - w
        R[row, np.clip(l + 1, 0, old - 1)] += w
    return np.linalg.pinv(R.T).astype(np.float32)


def embed_flexi(params, batch, model, low_patch):
    """`embed`, with every second image cut into coarse patches.

    The halves are the paper's: rows [::2] of the batch at full resolution and rows [1::2] at low
    resolution, put one after the other, with one loss over all of them (Algorithm 2). The texts
    are put into the same new order.
    """
    order = np.r_[0:len(batch["image"]):2, 1:len(batch["image"]):2]
    high = embed_image(params, batch["image"][0::2], model)
    params_low, model_low = at_patch(params, model, low_patch)
    low = embed_image(params_low, batch["image"][1::2], model_low)
    text = unit(vit.text_apply(params["text"], batch["tokens"][order], model.text))
    return {"image": jnp.concatenate([high, low]), "text": text, **logit_scale_and_bias(params)}


# -------------------------------------------------------------------------------- one step


def adam(peak, steps, *, warmup=0.01, weight_decay=1e-4, b2=0.95, clip_norm=1.0):
    """The paper's optimiser (A.1): clipped gradients, Adam, linear warm-up, cosine to 0 at `steps`.

    With h(step) in [0, 1] for the schedule, an update is
        w -= h(step) * (peak * adam + weight_decay * w).
    The decay is not multiplied by the learning rate: so it is in the code base that SigLIP came
    from, for which the paper's 1e-4 was set. optax.adamw multiplies by it, and would need
    weight_decay / peak to say the same. Only the weights of linear maps decay (leaves named 'w').
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, round(warmup * steps), steps, 0.0)
    linear_maps = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "w", params)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b2=b2),
        optax.scale(peak),
        optax.add_decayed_weights(weight_decay, mask=linear_maps),
        optax.scale_by_learning_rate(schedule))  # times -h(step)


def new_state(key, model, optimiser):
    params = init(key, model)
    return {"params": params, "opt": optimiser.init(params)}


def update(state, batch, model, optimiser, low_patch=0):
    """One update of {'params', 'opt'} on a sharded batch; also returns the loss before it. With
    `low_patch`, every second image is cut into patches of that size."""
    def loss_of(params):
        embeddings = (embed_flexi(params, batch, model, low_patch) if low_patch else
                      embed(params, batch, model))
        return contrastive_loss(embeddings, model.loss, AXIS)

    loss, grads = devices.mean(jax.value_and_grad(loss_of)(state["params"]))
    updates, opt = optimiser.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


def embed_both(state, batch_N, *, kind, model, reference_model, low_patch=0):
    """(learner, reference): the embeddings that the score `kind` needs; None for a model that it
    does not use. With `low_patch` the learner sees coarse patches. The reference's embeddings are
    taken from the batch if they are cached there."""
    learner = reference = None
    if "learner" in SCORES[kind]:
        params = state["learner"]["params"]
        if low_patch:
            params, model = at_patch(params, model, low_patch)
        learner = embed(params, batch_N, model)
    if "reference" in SCORES[kind]:
        if "reference_image" in batch_N:
            reference = {"image": batch_N["reference_image"], "text": batch_N["reference_text"],
                         **logit_scale_and_bias(state["reference"])}
        else:
            reference = embed(state["reference"], batch_N, reference_model)
    return jax.lax.stop_gradient((learner, reference))


def train_step(state, index, key, batch_N, *, method, kind, n_select, model, reference_model,
               optimiser, n_chunks=16, score_gain=100.0, low_patch=0, cotrain=True):
    """One iteration of JEST or Flexi-JEST (Algorithm 2), or of a baseline, inside `pmap`.

    Args:
      state: {'learner': {'params', 'opt'}, 'reference': its params, or only its t and b where its
        embeddings are cached}.
      index: of the step, from 0.
      batch_N: this device's share of the super-batch (for 'uniform': of the n_select pairs, all of
        which it trains on). 'image' uint8 [N, H, W, channels], 'tokens' [N, T]; 'reference_image'
        and 'reference_text' [N, E] where they are cached; bool arrays [N] that say what was planted
        and are only reported on.
      method: one of METHODS. kind: one of SCORES. low_patch: flexi_jest's; 0 for the others.

    Returns: (state, metrics).
    """
    key_select = jax.random.fold_in(key, index)
    truth_B = {k: devices.gather(v) for k, v in batch_N.items() if v.dtype == bool}
    batch_S = {k: batch_N[k] for k in ("image", "tokens")}
    pick_S, state = jnp.arange(n_select), dict(state)
    if method != "uniform":
        models = embed_both(state, batch_N, kind=kind, model=model,
                            reference_model=reference_model, low_patch=low_patch)
        knobs = dict(kind=kind, score_gain=score_gain, axis=AXIS)
        if method == "independent":
            pick_S = independently_sample(key_select, *models, n_select, loss=model.loss, **knobs)
        else:
            pick_S = SAMPLERS[model.loss](key_select, *models, n_select, n_chunks, **knobs)
        # Back into the super-batch's order, which is random. In the order of the draw flexi_jest's
        # halves, every second pick, would not be a random half.
        pick_S = jnp.sort(pick_S)
        batch_S = {k: devices.take(v, pick_S) for k, v in batch_S.items()}
    state["learner"], loss = update(state["learner"], batch_S, model, optimiser,
                                    low_patch if cotrain else 0)
    metrics = {"loss": loss}
    for k, v_B in truth_B.items():
        metrics |= {f"picked_{k}": v_B[pick_S].mean(), f"pool_{k}": v_B.mean()}
    return state, metrics


def step_flops(method, kind, batch_size, B, F, *, F_low=0, F_reference=0, n_chunks=16, embed=64,
               cotrain=True, reuse=False):
    """FLOPs of one step by role. A forward of one pair is F, a training step of one pair is 3 F.

    The paper's bill (A.4) is relative to a uniform step, 3 b F. With r = B / b = 5 (f = 0.8):
      jest, the forward of the picked pairs reused (A.4's total)    1 + (r - 1) / 3        233 %
      jest, that forward run again (Algorithm 2, figures 1 and 4)   1 + r / 3              267 %
      either one without cached reference embeddings                r / 3 more       400, 433 %
      flexi_jest with A = F_low / F = 0.25                          (1 + A) / 2 + r A / 3  104 %
      flexi_jest with A = 0.28, the paper's                         111 %, which it prints as 110
    This code runs the forward again. `reuse` bills as if it did not; flexi_jest cannot reuse it,
    since half of the picked pairs are trained at another resolution. A is computed from the two
    models, never quoted: 0.28 holds for 16 text tokens, with 64 it is 0.39.

    Args:
      F, F_low: `forward_flops` of the learner at its full and at its coarse patch.
      F_reference: of the reference; 0 where its embeddings are cached.
    """
    b, flexi = batch_size, method == "flexi_jest"
    scores = method != "uniform"
    reused = b if reuse and not flexi else 0
    return {
        "learner": 3 * b * (F + F_low) / 2 if flexi and cotrain else 3 * b * F,
        "actor_scoring": (B - reused) * (F_low if flexi else F)
                         if scores and "learner" in SCORES[kind] else 0,
        "selection": sampler_flops(kind, b, B, n_chunks if "jest" in method else 1, embed)
                     if scores else 0,
        "reference_scoring": B * F_reference if scores and "reference" in SCORES[kind] else 0,
    }


def sampler_flops(kind, b, B, n_chunks, embed):
    """FLOPs of `jointly_sample`.

    For each model: the B self-scores, and two [B, C] blocks a chunk, except the last. An element
    costs 2 E for its product and 5 for scale, shift, softplus and sum. Each chunk costs every
    candidate noise, a mask and about log2(B) comparisons.
    """
    added = b - chunk_sizes(b, n_chunks)[-1]
    per_model = (2 * B * added + B) * (2 * embed + 5)
    return len(SCORES[kind]) * per_model + n_chunks * B * (3 + max(B, 2).bit_length())


# --------------------------------------------------------------------------------- evaluation


def evaluate(params, forwards, pool, batch_size, class_tokens):
    """Retrieval recall at 1, 5 and 10, both ways and their mean, each with its chance level; with
    labels, the accuracy of the nearest class prompt. `forwards`: `make_forwards(model)`; class_tokens [classes, T] or None."""
    parts = [got for got, _ in stage.forward_all(params, forwards[0], pool, batch_size)]
    got = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    metrics = retrieval.recalls(got["image"], got["text"], got["caption_hash"], ks=(1, 5, 10))
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
        embeddings = embed(params, batch, model)
        return {**{k: devices.gather(v) for k, v in batch.items() if k != "image"},
                **{k: devices.gather(embeddings[k]) for k in ("image", "text")}}

    def text(params, tokens):
        return devices.gather(unit(vit.text_apply(params["text"], tokens, model.text)))
    return devices.Program(both, in_axes=(None, 0)), devices.Program(text, in_axes=(None, 0))


def diagnose(state, key, batch_N, *, kind, n_select, model, reference_model, n_chunks,
             score_gain, low_patch):
    """What selection does to one super-batch, inside `pmap`.

    Returns: metrics, the self-scores [B] and the joint picks [n_select]. Metrics are the score of a
    uniform, an independent and a joint sub-batch (the learner's loss of it minus the reference's),
    and with `low_patch` how well coarse scores stand in for full ones.
    """
    def models_at(patch):
        return embed_both(state, batch_N, kind=kind, model=model, reference_model=reference_model,
                          low_patch=patch)

    def joint(models):
        return SAMPLERS[model.loss](key, *models, n_select, n_chunks, **knobs)

    def self_score_B(models):
        return devices.gather(self_score(kind, *models, model.loss))

    def value(pick_S):
        total = 0.0
        for name, embeddings in zip(("learner", "reference"), full):
            if name in SCORES[kind]:
                rows = {k: devices.take(embeddings[k], pick_S) for k in ("image", "text")}
                total += SCORES[kind][name] * devices.mean(
                    contrastive_loss({**embeddings, **rows}, model.loss, AXIS))
        return total

    knobs = dict(kind=kind, score_gain=score_gain, axis=AXIS)
    full = models_at(0)
    used = models_at(low_patch) if low_patch else full
    pick_S = joint(used)
    alone_S = independently_sample(key, *used, n_select, loss=model.loss, **knobs)
    metrics = {"score_uniform": value(jnp.arange(n_select)), "score_independent": value(alone_S),
               "score_joint": value(pick_S)}
    if low_patch:
        metrics["rank_correlation"] = spearman(self_score_B(used), self_score_B(full))
        metrics["pick_overlap"] = jnp.isin(pick_S, joint(full)).mean()
    return metrics, self_score_B(used), pick_S


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
    want(config.score_gain > 0, "score_gain", "more than 0")
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
    """'steps', 'optimiser', 'step' (`train_step`) and 'look' (`diagnose`) of an arm, or of the
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
                 n_select=config.batch_size, n_chunks=config.n_chunks,
                 score_gain=config.score_gain,
                 low_patch=config.low_patch if method == "flexi_jest" else 0)
    step = functools.partial(train_step, method=method, optimiser=optimiser, cotrain=config.cotrain,
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
        embed=config.embed, cotrain=config.cotrain, reuse=reuse)


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
    open_split = lambda flag, split, split_flag: data.open_source(
        config[flag], split, data_dir=config.data_dir, image_size=config.image_size,
        context=config.context, encode=encode, need=("caption",), toy_knobs=run.toy_knobs(config),
        flags=(flag, split_flag))
    source = open_split("dataset", config.split, "split")
    test_source = open_split("dataset", config.eval_split, "eval_split")
    curated_source = config.reference_dataset and open_split("reference_dataset", "train", "split")
    if any(split_arm(arm)[0] != "uniform" for arm in config.arms):
        n_curated = 0 if curated_source else round(config.curated_fraction * len(source.ids))
        data.check_batch(source.ids[n_curated:], super_batch_size(config),
                         f"--filter_ratio={config.filter_ratio}")
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
        class_tokens = np.stack([data.tokenize(config.prompt.replace("{}", name), config.context, encode)
                                 for name in test_source.class_names])
    b, B, F_reference = config.batch_size, super_batch_size(config), forward_flops(reference_model)
    made = {arm: make_arm(arm, config, model, reference_model)
            for arm in ("reference", *config.arms)}
    cost = functools.partial(arm_cost, config=config, model=model, reference_model=reference_model)

    def load(pool, seed, start, stop_at, n, given, selects):
        """Sharded batches of n pairs, with what the reference said of them. If the step selects
        from them, no pair may be in a batch twice."""
        for batch in data.batches(pool, seed=seed, batch_size=n, start=start, stop=stop_at,
                                  host=devices.host(), wrap=not selects,
                                  flags=f"--filter_ratio={config.filter_ratio}"):
            rows = np.searchsorted(pool.ids, batch["id"])
            batch |= {f"reference_{k}": v[rows] for k, v in (given or {}).items()}
            yield devices.shard({k: v for k, v in batch.items()
                                 if k not in ("id", "label", "caption_hash")})

    def train(name, seed, pool, state, key, model, *, per_step, n_scored=b, given=None, look=None,
              **rest):
        """One stage or arm, evaluated as it goes."""
        def metrics_of(state):
            metrics = evaluate(state["learner"]["params"], forwards[model], test_pool, b,
                               class_tokens)
            return metrics | (look(state)[0] if look else {})
        return stage.fit(
            name, seed, made[name].step, state, key,
            lambda start: load(pool, seed, start, made[name].steps, n_scored, given,
                               selects=look is not None),
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
            where = run.for_seed(config.reference, seed)
        params, books = checkpoint.restore_params(where, like, "reference")
        flops, seconds, given = {"reference_training": books["flops"]}, books["seconds"], None
        if config.reference_scores == "cached":
            path = (run.for_seed(config.score_cache, seed) if config.score_cache else
                    os.path.join(config.workdir, f"embeddings-{seed}.npz"))
            given, took = embed_pool(params, pool, forwards[reference_model][0], b, path)
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
                state["reference"] = logit_scale_and_bias(params) if given else params
            if method != "uniform":
                pool, n = rest, B  # the curated part is the reference's; uniform has the whole pool
                batch = next(load(pool, seed, made[arm].steps, made[arm].steps + 1, B, given, True))
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
                        arms=config.arms, seeds=config.seeds, metric="recall@10",
                        dataset=run.dataset_name(config.dataset))
        print("", iteration_cost(config.arms, cost), sep="\n")


if __name__ == "__main__":
    define_flags()
    run.main(main)
