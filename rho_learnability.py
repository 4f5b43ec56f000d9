"""Bad Students Make Great Teachers: active learning with small proxies (Evans et al., 2312.05328).

Algorithm 1. There are three models: a large learner, a small online proxy that is trained beside
it, and a small reference. The reference is trained first (`frozen_reference` in `main`) and then
frozen. One step:
  1. draw a super-batch of B = ratio * b examples                             `data.batches`
  2. score each by learnability, l_act(x | proxy) - l_act(x | reference)      `score_super_batch`
  3. draw b of them, without replacement, by softmax(gain * score)            `select`
  4. update the learner on them by its own loss, without importance weights   `update`
  5. update the proxy on the same sub-batch, likewise                         `update`
The learner never scores, and the proxy never trains on what was not picked. So scoring costs only
forwards of small models. `step_flops` counts the FLOPs of a step, and `LEVELS` in common/flops.py
says which of them the paper's four levels of amortisation charge.

There are two tasks. In classification (ClassAct) l_act is the cross-entropy. In image-text training
(ActiveCLIP, ActiveSigLIP) l_act is -z_im.z_txt, while the models train on a contrastive loss. The
arm `rho_loss` is the method's ancestor (Mindermann et al., 2206.07137): the learner itself scores,
and the b highest are taken. In `state`, in metrics and in the bill 'actor' is whatever scores: the
proxy, or the learner in `rho_loss`.

Dimension letters: B super-batch, N a device's share of it, S sub-batch (b) or a device's share of
it, A all rows of a batch on all devices, C classes (in NHWC: channels), E embedding, T tokens,
H W image.

A minute on two CPU cores:  python rho_learnability.py
The measurements:           --preset=fashion_mnist, or emoji; full commands in docs/results.md
The paper's model sizes:    python rho_learnability.py --preset=classact_L, or activeclip_B
                            (generated images, a short schedule: give --dataset and --steps)

Where the paper is silent there is a flag (sampling, score gain, scored view, staleness). Where we
differ from it is listed in docs/differences.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import data, devices, flags, picks, reference, report, retrieval, train, vit
from common.devices import AXIS

SELECTS = ("learnability", "easy_reference", "hard_learner", "rho_loss")
ARMS = ("uniform", *SELECTS, "held_out")  # held_out: the learner, on the reference's part alone
NEEDS_PROXY = ("learnability", "hard_learner")  # the online proxy scores, and is trained
NEEDS_REFERENCE = ("learnability", "easy_reference", "rho_loss")
TOY = {"image_size": 16, "examples": 60_000, "tail": 0.0, "radius": 0.38, "domains": 0}
TOY_NOISE = {"label_noise": 0.4, "caption_noise": 0.4}

PRESETS = {
    # the tables of docs/results.md
    "fashion_mnist": dict(
        arms=["uniform", "learnability"], dataset="fashion_mnist", label_noise=0.4, patch=7,
        learner="96/4/384/4", proxy="32/2/128/2", score_gain=2.0, held_out_fraction=0.2,
        reference_steps=1000, steps=600, active_steps=320, eval_every=30, learning_rate=2e-3),
    "emoji": dict(
        arms=["uniform", "learnability"], dataset="emoji", task="image_text",
        contrastive_loss="softmax", caption_noise=0.5, image_size=32, tokenizer="bytes",
        context=24, learner="64/2/256/4", proxy="mu", ratio=4.0, score_gain=10.0,
        held_out_fraction=0.33, steps=800, active_steps=400, reference_steps=800, eval_every=50,
        learning_rate=1e-3),
    # the paper's model sizes, on generated images: give --dataset for real ones
    "classact_L": dict(
        arms=["uniform", "learnability"], label_noise=0.0, image_size=224, toy_examples=4096,
        toy_tail=1.0, toy_radius=0.25, learner="L", proxy="Ti", patch=16,
        dtype="bfloat16", ratio=2.0, score_gain=1.0, steps=1000, batch_size=256,
        reference="in_domain", reference_scores="computed", reference_steps=100,
        reference_noise=-1.0, learning_rate=1e-3, proxy_learning_rate=1e-3,
        reference_learning_rate=1e-3),
    "activeclip_B": dict(
        arms=["uniform", "learnability"], task="image_text", contrastive_loss="softmax",
        caption_noise=0.0, image_size=224, toy_examples=4096, toy_tail=1.0, toy_radius=0.25,
        tokenizer="bytes", learner="B", proxy="Ti", patch=16, pool="map", embed=512, context=64,
        dtype="bfloat16", ratio=2.0, score_gain=1.0, steps=1000, batch_size=256,
        reference="in_domain", reference_scores="computed", reference_steps=100,
        reference_noise=-1.0, learning_rate=1e-3, proxy_learning_rate=1e-3,
        reference_learning_rate=1e-3),
}


def define_flags():
    f = flags.Group("Method")
    f.names("arms", ["uniform", "learnability", "held_out"], f"of {', '.join(ARMS)}; the "
            "first of the list is the baseline. held_out is a control: the learner, trained on the "
            "reference's held-out part alone. Selection is worth its cost only if it beats that")
    f.number("ratio", 5.0, "[1, inf)", "B/b: super-batch over sub-batch (paper: 2 throughout)")
    f.number("score_gain", 5.0, "(0, inf)", "examples are drawn by softmax(score_gain * score): 1 "
             "/ temperature (the paper prints none). Scores of image_text lie in [-2, 2], so that "
             "a gain of 1 hardly selects there. --sampling=topk is the limit of large gains")
    f.choice("sampling", "gumbel", ["gumbel", "replacement", "topk"], "'gumbel': without "
             "replacement; 'replacement': with it; 'topk': the b highest scores (rho_loss: always)")
    f.choice("score_view", "clean", ["clean", "train"], "score the plain image, or the augmented "
             "one that will be trained on")
    f.integer("staleness", 0, "[0, inf)", "score with the proxy's weights from this many steps ago")
    f.text("reference", "held_out", "what the reference is trained on. 'in_domain' (ClassAct): "
           "first, on the whole pool; 'held_out' (ClassAct-HO): first, on a part of the pool, from "
           "which no arm then selects; 'online' (ClassAct-Online): beside the learner, on each "
           "super-batch that it scores; or the checkpoint directory of a trained reference "
           "('{seed}' is filled in), with which no part is held out")
    f.choice("reference_scores", "cached", ["cached", "computed"], "score the pool once, by "
             "example id, or compute the reference's scores anew in each step")
    f.integer("reference_steps", 600, "[0, inf)", "updates of the reference, and of the "
              "control on its data; 0: as many as --steps")
    f.number("reference_noise", 0.0, "[-1, 1]", "label or caption noise of the reference's "
             "training set; -1: the pool's, as --reference=in_domain must have it")
    f.number("held_out_fraction", 0.04, "(0, 1)", "part of the pool that trains the reference "
             "of --reference=held_out")
    f.choice("actor_init", "random", ["random", "reference"], "initial weights of the proxy")

    f = flags.Group("Models")
    f.choice("task", "classification", ["classification", "image_text"], "ClassAct, or ActiveCLIP "
             "/ ActiveSigLIP")
    f.choice("contrastive_loss", "sigmoid", ["sigmoid", "softmax"], "loss of image_text")
    f.text("learner", "96/2/384/4", f"size: {', '.join(vit.SIZES)}, or width/depth/mlp/heads")
    f.text("proxy", "48/2/192/3", "size of the online proxy and of the reference")
    f.integer("patch", 8, "[1, inf)", "patch side in pixels")
    f.choice("pool", "gap", ["gap", "map"], "mean of the tokens, or attention pooling")
    f.integer("embed", 64, "[1, inf)", "width of the joint embedding of image_text")
    f.text("tokenizer", "words", "of image_text: 'words', 'bytes', or a sentencepiece model file")
    f.integer("context", 20, "[2, inf)", "tokens per caption; longer ones are cut")
    f.choice("dtype", "float32", ["float32", "bfloat16"], "type of the activations")
    f.switch("remat", False, "recompute blocks in the backward pass: memory for time")

    f = flags.Group("Optimisation")
    f.integer("steps", 1000, "[1, inf)", "updates of the learner")
    f.integer("active_steps", 0, "[0, inf)", "updates in the arms that select; their learning rate "
              "is 0 at that step. 0: as many as --steps")
    f.integer("batch_size", 128, "[1, inf)", "b: examples per update")
    f.number("learning_rate", 3e-3, "(0, inf)", "peak, of AdamW; linear warm-up, cosine to 0")
    f.number("proxy_learning_rate", 4e-3, "[0, inf)", "peak, of the online proxy")
    f.number("reference_learning_rate", 4e-3, "(0, inf)", "peak, of the reference (paper: larger "
             "when it is online)")
    f.number("weight_decay", 1e-4, "[0, inf)", "decoupled, on the weights of dense layers")
    f.number("warmup", 0.05, "[0, 1)", "fraction of the steps")
    f.number("label_smoothing", 0.1, "[0, 1)", "of the learner's cross-entropy")
    f.number("proxy_label_smoothing", 0.0, "[0, 1)", "of the proxy's and the reference's training; "
             "the score's loss has none")
    f.choice("augment", "none", ["none", "shift", "shift_flip"], "shift by up to an eighth of the "
             "side; flip left and right")

    flags.define_shared("rho_learnability", toy=TOY, toy_noise=TOY_NOISE, eval_every=100)


# ------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Model:
    """A classifier (loss 'cross_entropy') or two towers (loss 'sigmoid' or 'softmax')."""
    loss: str
    image: vit.ViT
    text: vit.Text = None


def init(key, model):
    """Parameters.

    A classifier's head starts at 0: its loss is log C for every example, so that at step 0 the
    proxy's part of the score is the same for every example. For pairs t = exp(log_t) starts at 10
    with both losses, as in SigLIP (in CLIP it starts at 1 / 0.07 and is capped at 100). The sigmoid
    loss has a bias b too, which starts at -10. In the softmax loss a bias would cancel.
    """
    key_image, key_text = jax.random.split(key)
    if model.loss == "cross_entropy":
        params = {"image": vit.vit_init(key_image, model.image)}
        params["image"]["head"] = jax.tree.map(jnp.zeros_like, params["image"]["head"])
        return params
    bias = {"sigmoid": {"b": jnp.array(-10.0)}, "softmax": {}}[model.loss]
    return {"image": vit.vit_init(key_image, model.image),
            "text": vit.text_init(key_text, model.text), "log_t": jnp.log(10.0), **bias}


def forward_flops(model):
    """FLOPs (a multiply-add is two) of one forward of one example: the paper's F."""
    return vit.vit_flops(model.image) + (vit.text_flops(model.text) if model.text else 0)


def outputs(params, batch, model):
    """Logits [N, C], or the pair of L2-normalised embeddings ([N, E], [N, E])."""
    image_NHWC = batch["image"].astype(jnp.float32) / 127.5 - 1
    y = vit.vit_apply(params["image"], image_NHWC, model.image)
    if model.loss == "cross_entropy":
        return y
    return unit(y), unit(vit.text_apply(params["text"], batch["tokens"], model.text))


def unit(x_NE):
    """Rows of length 1. The small number is under the root, where it keeps the gradient of a row
    of zeros finite."""
    return x_NE * jax.lax.rsqrt(jnp.square(x_NE).sum(-1, keepdims=True) + 1e-12)


# ------------------------------------------------------------------------------ scores (eqs 4-5)


def scoring_loss(out, batch):
    """The paper's l_act(x | theta), per example [N], from a model's outputs.

    For a class it is the cross-entropy -log p(y | x). For a pair it is -z_im . z_txt: the
    contrastive loss of a pair would depend on the rest of the batch.
    """
    if isinstance(out, tuple):
        return -jnp.einsum("ne,ne->n", *out)
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])


def score(kind, proxy_loss_B, reference_loss_B):
    """Score [B] of each example; the higher, the sooner it is picked. A kind may ignore one loss.

    hard_learner: l(x | proxy). easy_reference: -l(x | reference). learnability: their sum, high for
    what the proxy does not know yet and the reference finds easy.
    """
    return {"learnability": lambda: proxy_loss_B - reference_loss_B,
            "rho_loss": lambda: proxy_loss_B - reference_loss_B,  # the learner stands for the proxy
            "easy_reference": lambda: -reference_loss_B,
            "hard_learner": lambda: proxy_loss_B}[kind]()


def select(key, score_B, n, score_gain=1.0, sampling="gumbel"):
    """Indices [n] into the super-batch. They are sorted, so that with ratio 1 the sub-batch is the
    super-batch unchanged. Requires n <= B, and the same key on every device.

    'gumbel' draws n without replacement. Each draw has the probabilities softmax(gain * score) over
    those that are left. Taking the n largest of gain * score + Gumbel noise does exactly that.
    'replacement' makes n independent draws. 'topk' takes the n highest scores, which is the limit
    of large gains. A score that is NaN is picked last, where top_k would pick it first.
    """
    if sampling not in ("gumbel", "replacement", "topk"):
        raise ValueError(f"sampling {sampling!r}: want 'gumbel', 'replacement' or 'topk'")
    # float32: Gumbel noise in bfloat16 takes few values, and ties
    logit_B = score_gain * jnp.nan_to_num(score_B.astype(jnp.float32), nan=-jnp.inf)
    if sampling == "replacement":
        return jnp.sort(jax.random.categorical(key, logit_B, shape=(n,)))
    if sampling == "gumbel":
        logit_B += jax.random.gumbel(key, logit_B.shape)
    return jnp.sort(jax.lax.top_k(logit_B, n)[1])


def augment(key, index_N, image_NHWC, kind):
    """A random view of each image. It depends only on `key` and on the image's index in the
    super-batch, so that any number of devices draws the same."""
    if kind not in ("none", "shift", "shift_flip"):
        raise ValueError(f"kind {kind!r}: want 'none', 'shift' or 'shift_flip'")
    if kind == "none":
        return image_NHWC
    H, W, C = image_NHWC.shape[1:]
    reach = H // 8

    def one(index, image_HWC):
        key_shift, key_flip = jax.random.split(jax.random.fold_in(key, index))
        top, left = jax.random.randint(key_shift, (2,), 0, 2 * reach + 1)
        padded = jnp.pad(image_HWC, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        view = jax.lax.dynamic_slice(padded, (top, left, 0), (H, W, C))
        flip = (kind == "shift_flip") & jax.random.bernoulli(key_flip)
        return jnp.where(flip, view[:, ::-1], view)

    return jax.vmap(one)(index_N, image_NHWC)


# ------------------------------------------------------------------------------------- losses


def training_loss(out, params, batch, model, smoothing=0.0):
    """This device's part of the training loss of a sharded batch: the mean over its rows.

    Its gradient, averaged over the devices, is the gradient of the whole batch's loss, with the
    negatives of all devices. For pairs: inside `pmap` only.
    """
    if model.loss == "cross_entropy":
        target_SC = optax.smooth_labels(jax.nn.one_hot(batch["label"], out.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(out, target_SC).mean()
    image_SE, text_SE = out
    offset = jax.lax.axis_index(AXIS) * len(image_SE)  # where this device's rows stand in the batch
    if model.loss == "sigmoid":
        return sigmoid_loss(image_SE, gather(text_SE), params["log_t"], params["b"], offset)
    return 0.5 * (softmax_loss(image_SE, gather(text_SE), params["log_t"], offset)
                  + softmax_loss(text_SE, gather(image_SE), params["log_t"], offset))


def gather(x):
    """The rows [N, ...] of every device, in order, [A, ...], on every device; differentiable."""
    return jax.lax.all_gather(x, AXIS, tiled=True)


def softmax_loss(x_SE, y_AE, log_t, offset=0):
    """One direction of InfoNCE (CLIP): cross-entropy of row i of x against all A rows of y. The
    right one for row i is row offset + i."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE)
    own_S = offset + jnp.arange(len(x_SE))
    return optax.softmax_cross_entropy_with_integer_labels(logits_SA, own_S).mean()


def sigmoid_loss(x_SE, y_AE, log_t, b, offset=0):
    """SigLIP: mean over rows i of the sum over j of -log sigmoid(sign (t x_i.y_j + b)), where
    t = exp(log_t). The sign is + for i's own row of y, which is row offset + i, and - for all
    others."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE) + b
    own_S = offset + jnp.arange(len(x_SE))
    sign_SA = 2 * jax.nn.one_hot(own_S, len(y_AE)) - 1
    return -jax.nn.log_sigmoid(sign_SA * logits_SA).sum(1).mean()


# --------------------------------------------------------------------------- Algorithm 1, one step


@dataclasses.dataclass(frozen=True)
class Method:
    """The settings of one arm that `train_step` needs. The flags of the same names explain them."""
    arm: str
    batch_size: int  # b, on all devices together
    score_gain: float = 1.0
    sampling: str = "gumbel"
    staleness: int = 0
    score_view: str = "clean"
    augment: str = "none"
    label_smoothing: float = 0.1
    proxy_label_smoothing: float = 0.0


def adamw(peak, steps, *, warmup=0.05, weight_decay=1e-4):
    """AdamW with a linear warm-up from 0 and a cosine that is 0 at `steps`. Only the weights of
    dense layers decay (leaves named 'w'): not biases, norms, embeddings and positions."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, round(warmup * steps), steps, 0.0)
    dense = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "w", params)
    return optax.adamw(schedule, weight_decay=weight_decay, mask=dense)


def new_state(key, model, optimiser):
    params = init(key, model)
    return {"params": params, "opt": optimiser.init(params)}


def update(state, batch, model, optimiser, smoothing):
    """Inside `pmap`, one step of {'params', 'opt'} on a sharded batch. Also returns the whole
    batch's loss and this device's outputs, both from before the step."""
    def loss_of(params):
        out = outputs(params, batch, model)
        return training_loss(out, params, batch, model, smoothing), out

    (loss, out), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
    loss, grads = devices.mean((loss, grads))
    updates, opt = optimiser.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss, out


def train_step(state, index, key, batch_N, *, method, learner, proxy, optimisers):
    """Algorithm 1: (state, metrics) after step `index` (from 0), inside `pmap`.

    Args:
      state: {'learner', 'actor' (the proxy), 'reference'}, each {'params', 'opt'}, as far as the
        arm needs it. A 'reference' without 'opt' is frozen. 'stale' holds the proxy's weights of
        the last `staleness` steps.
      key: the run's; it is the same at every step (`index` is folded in) and on every device.
      batch_N: this device's share of the super-batch. For the arm 'uniform', of the sub-batch: it
        trains on all of it. 'image' uint8 [N, H, W, C]; 'label' [N] or 'tokens' [N, T]; where the
        reference's scores are cached, 'reference_loss' [N]; bool arrays [N] that say what was
        planted, and are only reported on.
      learner, proxy: `Model`. optimisers: {'learner', 'actor', 'reference'} -> optax optimiser.
    """
    key_select, key_view = jax.random.split(jax.random.fold_in(key, index))
    truth_B = {k: gather(v) for k, v in batch_N.items() if v.dtype == bool}
    batch_N = {k: v for k, v in batch_N.items() if v.dtype != bool}
    if method.score_view == "train":
        batch_N["image"] = augment(key_view, devices.places(batch_N), batch_N["image"],
                                   method.augment)

    # Score the super-batch and pick. Scores are gathered from all devices, images are not.
    pick_S, batch_S, metrics = jnp.arange(method.batch_size), batch_N, {}
    if method.arm != "uniform":
        state, score_B = score_super_batch(state, index, batch_N, method=method, learner=learner,
                                           proxy=proxy, optimisers=optimisers)
        pick_S = pick(key_select, score_B, method)
        batch_S = {k: devices.take(v, pick_S) for k, v in batch_N.items()}
        metrics = {"score_pool": score_B.mean(), "score_pool_sd": score_B.std(),
                   "score_picked": score_B[pick_S].mean(), "pick": pick_S}
    if method.score_view == "clean":
        batch_S["image"] = augment(key_view, pick_S[devices.places(batch_S)], batch_S["image"],
                                   method.augment)

    # Both models train on what was picked, and on nothing else.
    state = dict(state)
    state["learner"], loss, _ = update(state["learner"], batch_S, learner, optimisers["learner"],
                                       method.label_smoothing)
    if "actor" in state:
        state["actor"], metrics["actor_loss"], _ = update(
            state["actor"], batch_S, proxy, optimisers["actor"], method.proxy_label_smoothing)
    for k, v_B in truth_B.items():
        metrics |= {f"picked_{k}": v_B[pick_S].mean(), f"pool_{k}": v_B.mean()}
    return state, {"loss": loss, **metrics}


def pick(key, score_B, method):
    """`select` by the settings of an arm. RHO-LOSS always takes the highest scores."""
    sampling = "topk" if method.arm == "rho_loss" else method.sampling
    return select(key, score_B, method.batch_size, method.score_gain, sampling)


def score_super_batch(state, index, batch_N, *, method, learner, proxy, optimisers):
    """(state, score [B]), the same on every device. The state changes where the proxy's weights are
    kept for later (staleness), and where the reference is trained on the super-batch (online)."""
    state, arm = dict(state), method.arm
    proxy_N = reference_N = jnp.zeros(len(batch_N["image"]))
    if arm in NEEDS_PROXY:
        params = state["actor"]["params"]
        if method.staleness:
            # 'stale' is a ring: slot i holds the weights of the last step that was i mod staleness
            slot, ring = index % method.staleness, state["stale"]
            state["stale"] = jax.tree.map(lambda r, new: r.at[slot].set(new), ring, params)
            params = jax.tree.map(lambda r: r[slot], ring)
        proxy_N = scoring_loss(outputs(params, batch_N, proxy), batch_N)
    if arm == "rho_loss":
        proxy_N = scoring_loss(outputs(state["learner"]["params"], batch_N, learner), batch_N)
    if "reference_loss" in batch_N:  # cached
        reference_N = batch_N["reference_loss"]
    elif "opt" in state.get("reference", {}):  # online: one forward both scores and trains
        state["reference"], _, out = update(state["reference"], batch_N, proxy,
                                            optimisers["reference"], method.proxy_label_smoothing)
        reference_N = scoring_loss(out, batch_N)
    elif arm in NEEDS_REFERENCE:
        # If the reference is missing, this fails. A loss of zero would silently turn learnability
        # into hard_learner.
        reference_N = scoring_loss(outputs(state["reference"]["params"], batch_N, proxy), batch_N)
    return state, score(arm, gather(proxy_N), gather(reference_N))


def step_flops(arm, batch_size, ratio, F_L, F_p, reference):
    """FLOPs of one step by role: the paper's cost model (a training step is three forwards), and
    the selection, which the paper leaves out.

    F_L, F_p: `forward_flops` of learner and proxy. reference: 'cached', 'computed', 'online', or
    None for an arm that has none. A frozen reference's training (3 b F_p an update) and its cached
    scores (F_p an example) are no part of a step: they are charged once, in `frozen_reference`.
    """
    b, B = batch_size, round(batch_size * ratio)
    has_proxy = arm in NEEDS_PROXY
    return {
        "learner": 3 * b * F_L,
        "actor_scoring": B * F_L if arm == "rho_loss" else B * F_p if has_proxy else 0,
        "actor_training": 3 * b * F_p if has_proxy else 0,
        # for each candidate: subtract, multiply by the gain, add noise, about log2(B) comparisons
        "selection": B * (3 + max(B, 2).bit_length()) if arm in SELECTS else 0,
        "reference_scoring": B * F_p if reference == "computed" else 0,
        # online: trained on the super-batch, the same forward scores it
        "reference_training": 3 * B * F_p if reference == "online" else 0,
    }


# ------------------------------------------------------------------------- training, evaluation


def train_stage(stage, state, step, key, load, evaluate, **cost):
    """Trains a stage, from its last checkpoint to its end, and returns the state.

    step: `train_step` as a `devices.pmap`. load(start) yields the sharded batches from step `start`
    on. evaluate(params) -> metrics of the learner. cost: what `stage.count` charges for a step.
    """
    state = stage.resume(state)
    for index, batch in stage.batches(load):
        state, metrics = step(state, index, key, batch)
        stage.count(metrics, **cost)
        if stage.evaluates:
            stage.write(evaluate(state["learner"]["params"]))
        stage.save(state)
    return state


def evaluate(params, forward, pool, batch_size, model):
    """Metrics on all of a pool; `forward` is `make_forward(model)`.

    Classification: accuracy and cross-entropy. Image-text: recall at 1 and 10 of the right caption
    from an image and of the right image from a caption, and the mean of the two. A caption that
    reads the same as the right one is right too.
    """
    got, _ = reference.forward_all(params, forward, pool, batch_size)
    out = got["out"]
    if model.loss == "cross_entropy":
        return {"accuracy": float((out.argmax(1) == got["label"]).mean()),
                "eval_loss": float(np.mean(scoring_loss(out, got)))}
    return retrieval.recalls(*out, got["caption_hash"], ks=(1, 10))


def make_forward(model):
    """`devices.pmap` of (params, sharded batch) -> the outputs as 'out' and everything in the batch
    but the image, gathered from all devices."""
    def forward(params, batch):
        return {**{k: gather(v) for k, v in batch.items() if k != "image"},
                "out": jax.tree.map(gather, outputs(params, batch, model))}
    return devices.pmap(forward, in_axes=(None, 0))


def score_after(state, index, key, batch_N, method, learner, proxy, optimisers):
    """(scores [B], picks [b]) of a super-batch after training, for picks.png; inside `pmap`. It
    scores the plain images, also with score_view 'train'."""
    _, score_B = score_super_batch(state, index, batch_N, method=method, learner=learner,
                                   proxy=proxy, optimisers=optimisers)
    return score_B, pick(jax.random.fold_in(key, index), score_B, method)


# --------------------------------------------------------------------------------------- main


def check(config, explicit=()):
    """Raises ValueError, naming the flag, for flags that do not go together, whatever the data.
    explicit: the flags that were given."""
    require = functools.partial(flags.require, config)
    flags.require_arms(config, ARMS)
    B = config.ratio * config.batch_size
    require(B.is_integer(), "ratio", f"a whole super-batch: ratio * batch_size is {B}")
    require(config.score_view == "clean" or config.reference_scores == "computed" or
            config.augment == "none" or config.reference == "online", "reference_scores",
            "'computed' with --score_view=train: a view that changes cannot be cached")
    require(config.reference != "in_domain" or config.reference_noise == -1, "reference_noise",
            "-1 with --reference=in_domain: otherwise the reference is shown the true labels of "
            "the very examples that it scores")
    require(config.actor_init == "random" or config.reference != "online", "actor_init",
            "'random' with an online reference")
    require(config.actor_init == "random" or "hard_learner" not in config.arms, "actor_init",
            "'random' with arm hard_learner, which has no reference")
    unread = "label_noise" if config.task == "image_text" else "caption_noise"
    if unread in explicit:
        raise ValueError(f"--{unread} is not read by --task={config.task}: give --label_noise to "
                         "classification, --caption_noise to image_text")
    require("held_out" not in config.arms or config.reference == "held_out", "reference",
            "'held_out' with the arm of that name")
    flags.require_warmup(config, config.steps, config.active_steps, config.reference_steps)
    devices.divides(batch_size=config.batch_size)
    n = jax.device_count()
    require(round(B) % n == 0, "ratio", f"a super-batch (ratio * batch_size) that divides over {n} "
            f"devices: a multiple of {n}")


def build_models(config, source, vocab):
    """(learner, proxy): the reference has the proxy's architecture."""
    image_size = source.image_shape[0]
    if image_size % config.patch:
        raise ValueError(f"--patch={config.patch} does not divide the image side {image_size}")
    text = config.task == "image_text"
    shared = dict(pool=config.pool, dtype=config.dtype, remat=config.remat)
    n_out = config.embed if text else len(source.class_names)

    def model(flag):
        try:
            vit.size(config[flag])
        except ValueError as e:
            raise ValueError(f"--{flag}: {e}") from None
        return Model(
            config.contrastive_loss if text else "cross_entropy",
            vit.ViT(config[flag], image_size, config.patch, n_out, source.image_shape[2], **shared),
            vit.Text(config[flag], vocab, config.context, n_out, **shared) if text else None)
    return model("learner"), model("proxy")


def make_arm(arm, config, learner, proxy):
    """What an arm is trained with: the number of steps, the `Method`, the optimisers, and
    `train_step` and `score_after` as a `devices.pmap`.

    The stage 'reference' counts as an arm here. It trains the proxy's architecture uniformly.
    """
    method = flags.build(Method, config, arm=arm)
    steps, peak = (arm in SELECTS and config.active_steps) or config.steps, config.learning_rate
    if arm == "held_out":
        steps, method = config.reference_steps or config.steps, dataclasses.replace(
            method, arm="uniform")
    if arm == "reference":
        steps, peak = config.reference_steps or config.steps, config.reference_learning_rate
        method = dataclasses.replace(method, arm="uniform",
                                     label_smoothing=config.proxy_label_smoothing)
        learner = proxy
    rule = functools.partial(adamw, steps=steps, warmup=config.warmup,
                             weight_decay=config.weight_decay)
    optimisers = {"learner": rule(peak), "actor": rule(config.proxy_learning_rate),
                  "reference": rule(config.reference_learning_rate)}
    parts = dict(method=method, learner=learner, proxy=proxy, optimisers=optimisers)
    return flags.Namespace(
        steps=steps, optimisers=optimisers, method=method,
        step=devices.pmap(functools.partial(train_step, **parts), (None, None, None, 0), True),
        score=devices.pmap(functools.partial(score_after, **parts), (None, None, None, 0)))


def initial_state(arm, key, learner, proxy, optimisers, *, reference=None, params=None,
                  actor_init="random", staleness=0):
    """The state of `train_step` before step 0. The learner is the same for every arm.

    reference: 'computed' (frozen `params`, scored in the step), 'online' (trained in it), 'cached'
    (its losses come with the batch), or None.
    """
    key_learner, key_proxy, key_reference = jax.random.split(key, 3)
    state = {"learner": new_state(key_learner, learner, optimisers["learner"])}
    if reference == "online":
        state["reference"] = new_state(key_reference, proxy, optimisers["reference"])
    if reference == "computed":
        state["reference"] = {"params": params}
    if arm in NEEDS_PROXY:
        state["actor"] = new_state(key_proxy, proxy, optimisers["actor"])
        if actor_init == "reference" and params is not None:
            state["actor"]["params"] = params
        if staleness:
            state["stale"] = jax.tree.map(lambda x: jnp.stack([x] * staleness),
                                          state["actor"]["params"])
    return state


def load_batches(pool, seed, batch_size, steps, start, losses=None, selects=False):
    """Yields sharded batches of steps start .. steps - 1, with the reference's cached losses. If
    the step selects from a batch, no example may be in it twice."""
    for batch in data.batches(pool, seed=seed, batch_size=batch_size, start=start, stop=steps,
                              host=devices.host(), wrap=not selects, flags="--ratio"):
        if losses is not None:
            batch["reference_loss"] = losses[np.searchsorted(pool.ids, batch["id"])]
        yield devices.shard({k: v for k, v in batch.items() if k not in ("id", "caption_hash")})


def main():
    config, explicit = flags.resolve(PRESETS)
    devices.start(config)
    check(config, explicit)
    text = config.task == "image_text"
    needed, field, noise_flag = (("caption", "tokens", "caption_noise") if text else
                                 ("label", "label", "label_noise"))
    noise = flags.planted(config, noise_flag, TOY_NOISE[noise_flag])
    encode, vocab = data.tokenizer(config.tokenizer)
    source, test_source = data.open_splits(config, encode, context=config.context if text else 0,
                                           need=(needed,), toy_image_size=TOY["image_size"])
    b, B = config.batch_size, round(config.ratio * config.batch_size)
    held_out = config.reference == "held_out"
    if set(config.arms) & set(SELECTS):
        n_held_out = round(config.held_out_fraction * len(source.ids)) if held_out else 0
        data.check_batch(source.ids[n_held_out:], B, f"--ratio={config.ratio:g}")
    learner, proxy = build_models(config, source, vocab)
    about = {"model": {k: vit.architecture(v) for k, v in vars(proxy).items() if k != "loss" and v},
             **({"tokenizer": data.fingerprint(encode)} if text else {})}
    template = jax.eval_shape(lambda: init(jax.random.key(0), proxy))
    given = {}  # references from elsewhere, by seed
    if config.reference not in ("in_domain", "held_out", "online"):
        given = {seed: reference.load(flags.for_seed(config.reference, seed), template, about)
                 for seed in config.seeds}

    run = train.Run(config, {"split": source.fingerprint, "eval_split": test_source.fingerprint})
    arms = {arm: make_arm(arm, config, learner, proxy) for arm in ("reference", *config.arms)}
    forwards = {model: make_forward(model) for model in (learner, proxy)}
    test_pool = data.Pool(test_source)
    evaluators = {model: lambda params, model=model: evaluate(
        params, forwards[model], test_pool, b, model) for model in forwards}
    F_L, F_p = forward_flops(learner), forward_flops(proxy)

    def frozen_reference(seed, pool_of_reference, pool, key_init, key_steps):
        """Weights, cached losses of `pool` (or None), and `train.Totals` of the frozen reference.
        They enter an arm's bill as its set-up."""
        params, cost = given.get(seed, (None, None))
        if params is None:
            arm = arms["reference"]
            state = {"learner": new_state(jax.random.split(key_init, 3)[2], proxy,
                                          arm.optimisers["learner"])}
            stage = run.stage("reference", seed, arm.steps, about=about)
            load = functools.partial(load_batches, pool_of_reference, seed, b, arm.steps)
            state = train_stage(stage, state, arm.step, key_steps, load, evaluators[proxy],
                                trained=b, scored=b, flops={"reference_training": 3 * b * F_p})
            params, cost = state["learner"]["params"], stage.totals
        setup = train.Totals(setup_seconds=cost.seconds,
                             flops={"reference_training": sum(cost.flops.values())})
        if config.reference_scores == "computed":
            return params, None, setup

        def losses():
            got, seconds = reference.forward_all(params, forwards[proxy], pool, b)
            return {"loss": np.asarray(scoring_loss(got["out"], got))}, seconds
        arrays, seconds = reference.cached(run.path(f"scores-{seed}.npz"),
                                           reference.made_by(params, pool), losses)
        return params, arrays["loss"], setup.plus(
            setup_seconds=seconds, flops={"reference_scoring": len(pool) * F_p})

    shown, counts = None, {}
    for seed in config.seeds:
        whole = data.Pool(source, noise=noise, field=field, seed=seed)
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        train_pool, pool_of_reference = whole, whole
        if held_out:
            ids, rest_ids = data.split(whole.ids, config.held_out_fraction, seed)
            pool_of_reference, train_pool = whole.subset(ids), whole.subset(rest_ids)
        if config.reference_noise >= 0:
            pool_of_reference = pool_of_reference.replant(config.reference_noise)
        frozen = None
        if set(config.arms) & set(NEEDS_REFERENCE) and config.reference != "online":
            frozen = frozen_reference(seed, pool_of_reference, train_pool, key_init, key_steps)

        for name in config.arms:
            arm = arms[name]
            params, losses, setup, kind = None, None, train.Totals(), None
            if name in NEEDS_REFERENCE:
                kind = "online" if frozen is None else config.reference_scores
                params, losses, setup = frozen or (None, None, setup)
            state = initial_state(name, key_init, learner, proxy, arm.optimisers, reference=kind,
                                  params=params, actor_init=config.actor_init,
                                  staleness=config.staleness)
            # The baseline has the whole pool: a part that is held out is a cost of the method.
            pool, n = {"uniform": (whole, b), "held_out": (pool_of_reference, b)}.get(
                name, (train_pool, B))
            load = functools.partial(load_batches, pool, seed, n, losses=losses,
                                     selects=name in SELECTS)
            if name in SELECTS:
                counts[name, seed] = picks.Counts(pool, seed, n)
            stage = run.stage(name, seed, arm.steps, spent=setup, counts=counts.get((name, seed)))
            state = train_stage(stage, state, arm.step, key_steps,
                                functools.partial(load, arm.steps), evaluators[learner],
                                trained=b, scored=n,
                                flops=step_flops(name, b, config.ratio, F_L, F_p, kind))
            if shown is None and name in SELECTS:  # the super-batch after the last step
                batch = next(load(arm.steps + 1, arm.steps))
                score_B, pick_S = jax.device_get(arm.score(state, np.int32(arm.steps), key_steps,
                                                           batch))
                shown = dict(arm=name, pool=pool, ids=data.batch_ids(pool.ids, seed, arm.steps, B),
                             score_B=score_B, pick_S=pick_S)

    if jax.process_index() == 0:
        picks.write(run.path("picks.csv"), counts)
        report.conclude(config.workdir, picks=shown)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
