"""JEST: Data Curation via Joint Example Selection (Evans et al., 2406.17711), and Flexi-JEST.

Contrastive learning of images and texts. The pairs of a batch are each other's negatives, so what a
pair is worth depends on the others of its batch. JEST therefore chooses a batch jointly. Per step
  1. draw a super-batch of B = b / (1 - f) pairs uniformly                    `data.batches`
  2. embed it with the learner, and with a frozen reference                   `embed`
  3. S[i,j] = loss of pair (i,j) under the learner - under the reference      `score_matrix`
  4. draw a sub-batch T of b pairs in chunks. Candidate i, not in T, is drawn with probability
     softmax(gain * (S[i,i] + sum over j in T of S[i,j] + S[j,i]))            `jointly_sample`
  5. update the learner on T by the ordinary contrastive loss, unweighted     `update`
The sum in 4 is what i adds to the score of T, the sum of S over all pairs of T (section 3.2). The
paper found importance weights in 5 to hurt (A.2).

`score_matrix` and `jointly_sample_dense` are 3 and 4 in the paper's form. They are there to be
read; `jointly_sample` makes the same picks, up to rounding. With the softmax loss 3 and 4 are
`jointly_sample_softmax` (Algorithm 3). Flexi-JEST scores with coarser patches, and trains half of T
with them (`at_patch`, `embed_flexi`). Only the learner's images are cut coarsely, not its texts and
nothing of the reference's. `step_flops` counts the FLOPs of a step.

The reference is trained before the learner, on a small curated part of the pool or on another data
set (`Experiment.train_reference`), or it is loaded: a checkpoint, or a published SigLIP. By default
its embeddings of the pool are computed once and kept in a file (`embed_pool`).

Dimension letters: B super-batch, N a device's share of it, S sub-batch (b) or a device's share of
it, C chunk (in class_CE: classes), A all rows of a batch on all devices, E embedding, P patch side,
D width, H W image. T is the sub-batch so far; as a dimension, tokens.

One or two minutes, a core: python jest.py
The measurements:           python jest.py --preset=toy_100k; all commands are in docs/results.md
The paper's model:          python jest.py --preset=siglip_B  (a trial, on generated images)

Where we differ from the paper, or its pseudo-code from its text: docs/differences.md.
"""

import dataclasses
import functools

from absl import logging
import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import data, devices, flags, flops, picks, reference, report, retrieval, siglip
from common import train, vit
from common.devices import AXIS

SELECTS = ("independent", "jest", "flexi_jest")
METHODS = ("uniform", *SELECTS, "curated")  # curated: the learner on the curated part alone
# score -> the sign of each model's loss in it (section 3.1)
SCORES = {"learnability": {"learner": 1, "reference": -1}, "easy_reference": {"reference": -1},
          "hard_learner": {"learner": 1}}
# arm -> (method, score); without a score in its name a method selects by learnability
ARMS = {m: (m, "learnability") for m in METHODS} | {
    f"{m}_{score}": (m, score) for m in SELECTS for score in SCORES}
TOY = {"image_size": 16, "examples": 50_000, "tail": 0.0, "radius": 0.4, "domains": 0}
TOY_NOISE = {"caption_noise": 0.8}

PRESETS = {
    # the headline of docs/results.md: 1,000 right captions of 100,000 pairs
    "toy_100k": dict(
        arms=["uniform", "independent", "jest", "flexi_jest", "jest_easy_reference", "curated"],
        toy_examples=100_000, image_size=32, toy_radius=0.25, context=20, model="64/2/256/4",
        reference_model="32/1/128/2", curated_fraction=0.01, steps=5000, active_steps=1000,
        reference_steps=600, eval_every=50, learning_rate=2.5e-4, active_learning_rate=2e-3),
    # The paper's models and optimiser (A.1) on generated images. The paper's run also has
    # --batch_size=32768 --steps=91553 (3e9 pairs), a 32k sentencepiece --tokenizer (bytes cut
    # captions short) and a --reference_dataset of about 1e8 curated pairs.
    "siglip_B": dict(
        arms=["uniform", "independent", "jest", "flexi_jest"], caption_noise=0.0, image_size=256,
        toy_examples=4096, toy_tail=1.0, toy_radius=0.25, model="B", patch=16, low_patch=32,
        tokenizer="bytes", context=64, pool="map", embed=768,
        dtype="bfloat16", n_chunks=16, curated_fraction=0.2, batch_size=256, steps=1000,
        active_steps=0, active_learning_rate=0.0, warmup=0.01, reference_steps=100,
        reference_learning_rate=1e-3, reference_scores="computed"),
}


def define_flags():
    f = flags.Group("Method")
    f.names("arms", ["uniform", "jest", "flexi_jest", "curated"], f"comma list of "
            f"{', '.join(METHODS)}. {', '.join(SELECTS)} select by learnability, or with "
            "_easy_reference or _hard_learner at the end of the name by that score. The first is "
            "the baseline. curated is a control: the learner, trained on the reference's curated "
            "part alone. Selection pays only if it beats that")
    f.number("filter_ratio", 0.8, "[0, 1)", "f = 1 - b/B: part of the super-batch that is left out")
    f.integer("n_chunks", 8, "[1, inf)", "chunks in which jest draws its sub-batch (paper: 16)")
    f.number("score_gain", 100.0, "(0, inf)", "multiplies the scores before a chunk is drawn from "
             "their softmax (Algorithm 2 prints 100, close to greedy); 1 / temperature")
    f.number("curated_fraction", 0.02, "(0, 1)", "part of the pool that is set apart to train the "
             "reference")
    f.number("reference_noise", 0.0, "[0, 1] or -1", "caption noise of the curated part; -1: the "
             "pool's, or none in --reference_dataset")
    f.text("reference_dataset", None, "train the reference on another data set instead, on all of "
           "its --reference_split")
    f.text("reference_split", "train", "of --reference_dataset, TFDS syntax")
    f.text("reference", "curated", "'curated': trained first, on the curated part or on "
           "--reference_dataset; or the checkpoint directory of such a stage, in which '{seed}' "
           "stands for the seed (each seed has its own curated part); or published SigLIP weights, "
           "with which no part is set apart: a .npz file (big_vision's), a .safetensors file "
           "(Hugging Face's), or the directory with the latter and its config.json")
    f.text("reference_tokenizer", None, "published weights: their sentencepiece model file")
    f.integer("reference_image_size", 0, "[0, inf)", "published weights: side in pixels of the "
              "images that they see; 0: that of the file")
    f.choice("reference_scores", "cached", ["cached", "computed"], "'cached': embed the pool "
             "once; 'computed': embed each super-batch in its step")
    f.integer("low_patch", 16, "[1, inf)", "patch at which flexi_jest scores, and at which it "
              "trains half of its sub-batch (paper: 32)")
    f.switch("cotrain", True, "flexi_jest trains half of its sub-batch at --low_patch; off: all "
             "of it at --patch")

    f = flags.Group("Models")
    f.choice("loss", "sigmoid", ["sigmoid", "softmax"], "contrastive loss: sigmoid (eq 2) or "
             "softmax (eq 1)")
    f.text("model", "64/1/256/4", "size of both towers: " + ", ".join(vit.SIZES)
           + ", or width/depth/mlp/heads")
    f.text("reference_model", "", "size of the reference's towers; empty: --model")
    f.integer("patch", 8, "[1, inf)", "patch side in pixels, at full resolution")
    f.choice("pool", "gap", ["gap", "map"], "mean of the tokens, or attention pooling")
    f.integer("embed", 64, "[1, inf)", "width E of the joint embedding")
    f.integer("context", 16, "[2, inf)", "tokens per caption; longer ones are cut")
    f.text("tokenizer", "words", "'words', 'bytes', or a sentencepiece model file")
    f.choice("dtype", "float32", ["float32", "bfloat16"], "type of the activations")
    f.switch("remat", False, "recompute blocks in the backward pass: memory for time")
    f.text("prompt", "a {}", "zero-shot caption of a class, where the data has labels")

    f = flags.Group("Optimisation")
    f.integer("steps", 500, "[1, inf)", "updates of uniform")
    f.integer("active_steps", 400, "[0, inf)", "updates of the arms that select, whose schedule "
              "ends there; 0: as many as --steps")
    f.integer("reference_steps", 400, "[0, inf)", "updates of the reference, and of the arm "
              "curated; 0: as many as --steps")
    f.integer("batch_size", 128, "[1, inf)", "b: pairs per update")
    f.number("learning_rate", 1e-3, "(0, inf)", "peak, of Adam; linear warm-up, cosine to 0")
    f.number("active_learning_rate", 3e-3, "[0, inf)", "peak, in the arms that select; 0: "
             "--learning_rate. Where most captions are wrong, uniform needs a lower peak than they")
    f.number("reference_learning_rate", 3e-3, "(0, inf)", "peak, of the reference and of the arm "
             "curated")
    f.number("weight_decay", 1e-4, "[0, inf)", "a step subtracts this fraction of the weights of "
             "linear maps, times the schedule (1 at its peak) and not times the learning rate")
    f.number("beta2", 0.95, "[0, 1)", "of Adam")
    f.number("clip_norm", 1.0, "(0, inf)", "gradients whose global norm is larger are "
             "scaled down to it")
    f.number("warmup", 0.05, "[0, 1)", "fraction of the steps (paper: 0.01)")

    flags.define_shared("jest", toy=TOY, toy_noise=TOY_NOISE)


# ------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Model:
    """Two towers into one embedding space, and the loss ('sigmoid' or 'softmax') between them."""
    loss: str
    image: vit.ViT
    text: vit.Text


def init(key, model):
    """Parameters. t = exp(log_t) starts at 10 and b at -10 (SigLIP). So the model at first takes
    every pair for a negative, and nearly all pairs are. In the softmax loss a bias would
    cancel, so it has none."""
    key_image, key_text = jax.random.split(key)
    params = {"image": vit.vit_init(key_image, model.image),
              "text": vit.text_init(key_text, model.text), "log_t": jnp.log(10.0)}
    if model.loss == "sigmoid":
        params["b"] = jnp.array(-10.0)
    return params


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
    """Rows of length 1. The small number under the root keeps the gradient of a row of zeros
    finite."""
    return x_NE * jax.lax.rsqrt(jnp.square(x_NE).sum(-1, keepdims=True) + 1e-12)


def logit_scale_and_bias(params):
    """{'log_t'} of the softmax loss, {'log_t', 'b'} of the sigmoid loss."""
    return {k: params[k] for k in ("log_t", "b") if k in params}


def embedding_width(model):
    """E. A tower without a head (n_out 0) gives its own width."""
    return model.text.n_out or vit.size(model.text.size)[0]


def forward_flops(model):
    """FLOPs (a multiply-add is two) of one forward of one pair."""
    return vit.vit_flops(model.image) + vit.text_flops(model.text)


# --------------------------------------------------------------------- losses (eqs 1 and 2)


def contrastive_loss(embeddings_S, loss, axis=None):
    """The loss of a sub-batch, from its embeddings (see `embed`).

    Inside `pmap` with `axis` named, this returns the device's part of the loss: the mean over its
    own rows, with the negatives of all devices. The gradient of that part, averaged over the
    devices, is the gradient of the whole loss. (The same holds inside `jax.shard_map` with
    check_vma=False. With its default, gradients come out summed over the devices.)
    """
    if loss not in ("sigmoid", "softmax"):
        raise ValueError(f"loss {loss!r}: want 'sigmoid' or 'softmax'")
    image_SE, text_SE = embeddings_S["image"], embeddings_S["text"]
    image_AE, text_AE = gather(image_SE, axis), gather(text_SE, axis)
    begin = jax.lax.axis_index(axis) * len(image_SE) if axis else 0
    own_S = begin + jnp.arange(len(image_SE))  # where our rows stand among all
    if loss == "sigmoid":
        return sigmoid_loss(image_SE, text_AE, own_S, embeddings_S["log_t"], embeddings_S["b"])
    return 0.5 * (softmax_loss(image_SE, text_AE, own_S, embeddings_S["log_t"])
                  + softmax_loss(text_SE, image_AE, own_S, embeddings_S["log_t"]))


def gather(x, axis=None):
    """x [N, ...] of every device, in order, [A, ...]; without an axis, x as it is."""
    return jax.lax.all_gather(x, axis, tiled=True) if axis else jnp.asarray(x)


def softmax_loss(x_SE, y_AE, own_S, log_t):
    """Eq 1, one direction: cross-entropy of each row of x against all rows of y, of which row own_S
    is the right one."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE)
    return optax.softmax_cross_entropy_with_integer_labels(logits_SA, own_S).mean()


def sigmoid_loss(x_SE, y_AE, own_S, log_t, b):
    """Eq 2: mean over rows i of x of the sum over rows j of y of -log sigmoid(label (t x_i.y_j +
    b)), where t = exp(log_t). The label is 1 for row own_S of y and -1 for all others."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE) + b
    label_SA = 2 * jax.nn.one_hot(own_S, len(y_AE)) - 1
    return -jax.nn.log_sigmoid(label_SA * logits_SA).sum(1).mean()


# ------------------------------------ joint selection (Algorithm 1), with the B x B matrix


def score_matrix(kind, models):
    """S [B, B] of image i and text j: the sigmoid loss of the pair under each model, by that
    model's own t and b, added with the signs of SCORES[kind]. models: see `jointly_sample`."""
    def losses(embeddings):
        t, b = jnp.exp(embeddings["log_t"]), embeddings["b"]
        logits_BB = t * jnp.einsum("ie,je->ij", embeddings["image"], embeddings["text"],
                                   precision="highest", preferred_element_type=jnp.float32) + b
        label_BB = 2 * jnp.eye(len(logits_BB)) - 1
        return -jax.nn.log_sigmoid(label_BB * logits_BB)
    return sum(sign * losses(models[name]) for name, sign in SCORES[kind].items())


def jointly_sample_dense(key, score_BB, n_select, n_chunks=16, *, score_gain=100.0):
    """Algorithm 1 on the whole matrix S, written to be read. `jointly_sample` makes the same picks,
    up to rounding, without the matrix. The tests hold both to a slow form in float64.

    The first chunk is drawn by the self-scores S[i,i], as section 3.2 says. (The printed
    pseudo-code draws it uniformly.) All members of a chunk are drawn from the same logits, so none
    depends on the others. The logits are sums, as printed. Means over T would change the
    temperature as T grows.

    Args:
      score_BB: `score_matrix`.

    Returns: indices [n_select] in the order drawn.
    """
    dot = functools.partial(jnp.dot, precision="highest")
    drawn_B = jnp.zeros(len(score_BB))  # 1 for the members of T
    picks = []
    for k, size in enumerate(chunk_sizes(len(score_BB), n_select, n_chunks)):
        # Sums over T, as matrix-vector products: masked sums over the two axes are added up wrongly
        # under jit(vmap) on a CPU (jaxlib 0.10.2).
        score_B = jnp.diag(score_BB) + dot(score_BB, drawn_B) + dot(drawn_B, score_BB)
        pick_C = draw(jax.random.fold_in(key, k), score_gain * score_B, drawn_B > 0, size)
        drawn_B = drawn_B.at[pick_C].set(1)
        picks.append(pick_C)
    return jnp.concatenate(picks)


def chunk_sizes(B, n_select, n_chunks):
    """n_chunks sizes that add up to n_select <= B exactly and differ by one at most. Whole numbers
    only: in floating point int(163840 * (1 - 0.8) / 16) is 2047, one short."""
    if n_select > B:
        raise ValueError(f"n_select = {n_select}: there are only {B} candidates")
    if not 1 <= n_chunks <= n_select:
        raise ValueError(f"{n_chunks} chunks: want 1 to n_select = {n_select}")
    edges = [k * n_select // n_chunks for k in range(n_chunks + 1)]
    return [end - begin for begin, end in zip(edges, edges[1:])]


def draw(key, logits_B, taken_B, size):
    """Draws `size` candidates without replacement and returns their indices.

    Each is drawn with probability softmax(logits) among the candidates that are left. Adding Gumbel
    noise and taking the largest does exactly that, and never takes an exponential of a logit, which
    at a gain of 100 would overflow. Candidates in `taken_B` are never drawn; at least `size` others
    must be left. A logit that is NaN or -inf is drawn last. (top_k would take NaN first.)
    """
    logits_B = jnp.nan_to_num(logits_B.astype(jnp.float32), nan=-1e30, neginf=-1e30)
    logits_B += jax.random.gumbel(key, logits_B.shape)
    return jax.lax.top_k(jnp.where(taken_B, -jnp.inf, logits_B), size)[1]


# ------------------------------------------------- joint selection, without a B x B matrix


def jointly_sample(key, models, n_select, n_chunks=16, *, kind="learnability", score_gain=100.0,
                   axis=None, tile=2048):
    """Algorithm 1 (sigmoid loss) in memory of order B: the picks of `jointly_sample_dense`.

    At the paper's B = 163,840 the matrix S would take 107 GB. It is never made. Each candidate
    keeps one running sum, S[i,i] + sum over j in T of S[i,j] + S[j,i]. It starts at S[i,i]. After a
    chunk is drawn, the terms with that chunk are computed from the embeddings, `tile` candidates at
    a time, and added: 4 b B E FLOPs for each model in all. With one chunk every pair is drawn by
    its own score: that is independent selection.

    Inside `pmap`, `axis` names the mapped axis. Each of n devices keeps the sums of its own
    N = B / n candidates. The logits are gathered and `key` is the same on every device, so all of
    them draw the same picks out of all B. To select within each device's share would be another
    algorithm.

    Args:
      models: {'learner', 'reference'} -> embeddings (see `embed`) of the candidates, as far as the
        score `kind` uses them.
      n_select, n_chunks: needs n_chunks <= n_select = b <= B.
      kind: one of SCORES.

    Returns: indices [n_select] into the B candidates, in the order drawn.
    """
    def add_chunk(score_N, _, chunk):
        for name, sign in SCORES[kind].items():
            # softplus(z) = -log sigmoid(-z) is the loss of a negative pair of logit z
            loss = lambda logits_C: jax.nn.softplus(logits_C + models[name]["b"]).sum()
            score_N += sign * sum(over_chunk(loss, models[name], chunk[name], tile))
        return score_N, None

    return draw_in_chunks(key, models, n_select, n_chunks, self_score(kind, models, "sigmoid"),
                          add_chunk, score_gain=score_gain, axis=axis)


def self_score(kind, models, loss):
    """S[i,i] [N]: the score of each pair by itself."""
    return sum(sign * positive_term(models[name], loss) for name, sign in SCORES[kind].items())


def positive_term(embeddings, loss):
    """The loss of each pair by itself under one model, [N]: -log sigmoid(t z_i.z_i + b) for the
    sigmoid loss, -t z_i.z_i for the softmax loss."""
    logits_N = jnp.exp(embeddings["log_t"]) * jnp.einsum(
        "ne,ne->n", embeddings["image"], embeddings["text"], precision="highest",
        preferred_element_type=jnp.float32)
    return jax.nn.softplus(-logits_N - embeddings["b"]) if loss == "sigmoid" else -logits_N


def over_chunk(reduce, embeddings, chunk, tile):
    """Two arrays [N], under one model. For each candidate i they are `reduce` over the members j of
    a chunk: of the logits t image_i.text_j, and of the logits t text_i.image_j. No candidate that
    is still left is a member, so all of these pairs are negatives."""
    def of_rows(x_NE, y_CE):
        # full precision: the gain turns an error of 0.001 in a score into one of 0.1 in a logit
        logits_C = lambda x_E: jnp.exp(embeddings["log_t"]) * jnp.einsum(
            "ce,e->c", y_CE, x_E, precision="highest", preferred_element_type=jnp.float32)
        # one matrix product for each tile of rows
        return jax.lax.map(lambda x_E: reduce(logits_C(x_E)), x_NE, batch_size=tile)
    return of_rows(embeddings["image"], chunk["text"]), of_rows(embeddings["text"], chunk["image"])


def draw_in_chunks(key, models, n_select, n_chunks, score_N, add_chunk, *, score_gain, axis):
    """The loop that the sigmoid and the softmax sampler share. Returns indices [n_select].

    Args:
      score_N: the scores by which the first chunk is drawn.
      add_chunk: (score_N, sums, chunk) -> (score_N, sums) once a chunk is drawn. chunk has the
        chunk's embeddings by each model, {name: {'image', 'text'}} [C, E]. sums is what a sampler
        keeps besides the scores; at first it is None.
    """
    everyone = {name: {k: gather(embeddings[k], axis) for k in ("image", "text")}
                for name, embeddings in models.items()}
    picks, taken_B, sums = [], gather(jnp.zeros_like(score_N, bool), axis), None
    for k, size in enumerate(chunk_sizes(len(taken_B), n_select, n_chunks)):
        if k:  # the last chunk is never added: nothing is drawn after it
            chunk = jax.tree.map(lambda x_BE: x_BE[picks[-1]], everyone)
            score_N, sums = add_chunk(score_N, sums, chunk)
        logits_B = gather(score_gain * score_N, axis)
        picks.append(draw(jax.random.fold_in(key, k), logits_B, taken_B, size))
        taken_B = taken_B.at[picks[-1]].set(True)
    return jnp.concatenate(picks)


# ------------------------------------------------- joint selection, softmax loss (Algorithm 3)


def jointly_sample_softmax(key, models, n_select, n_chunks=16, *, kind="learnability",
                           score_gain=100.0, axis=None, tile=2048):
    """Algorithm 3: joint selection by the softmax loss. Arguments and result as `jointly_sample`.

    Under one model candidate i, given T, has the loss
        -t z_i.z_i + (log sum over j in T of exp(t image_i.text_j)
                      + log sum over j in T of exp(t text_i.image_j)) / 2.
    Candidate i itself is not in the sums. The first chunk is drawn by the first term alone. The
    score is the learner's loss minus the reference's. (In the first chunk the printed pseudo-code
    takes both from the learner, which we read as a slip.)

    The sampler keeps the two logarithms for each model and candidate. After a chunk is drawn it
    adds the chunk's members to them: log(exp(old) + exp(new)).
    """
    self_N = self_score(kind, models, "softmax")

    def add_chunk(_, log_sums, chunk):
        new = {name: over_chunk(jax.nn.logsumexp, models[name], chunk[name], tile)
               for name in SCORES[kind]}
        log_sums = jax.tree.map(jnp.logaddexp, log_sums, new) if log_sums else new
        negative_N = sum(sign * sum(log_sums[name]) / 2 for name, sign in SCORES[kind].items())
        return self_N + negative_N, log_sums

    return draw_in_chunks(key, models, n_select, n_chunks, self_N, add_chunk,
                          score_gain=score_gain, axis=axis)


SAMPLERS = {"sigmoid": jointly_sample, "softmax": jointly_sample_softmax}  # by the loss


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
    otherwise. An image is resized along one axis and then along the other, by the same R. The
    pseudo-inverse splits in the same way, so this one matrix serves both axes.
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
    """Inside `pmap`, one step of {'params', 'opt'} on a sharded batch. Also returns the loss from
    before the step. With `low_patch`, every second image is cut into patches of that size."""
    def loss_of(params):
        embeddings = (embed_flexi(params, batch, model, low_patch) if low_patch else
                      embed(params, batch, model))
        return contrastive_loss(embeddings, model.loss, AXIS)

    loss, grads = devices.mean(jax.value_and_grad(loss_of)(state["params"]))
    updates, opt = optimiser.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss


@dataclasses.dataclass(frozen=True)
class Method:
    """The settings of one arm that `train_step` needs. The flags of the same names explain them
    (name and kind: --arms)."""
    name: str  # one of METHODS
    kind: str  # one of SCORES
    batch_size: int  # b, on all devices together
    n_chunks: int = 16
    score_gain: float = 100.0
    low_patch: int = 0  # the coarse patch of flexi_jest; 0 for the others
    cotrain: bool = True

    @property
    def selects(self):
        return self.name in SELECTS

    @property
    def needs_reference(self):
        return self.selects and "reference" in SCORES[self.kind]


def embed_both(state, batch_N, method, model, reference_model, *, low_patch=0):
    """{'learner', 'reference'} -> the embeddings, as far as the score needs them. With `low_patch`
    the learner sees coarse patches. The reference's embeddings are taken from the batch if they are
    cached there."""
    models = {}
    if "learner" in SCORES[method.kind]:
        params = state["learner"]["params"]
        if low_patch:
            params, model = at_patch(params, model, low_patch)
        models["learner"] = embed(params, batch_N, model)
    if "reference_image" in batch_N:
        models["reference"] = {"image": batch_N["reference_image"],
                               "text": batch_N["reference_text"],
                               **logit_scale_and_bias(state["reference"])}
    elif "reference" in SCORES[method.kind]:
        models["reference"] = embed(state["reference"], batch_N, reference_model)
    return models


def train_step(state, index, key, batch_N, *, method, model, reference_model, optimiser):
    """One iteration of JEST or Flexi-JEST (Algorithm 2), or of a baseline, inside `pmap`.

    Args:
      state: {'learner': {'params', 'opt'}}, and where the score uses it 'reference': its params,
        or only its 'log_t' and 'b' where its embeddings are cached.
      index: of the step, from 0.
      key: the run's; it is the same at every step (`index` is folded in) and on every device.
      batch_N: this device's share of the super-batch. For 'uniform', of the b pairs, all of which
        it trains on. 'image' uint8 [N, H, W, channels], 'tokens' [N, T]; 'reference_image' and
        'reference_text' [N, E] where they are cached; bool arrays [N] that say what was planted,
        and are only reported on.

    Returns: (state, metrics).
    """
    truth_B = {k: gather(v, AXIS) for k, v in batch_N.items() if v.dtype == bool}
    batch_S = {k: batch_N[k] for k in ("image", "tokens")}
    pick_S, state, metrics = jnp.arange(method.batch_size), dict(state), {}
    if method.selects:
        models = embed_both(state, batch_N, method, model, reference_model,
                            low_patch=method.low_patch)
        # Sorted, so that flexi_jest's [::2] is a random half: the first ones drawn score highest.
        pick_S = jnp.sort(select(jax.random.fold_in(key, index), models, method, model.loss))
        batch_S = {k: devices.take(v, pick_S) for k, v in batch_S.items()}
        metrics["pick"] = pick_S
    state["learner"], metrics["loss"] = update(state["learner"], batch_S, model, optimiser,
                                               method.low_patch if method.cotrain else 0)
    for k, v_B in truth_B.items():
        metrics |= {f"picked_{k}": v_B[pick_S].mean(), f"pool_{k}": v_B.mean()}
    return state, metrics


def select(key, models, method, loss):
    """The b picks of an arm that selects, in the order drawn; inside `pmap`. Independent selection
    is one chunk, which is drawn by the self-scores."""
    n_chunks = 1 if method.name == "independent" else method.n_chunks
    return SAMPLERS[loss](key, models, method.batch_size, n_chunks, kind=method.kind,
                          score_gain=method.score_gain, axis=AXIS)


def step_flops(method, kind, batch_size, B, F, *, F_low=0, F_reference=0, n_chunks=16, embed=64,
               embed_reference=0, cotrain=True, reuse=False):
    """FLOPs of one step by role. A forward of one pair is F, a training step of one pair is 3 F.

    The paper's bill (A.4) is relative to a uniform step, 3 b F. With r = B / b = 5 (f = 0.8):
      jest, the forward of the picked pairs reused (A.4's total)    1 + (r - 1) / 3        233 %
      jest, that forward run again (Algorithm 2, figures 1 and 4)   1 + r / 3              267 %
      either one without cached reference embeddings                r / 3 more       400, 433 %
      flexi_jest with A = F_low / F = 0.25                          (1 + A) / 2 + r A / 3  104 %
      flexi_jest with A = 0.28, the paper's                         111 %, which it prints as 110
    This code runs the forward again. `reuse` bills as if it did not; for flexi_jest it changes
    nothing, since the paper's bill reuses nothing there. A is computed from the two models, never
    quoted: for B/16 and B/32 at 256 px it is 0.29 with 16 text tokens and 0.39 with SigLIP's 64.

    Args:
      F, F_low: `forward_flops` of the learner at its full and at its coarse patch.
      F_reference: of the reference; 0 where its embeddings are cached.
      embed, embed_reference: E of the learner and of the reference; 0: as the learner's.
    """
    b, flexi = batch_size, method == "flexi_jest"
    scores = method in SELECTS
    reused = b if reuse and not flexi else 0
    return {
        "learner": 3 * b * (F + F_low) // 2 if flexi and cotrain else 3 * b * F,  # b is even
        # 'actor' is whatever scores: here it is the learner
        "actor_scoring": (B - reused) * (F_low if flexi else F)
                         if scores and "learner" in SCORES[kind] else 0,
        "selection": sampler_flops(kind, b, B, n_chunks if "jest" in method else 1, embed,
                                   embed_reference) if scores else 0,
        "reference_scoring": B * F_reference if scores and "reference" in SCORES[kind] else 0,
    }


def sampler_flops(kind, b, B, n_chunks, embed, embed_reference=0):
    """FLOPs of a sampler.

    For each model: B self-scores, and two blocks [B, C] for each chunk but the last. An element
    costs 2 E for its product and 5 for scale, shift, softplus and sum. For each chunk, every
    candidate costs noise, a mask and about log2(B) comparisons.
    """
    added = b - chunk_sizes(B, b, n_chunks)[-1]
    width = {"learner": embed, "reference": embed_reference or embed}
    of_models = sum((2 * B * added + B) * (2 * width[name] + 5) for name in SCORES[kind])
    return of_models + n_chunks * B * (3 + B.bit_length())


# ------------------------------------------------------------------------- training, evaluation


def train_stage(stage, state, step, key, load, evaluate, **cost):
    """Trains a stage, from its last checkpoint to its end, and returns the state.

    step: `train_step` as a `devices.pmap`. load(start) yields the sharded batches from step `start`
    on. evaluate(state) -> metrics. cost: what `stage.count` charges for a step.
    """
    state = stage.resume(state)
    for index, batch in stage.batches(load):
        state, metrics = step(state, index, key, batch)
        stage.count(metrics, **cost)
        if stage.evaluates:
            stage.write(evaluate(state))
        stage.save(state)
    return state


def evaluate(params, forwards, pool, batch_size, class_tokens):
    """Retrieval recall at 1, 5 and 10, both ways and their mean, each with its chance level. With
    labels, also the accuracy of the nearest class prompt ('zero_shot').

    forwards: `make_forwards(model)`. class_tokens: [classes, T], or None.
    """
    got, _ = reference.forward_all(params, forwards[0], pool, batch_size)
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
    """`devices.pmap` of (params, sharded batch) -> embeddings and everything in the batch but the
    image, gathered from all devices; and of (params, sharded tokens) -> text embeddings."""
    def both(params, batch):
        embeddings = embed(params, batch, model)
        return {**{k: gather(v, AXIS) for k, v in batch.items() if k != "image"},
                **{k: gather(embeddings[k], AXIS) for k in ("image", "text")}}

    def text(params, tokens):
        return gather(unit(vit.text_apply(params["text"], tokens, model.text)), AXIS)
    return devices.pmap(both, in_axes=(None, 0)), devices.pmap(text, in_axes=(None, 0))


def diagnose(state, key, batch_N, *, method, model, reference_model):
    """What selection does to one super-batch, inside `pmap`.

    Returns: metrics, the self-scores [B] and the arm's own picks [b]. The metrics are the score of
    a uniform, an independent and a joint sub-batch: for learnability, the learner's mean loss of it
    minus the reference's (section 3.1). With `method.low_patch` they also tell how well scores at
    coarse patches agree with scores at full resolution.
    """
    full = embed_both(state, batch_N, method, model, reference_model)
    used = full
    if method.low_patch:
        used = embed_both(state, batch_N, method, model, reference_model,
                          low_patch=method.low_patch)

    def picks(models, how):
        return select(key, models, dataclasses.replace(method, name=how), model.loss)

    def self_score_B(models):
        return gather(self_score(method.kind, models, model.loss), AXIS)

    def value(pick_S):
        def loss(embeddings):
            rows = {k: devices.take(embeddings[k], pick_S) for k in ("image", "text")}
            return devices.mean(contrastive_loss({**embeddings, **rows}, model.loss, AXIS))
        return sum(sign * loss(full[name]) for name, sign in SCORES[method.kind].items())

    joint_S, independent_S = picks(used, "jest"), picks(used, "independent")
    metrics = {"score_uniform": value(jnp.arange(method.batch_size)),
               "score_independent": value(independent_S), "score_joint": value(joint_S)}
    if method.low_patch:
        metrics["rank_correlation"] = spearman(self_score_B(used), self_score_B(full))
        metrics["pick_overlap"] = jnp.isin(joint_S, picks(full, "jest")).mean()
    own_S = independent_S if method.name == "independent" else joint_S
    return metrics, self_score_B(used), own_S


def spearman(x_B, y_B):
    """Rank correlation."""
    rank = lambda v: jnp.argsort(jnp.argsort(v)).astype(jnp.float32)
    return jnp.corrcoef(rank(x_B), rank(y_B))[0, 1]


# ------------------------------------------------------ one seed: the reference, then the arms


def load_batches(pool, seed, batch_size, steps, start, cached=None, selects=False):
    """Yields sharded batches of steps start .. steps - 1, with the reference's embeddings.
    cached: ids -> {'image', 'text'} [n, E], or None. If the step selects from a batch, no pair may
    be in it twice."""
    for batch in data.batches(pool, seed=seed, batch_size=batch_size, start=start, stop=steps,
                              host=devices.host(), wrap=not selects, flags="--filter_ratio"):
        if cached:
            batch |= {f"reference_{k}": v for k, v in cached(batch["id"]).items()}
        yield devices.shard({k: v for k, v in batch.items()
                             if k not in ("id", "label", "caption_hash")})


def embed_pool(path, params, model, forward, pool, batch_size, stop=lambda: False):
    """Embeds a pool by its frozen reference. Returns (np.memmap [len(pool), 2, E] of the images and
    of the captions, seconds). They are kept in the file `path`: see `reference.embed_pool`.

    forward: the first of `make_forwards(model)`."""
    # Small models train at large batches. A large reference need not fit in memory at those.
    batch_size = min(batch_size, 256 * jax.device_count())
    shape = len(pool), 2, embedding_width(model)

    def embed_from(start):
        on_device = jax.tree.map(jnp.asarray, params)  # once, and not with every batch
        left = pool.subset(pool.ids[start:])
        for got, seconds in reference.forward_batches(on_device, forward, left, batch_size):
            yield np.stack([got["image"], got["text"]], 1), seconds
    return reference.embed_pool(path, reference.made_by(params, pool), shape, embed_from, stop=stop)


@dataclasses.dataclass
class Experiment:
    """One seed: what its reference and its arms share."""
    config: flags.Namespace
    run: train.Run
    seed: int
    model: Model
    reference_model: Model
    arms: dict  # name -> `make_arm`; the reference's is among them
    forwards: dict  # model -> `make_forwards`
    whole: data.Pool  # all pairs: what uniform is trained on
    rest: data.Pool  # what the other arms select from: all but the part that is set apart
    curated: data.Pool | None  # that part, or --reference_dataset; None with published weights
    shown_pool: data.Pool | None  # published weights: all pairs as these are shown them
    test_pool: data.Pool
    class_tokens: np.ndarray | None  # `class_prompts`
    about: dict  # see `train.Stage`, of the reference

    def frozen_reference(self, given=None):
        """The weights of the frozen reference, its embeddings of `rest` as a function of ids (None
        if they are computed in each step), and the `train.Totals` of making both. The totals enter
        an arm's bill as its set-up.

        given: (weights, totals) of a reference from elsewhere; without it, one is trained.
        """
        params, cost = given or self.train_reference()
        setup = reference.training_as_setup(cost)
        if self.config.reference_scores == "computed":
            return params, None, setup

        embedded, file = self.rest, f"embeddings-{self.seed}.npy"
        if self.shown_pool:  # each image and caption of the data set once, for all seeds
            embedded, file = self.shown_pool, "embeddings.npy"
        forward, _ = self.forwards[self.reference_model]
        with self.run.stop.awaited():
            array, seconds = embed_pool(
                self.run.path(file), params, self.reference_model, forward, embedded,
                self.config.batch_size, stop=lambda: self.run.stop)
        cached = functools.partial(reference.take, array, embedded, self.rest)
        return params, cached, setup.plus(setup_seconds=seconds, flops={
            "reference_scoring": len(embedded) * forward_flops(self.reference_model)})

    def train_reference(self):
        """(weights, `train.Totals`) of a reference, trained uniformly on `curated`."""
        arm, (_, key_init, key_steps) = self.arms["reference"], self.keys()
        state = {"learner": new_state(key_init, self.reference_model, arm.optimiser)}
        stage = self.run.stage("reference", self.seed, arm.steps, about=self.about)
        b = self.config.batch_size
        load = functools.partial(load_batches, self.curated, self.seed, b, arm.steps)
        state = train_stage(stage, state, arm.step, key_steps, load,
                            self.evaluator(self.reference_model), trained=b, scored=b,
                            flops=arm.flops)
        return state["learner"]["params"], stage.totals

    def run_arm(self, name, frozen):
        """Trains an arm. frozen: `frozen_reference`, for an arm that needs one.

        Returns: its last state; and for an arm that selects `diagnose` of a state on the
        super-batch after the last step, and its `picks.Counts`. For others these are None.
        """
        arm, (key_init, _, key_steps) = self.arms[name], self.keys()
        b, selects = self.config.batch_size, arm.method.selects
        n = super_batch_size(self.config) if selects else b
        pool = {"uniform": self.whole, "curated": self.curated}.get(name, self.rest)
        state = {"learner": new_state(key_init, self.model, arm.optimiser)}
        cached, setup, look, counts = None, train.Totals(), None, None
        if arm.method.needs_reference:
            params, cached, setup = frozen
            state["reference"] = logit_scale_and_bias(params) if cached else params
        load = functools.partial(load_batches, pool, self.seed, n, cached=cached, selects=selects)
        if selects:
            after = next(load(arm.steps + 1, arm.steps))
            look = lambda state: jax.device_get(
                arm.look(state, jax.random.fold_in(key_steps, arm.steps), after))
            counts = picks.Counts(pool, self.seed, n)
        stage = self.run.stage(name, self.seed, arm.steps, spent=setup, counts=counts)
        state = train_stage(stage, state, arm.step, key_steps, functools.partial(load, arm.steps),
                            self.evaluator(self.model, look), trained=b, scored=n, flops=arm.flops)
        return state, look, counts

    def keys(self):
        """Keys for the first weights of the arms, for those of the reference, and for steps."""
        return jax.random.split(jax.random.key(self.seed), 3)

    def evaluator(self, model, look=None):
        """state -> metrics on the test set. `look` adds those of `diagnose`."""
        def metrics(state):
            got = evaluate(state["learner"]["params"], self.forwards[model], self.test_pool,
                           self.config.batch_size, self.class_tokens)
            return got | (look(state)[0] if look else {})
        return metrics


# --------------------------------------------------------------------------------------- main


def super_batch_size(config):
    """B = b / (1 - f), which must be a whole number."""
    B = config.batch_size / (1 - config.filter_ratio)
    flags.require(config, abs(B - round(B)) < 1e-6 * B, "filter_ratio",
                  f"a whole super-batch: batch_size / (1 - filter_ratio) is {B:.3f}")
    return round(B)


def check(config):
    """Raises ValueError, naming the flag, for flags that do not go together, whatever the data."""
    require = functools.partial(flags.require, config)
    flags.require_arms(config, ARMS)
    methods = [ARMS[arm][0] for arm in config.arms]
    if siglip.is_published(config.reference):
        require("curated" not in config.arms, "reference", "'curated' or a checkpoint for the arm "
                "curated, as with published weights no part is set apart; or name --arms without "
                "it")
        require(config.reference_scores == "cached", "reference_scores", "cached, as published "
                "weights (--reference) embed the pool once")
        require(config.loss == "sigmoid", "loss", "sigmoid, which the published weights of "
                "--reference were trained with")
        require(not config.reference_dataset, "reference_dataset", "none, as published weights "
                "(--reference) are not trained here")
    require(config.n_chunks <= config.batch_size, "n_chunks",
            f"at most one chunk per example of the sub-batch, {config.batch_size}")
    flags.require_warmup(config, config.steps, config.active_steps, config.reference_steps)
    devices.divides(batch_size=config.batch_size)
    n = jax.device_count()
    require(super_batch_size(config) % n == 0, "filter_ratio", "a super-batch, batch_size / (1 - "
            f"filter_ratio), that divides over {n} devices")
    require("flexi_jest" not in methods or not config.cotrain or config.batch_size % (2 * n) == 0,
            "batch_size", f"a multiple of {2 * n}: flexi_jest halves each device's share")


def build_model(config, flag, source, vocab):
    """A Model of the size that a flag names, for the images of a source."""
    side = source.image_shape[0]
    flexi = any(ARMS[arm][0] == "flexi_jest" for arm in config.arms)
    for patch in ("patch", "low_patch") if flexi else ("patch",):
        if side % config[patch]:
            raise ValueError(f"--{patch}={config[patch]} does not divide the image side {side}")
    try:
        vit.size(config[flag])
    except ValueError as e:
        raise ValueError(f"--{flag}: {e}") from None
    shared = dict(pool=config.pool, dtype=config.dtype, remat=config.remat)
    channels = source.image_shape[2]
    return Model(config.loss,
                 vit.ViT(config[flag], side, config.patch, config.embed, channels, **shared),
                 vit.Text(config[flag], vocab, config.context, config.embed, **shared))


def make_arm(arm, config, model, reference_model):
    """What an arm is trained with: the number of steps, the `Method`, the optimiser, the FLOPs of a
    step by role, and `train_step` and `diagnose` as a `devices.pmap`. The stage 'reference' counts
    as an arm here, and is a uniform run."""
    name, kind = ARMS["uniform" if arm == "reference" else arm]
    steps, peak = config.steps, config.learning_rate
    if name in SELECTS:
        steps, peak = config.active_steps or steps, config.active_learning_rate or peak
    if arm in ("reference", "curated"):
        name, steps, peak = ("uniform", config.reference_steps or steps,
                             config.reference_learning_rate)
    if arm == "reference":
        model = reference_model
    method = flags.build(Method, config, name=name, kind=kind,
                         low_patch=config.low_patch if name == "flexi_jest" else 0)
    optimiser = adam(peak, steps, warmup=config.warmup, weight_decay=config.weight_decay,
                     b2=config.beta2, clip_norm=config.clip_norm)
    parts = dict(method=method, model=model, reference_model=reference_model)
    cost = (arm_cost(method, config, model, reference_model) if arm != "reference" else
            {"reference_training": 3 * config.batch_size * forward_flops(reference_model)})
    return flags.Namespace(
        steps=steps, method=method, optimiser=optimiser, flops=cost,
        step=devices.pmap(functools.partial(train_step, optimiser=optimiser, **parts),
                          (None, None, None, 0), donate=True),
        look=devices.pmap(functools.partial(diagnose, **parts), (None, None, 0)))


def arm_cost(method, config, model, reference_model, reuse=False):
    """`step_flops` of an arm."""
    computed = config.reference_scores == "computed"
    F_low = forward_flops(cut_at(model, method.low_patch)) if method.low_patch else 0
    return step_flops(
        method.name, method.kind, config.batch_size, super_batch_size(config),
        forward_flops(model), F_low=F_low, n_chunks=config.n_chunks, embed=config.embed,
        embed_reference=embedding_width(reference_model),
        F_reference=forward_flops(reference_model) if computed else 0, cotrain=config.cotrain,
        reuse=reuse)


def iteration_cost(name, cost, cost_if_reused, uniform_cost):
    """A line on what an iteration of an arm costs relative to uniform's. The costs are bills of
    `step_flops`. Forwards of the reference are left out, as in the paper; the sampler is in."""
    total = lambda bill: flops.total_flops(bill, "foundation_dataset")
    as_run, if_reused = (f"{100 * total(c) / total(uniform_cost):.0f} %"
                         for c in (cost, cost_if_reused))
    # they are equal for flexi_jest, and where the learner does not score (easy_reference)
    aside = (f" ({if_reused} if the forward of what is picked were reused)"
             if if_reused != as_run else "")
    return (f"an iteration of {name} costs {as_run} of uniform's{aside}; the sampler is "
            f"{100 * cost['selection'] / total(cost):.1f} % of it")


def class_prompts(config, source, encode):
    """The tokens [classes, T] of --prompt for each class, or None if the data have no labels."""
    if not source.class_names or "label" not in source.read(source.ids[:1]):
        return None
    return np.stack([data.tokenize(config.prompt.replace("{}", name), config.context, encode)
                     for name in source.class_names])


def main():
    config = flags.resolve(PRESETS)
    devices.start(config)
    check(config)
    noise = flags.planted(config, "caption_noise", TOY_NOISE["caption_noise"])
    published = siglip.is_published(config.reference)
    if published:
        reference_model, reference_params, reference_encode = reference.load_published(
            config.reference, config.reference_tokenizer, config.reference_image_size, config.dtype)
    encode, vocab = data.tokenizer(config.tokenizer)
    source, test_source = data.open_splits(config, encode, context=config.context,
                                           need=("caption",), toy_image_size=TOY["image_size"])
    b, B = config.batch_size, super_batch_size(config)
    curated_source = None
    if config.reference_dataset:
        curated_source = data.open_source(
            config.reference_dataset, config.reference_split, data_dir=config.data_dir,
            need=("caption",), image_size=source.image_shape[0], context=config.context,
            encode=encode, toy_knobs=data.toy_knobs(config),
            flags=("reference_dataset", "reference_split"))
        flags.require(config, curated_source.image_shape == source.image_shape,
                      "reference_dataset", "images with as many channels as those of --dataset: "
                      f"{source.image_shape[2]}, not {curated_source.image_shape[2]}")
    set_apart = not (curated_source or published)  # a curated part, from the pool
    n_curated = data.part_size(source.ids, config.curated_fraction,
                               "curated_fraction") if set_apart else 0
    if any(ARMS[arm][0] in SELECTS for arm in config.arms):
        data.check_batch(source.ids[n_curated:], B, f"--filter_ratio={config.filter_ratio}")
    model = build_model(config, "model", source, vocab)
    shown_pool = None
    if published:
        shown_pool = data.Pool(reference.as_shown(
            source, reference_model, reference_encode, dataset=config.dataset, split=config.split,
            data_dir=config.data_dir))
    else:
        reference_model = build_model(
            config, "reference_model" if config.reference_model else "model", source, vocab)
    about = {"model": {k: vit.architecture(getattr(reference_model, k)) for k in ("image", "text")},
             "loss": config.loss, "tokenizer": data.fingerprint(encode)}
    given = {}  # references from elsewhere, by seed
    if published:  # their training was paid for by others: nothing of it is in our bill
        given = dict.fromkeys(config.seeds, (reference_params, train.Totals()))
    elif config.reference != "curated":
        if set_apart and len(config.seeds) > 1 and "{seed}" not in config.reference:
            logging.warning("--reference=%s serves all seeds, and each has its own curated part: "
                            "it may have been trained on pairs that the arms select from",
                            config.reference)
        template = jax.eval_shape(lambda: init(jax.random.key(0), reference_model))
        given = {seed: reference.load(config.reference.replace("{seed}", str(seed)), template,
                                      about) for seed in config.seeds}

    records = {"split": source, "eval_split": test_source, "reference_split": curated_source}
    run = train.Run(config, {k: v.fingerprint for k, v in records.items() if v})
    arms = {arm: make_arm(arm, config, model, reference_model)
            for arm in ("reference", *config.arms)}
    shared = dict(config=config, run=run, model=model, reference_model=reference_model, arms=arms,
                  forwards={m: make_forwards(m) for m in (model, reference_model)},
                  test_pool=data.Pool(test_source), shown_pool=shown_pool, about=about,
                  class_tokens=class_prompts(config, test_source, encode))
    shown, counts = None, {}
    for seed in config.seeds:
        whole = rest = data.Pool(source, noise=noise, field="tokens", seed=seed)
        curated = None
        if curated_source:
            curated = data.Pool(curated_source, field="tokens", seed=seed)
        if set_apart:
            ids, rest_ids = data.split(whole.ids, config.curated_fraction, seed)
            curated, rest = whole.subset(ids), whole.subset(rest_ids)
        if curated and config.reference_noise >= 0:
            curated = curated.replant(config.reference_noise)
        experiment = Experiment(seed=seed, whole=whole, rest=rest, curated=curated, **shared)
        frozen = None
        if any(arm.method.needs_reference for arm in arms.values()):
            frozen = experiment.frozen_reference(given.get(seed))
        for name in config.arms:
            state, look, taken = experiment.run_arm(name, frozen)
            if taken:
                counts[name, seed] = taken
            # picks.png: of the first arm that selects jointly, or else of the first that selects
            if taken and (shown is None or ("jest" in name and "jest" not in shown["arm"])):
                _, score_B, pick_S = look(state)
                shown = dict(arm=name, pool=rest, score_B=score_B, pick_S=pick_S,
                             ids=data.batch_ids(rest.ids, seed, arms[name].steps, B))

    if jax.process_index() == 0:
        picks.write(run.path("picks.csv"), counts)
        report.conclude(config.workdir, picks=shown)
        for name in config.arms:
            if arms[name].method.selects:
                reused = arm_cost(arms[name].method, config, model, reference_model, reuse=True)
                uniform = step_flops("uniform", "learnability", b, B, forward_flops(model))
                print(iteration_cost(name, arms[name].flops, reused, uniform))


if __name__ == "__main__":
    define_flags()
    flags.run(main)
