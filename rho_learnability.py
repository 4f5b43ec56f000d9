"""Bad Students Make Great Teachers: active learning with small proxies (Evans et al., 2312.05328).

Algorithm 1. There are three models: a large learner, a small online proxy that is trained beside
it, and a small reference. The reference is trained first (`Experiment.train_reference`) and then
frozen. With --reference=online it is trained beside the learner. One step:
  1. draw a super-batch of B = ratio * b examples                             `data.batches`
  2. score each by learnability, l_act(x | proxy) - l_act(x | reference)      `score_super_batch`
  3. draw b of them, without replacement, by softmax(gain * score)            `select`
  4. update the learner on them by its own loss, without importance weights   `update`
  5. update the proxy on the same sub-batch, likewise                         `update`
The learner never scores, and the proxy never trains on what was not picked. So scoring costs only
forwards of small models. `step_flops` counts the FLOPs of a step by role. The paper's four levels
of amortisation each charge some of the roles: `LEVELS` in common/flops.py.

There are two tasks. In classification (ClassAct) l_act is the cross-entropy. In image-text training
(ActiveCLIP, ActiveSigLIP) l_act is -z_im.z_txt, while the models train on a contrastive loss. The
arm `rho_loss` is the method's ancestor (Mindermann et al., 2206.07137): the learner itself scores,
and the b highest are taken. In the bill, 'actor' is the model that scores: the proxy or the
learner.

Dimension letters: B super-batch, N a device's share of it, S sub-batch (b) or a device's share of
it, A all rows of a batch on all devices, C classes (in NHWC: channels), E embedding, T tokens,
H W image.

One or two minutes, a core: python rho_learnability.py
The measurements:           docs/results.md has all commands
The paper's model sizes:    python rho_learnability.py --preset=classact_L, or activeclip_B. They
                            have the paper's ratio and reference too, on generated images and a
                            short schedule: give --dataset and --steps

Where the paper is silent there is a flag, for the sampling, the score gain, the scored view and the
age of the proxy's weights among others. docs/differences.md lists them, and where we differ.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import data, devices, flags, picks, reference, report, retrieval, train, vit
from common.devices import AXIS

# Eqs 4-5: a score is a signed sum of the models' l_act. In rho_loss the learner is its own proxy.
SCORES = {"learnability": {"proxy": 1, "reference": -1}, "easy_reference": {"reference": -1},
          "hard_learner": {"proxy": 1}, "rho_loss": {"learner": 1, "reference": -1}}
ARMS = ("uniform", *SCORES, "held_out")  # held_out: the learner, on the reference's part alone
TOY = {"image_size": 16, "examples": 60_000, "tail": 0.0, "radius": 0.38, "domains": 0}
TOY_NOISE = {"label_noise": 0.4, "caption_noise": 0.4}

PAPER = dict(
    arms=["uniform", "learnability"], image_size=224, toy_examples=4096, toy_tail=1.0,
    toy_radius=0.25, proxy="Ti", patch=16, dtype="bfloat16", ratio=2.0, score_gain=1.0,
    batch_size=256, reference="in_domain", reference_scores="computed", reference_steps=0,
    learning_rate=1e-3, proxy_learning_rate=1e-3, reference_learning_rate=1e-3)
PRESETS = {
    # image-text, a table of docs/results.md: 1,000 right captions held out of 100,000 pairs
    "toy_100k": dict(
        arms=["uniform", "learnability", "easy_reference", "held_out"], task="image_text",
        toy_examples=100_000, image_size=32, toy_radius=0.25, caption_noise=0.8,
        held_out_fraction=0.01, learner="64/2/256/4", proxy="32/1/128/2", ratio=10.0,
        score_gain=10.0, steps=5000, active_steps=1000, eval_every=100, learning_rate=5e-4,
        active_learning_rate=2e-3),
    # classification, a table of docs/results.md
    "fashion_mnist": dict(
        arms=["uniform", "learnability"], dataset="fashion_mnist", label_noise=0.4, patch=7,
        learner="96/4/384/4", proxy="32/2/128/2", score_gain=2.0, held_out_fraction=0.2,
        reference_steps=1000, steps=600, active_steps=320, eval_every=30, learning_rate=2e-3),
    # the paper's model sizes, on generated images: give --dataset for real ones
    "classact_L": dict(PAPER, label_noise=0.0, learner="L"),
    "activeclip_B": dict(PAPER, task="image_text", contrastive_loss="softmax", caption_noise=0.0,
                         tokenizer="bytes", learner="B", pool="map", embed=512, context=64),
}


def define_flags():
    f = flags.Group("Method")
    f.names("arms", ["uniform", "learnability", "held_out"], f"comma list of "
            f"{', '.join(ARMS)}; the first is the baseline. held_out is a control: the learner, "
            "trained on the reference's part alone. Selection pays only if it beats that")
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
    f.integer("reference_steps", 600, "[0, inf)", "updates of the reference, and of arm "
              "held_out; 0: as many as --steps")
    f.number("reference_noise", 0.0, "[0, 1] or -1", "label or caption noise of the held-out "
             "part that trains the reference; -1: the pool's, as every other reference has it")
    f.number("held_out_fraction", 0.04, "(0, 1)", "part of the pool that trains the reference "
             "of --reference=held_out")
    f.choice("proxy_init", "random", ["random", "reference"], "initial weights of the proxy")

    f = flags.Group("Models")
    f.choice("task", "classification", ["classification", "image_text"], "ClassAct, or ActiveCLIP "
             "/ ActiveSigLIP")
    f.choice("contrastive_loss", "sigmoid", ["sigmoid", "softmax"], "loss of image_text")
    f.text("learner", "96/2/384/4", f"size: {', '.join(vit.SIZES)}, or width/depth/mlp/heads")
    f.text("proxy", "48/2/192/3", "size of the online proxy and of the reference, which "
           "must match (the paper: a pair that does not is worse)")
    f.integer("patch", 8, "[1, inf)", "patch side in pixels")
    f.choice("pool", "gap", ["gap", "map"], "mean of the tokens, or attention pooling")
    f.integer("embed", 64, "[1, inf)", "width of the joint embedding of image_text")
    f.text("tokenizer", "words", "of image_text: 'words', 'bytes', or a sentencepiece model file")
    f.integer("context", 20, "[2, inf)", "tokens per caption; longer ones are cut")
    f.choice("dtype", "float32", ["float32", "bfloat16"], "type of the activations")
    f.switch("remat", False, "recompute blocks in the backward pass: memory for time")

    f = flags.Group("Optimisation")
    f.integer("steps", 1000, "[1, inf)", "updates of the learner (reference and held_out: "
              "--reference_steps)")
    f.integer("active_steps", 0, "[0, inf)", "updates of the arms that select, whose schedule "
              "ends there; 0: as many as --steps")
    f.integer("batch_size", 128, "[1, inf)", "b: examples per update")
    f.number("learning_rate", 3e-3, "(0, inf)", "peak, of AdamW; linear warm-up, cosine to 0")
    f.number("active_learning_rate", 0.0, "[0, inf)", "peak, in the arms that select and in "
             "held_out; 0: --learning_rate. Where most captions are wrong, uniform needs a lower "
             "peak than they")
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

    flags.define_shared("rho_learnability", toy=TOY, toy_noise=TOY_NOISE)


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
    params = {"image": vit.vit_init(key_image, model.image)}
    if model.loss == "cross_entropy":
        params["image"]["head"] = jax.tree.map(jnp.zeros_like, params["image"]["head"])
        return params
    params |= {"text": vit.text_init(key_text, model.text), "log_t": jnp.log(10.0)}
    if model.loss == "sigmoid":
        params["b"] = jnp.array(-10.0)
    return params


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
    """Rows of length 1. The small number under the root keeps the gradient of a row of zeros
    finite."""
    return x_NE * jax.lax.rsqrt(jnp.square(x_NE).sum(-1, keepdims=True) + 1e-12)


# ------------------------------------------------------------------------------ scores (eqs 4-5)


def scoring_loss(out, batch):
    """The paper's l_act(x | theta), per example [N], from a model's outputs.

    For a class it is the cross-entropy -log p(y | x). For a pair it is -z_im . z_txt: the
    contrastive loss of a pair would depend on the rest of the batch.
    """
    if isinstance(out, tuple):
        return -jnp.einsum("ne,ne->n", *out, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])


def score(kind, loss_B):
    """Score [B] of each example, by `SCORES`; the higher, the sooner it is picked. Learnability is
    high for what the proxy does not know yet and the reference finds easy.

    loss_B: {'proxy', 'reference' or 'learner': l_act [B]}, as far as the kind needs them.
    """
    return sum(sign * loss_B[model] for model, sign in SCORES[kind].items())


def select(key, score_B, n, score_gain=1.0, sampling="gumbel"):
    """Indices [n] into the super-batch, sorted. The key must be the same on every device.

    'gumbel' draws n <= B without replacement. Each draw has the probabilities softmax(gain * score)
    over those that are left. Taking the n largest of gain * score + Gumbel noise does exactly that.
    With n = B the super-batch comes out unchanged. 'replacement' makes n independent draws. 'topk'
    takes the n highest scores, which is the limit of large gains. A score that is NaN is picked
    last, where top_k would pick it first.
    """
    if sampling not in ("gumbel", "replacement", "topk"):
        raise ValueError(f"sampling {sampling!r}: want 'gumbel', 'replacement' or 'topk'")
    # in float32: in bfloat16 Gumbel noise has so few values that there are ties
    logit_B = score_gain * jnp.nan_to_num(score_B.astype(jnp.float32), nan=-jnp.inf)
    if sampling == "replacement":
        return jnp.sort(jax.random.categorical(key, logit_B, shape=(n,)))
    if sampling == "gumbel":
        logit_B += jax.random.gumbel(key, logit_B.shape)
    return jnp.sort(jax.lax.top_k(logit_B, n)[1])


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
    own_S = devices.places(image_SE)
    if model.loss == "sigmoid":
        return sigmoid_loss(image_SE, gather(text_SE), own_S, params["log_t"], params["b"])
    return 0.5 * (softmax_loss(image_SE, gather(text_SE), own_S, params["log_t"])
                  + softmax_loss(text_SE, gather(image_SE), own_S, params["log_t"]))


def gather(x):
    """The rows [N, ...] of every device, in order, [A, ...], on every device; differentiable."""
    return jax.lax.all_gather(x, AXIS, tiled=True)


def softmax_loss(x_SE, y_AE, own_S, log_t):
    """One direction of InfoNCE (CLIP): cross-entropy of each row of x against all rows of y, of
    which row own_S is the right one."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE)
    return optax.softmax_cross_entropy_with_integer_labels(logits_SA, own_S).mean()


def sigmoid_loss(x_SE, y_AE, own_S, log_t, b):
    """SigLIP: mean over rows i of x of the sum over rows j of y of -log sigmoid(sign (t x_i.y_j +
    b)), where t = exp(log_t). The sign is + for row own_S of y and - for all others."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE) + b
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


def augment(key, index_N, image_NHWC, kind):
    """A random view of each image. It depends only on `key` and on the image's index in the
    super-batch, and not on the number of devices."""
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
      state: {'learner', 'proxy', 'reference'}, each {'params', 'opt'}, as far as the arm needs it.
        A 'reference' without 'opt' is frozen. 'stale' holds the proxy's weights of the last
        `staleness` steps, the oldest first.
      key: the run's; it is the same at every step (`index` is folded in) and on every device.
      batch_N: this device's share of the super-batch; for the arm 'uniform', of the b examples,
        all of which it trains on. 'image' uint8 [N, H, W, C]; 'label' [N] or 'tokens' [N, T];
        where the reference's scores are cached, 'reference_loss' [N]; bool arrays [N] that say what
        was planted, and are only reported on.
      learner, proxy: `Model`. optimisers: {'learner', 'proxy', 'reference'} -> optax optimiser.
    """
    key_select, key_view = jax.random.split(jax.random.fold_in(key, index))
    truth_B = {k: gather(v) for k, v in batch_N.items() if v.dtype == bool}
    clean_N = {k: v for k, v in batch_N.items() if v.dtype != bool}
    view_N = {**clean_N, "image": augment(key_view, devices.places(clean_N["image"]),
                                          clean_N["image"], method.augment)}

    # Uniform trains on all that it gets. The others score the super-batch and pick. Scores are
    # gathered from all devices, images are not.
    pick_S, batch_S, metrics = jnp.arange(method.batch_size), view_N, {}
    if method.arm != "uniform":
        state, score_B = score_super_batch(
            state, view_N if method.score_view == "train" else clean_N, method=method,
            learner=learner, proxy=proxy, optimisers=optimisers)
        sampling = "topk" if method.arm == "rho_loss" else method.sampling
        pick_S = select(key_select, score_B, method.batch_size, method.score_gain, sampling)
        batch_S = {k: devices.take(v, pick_S) for k, v in view_N.items()}
        metrics = {"score_pool": score_B.mean(), "score_pool_sd": score_B.std(),
                   "score_picked": score_B[pick_S].mean(), "score": score_B, "pick": pick_S}

    # Both models train on what was picked, and on nothing else.
    state = dict(state)
    state["learner"], loss, _ = update(state["learner"], batch_S, learner, optimisers["learner"],
                                       method.label_smoothing)
    if "proxy" in state:
        state["proxy"], metrics["proxy_loss"], _ = update(
            state["proxy"], batch_S, proxy, optimisers["proxy"], method.proxy_label_smoothing)
    for k, v_B in truth_B.items():
        metrics |= {f"picked_{k}": v_B[pick_S].mean(), f"pool_{k}": v_B.mean()}
    return state, {"loss": loss, **metrics}


def score_super_batch(state, batch_N, *, method, learner, proxy, optimisers):
    """(state, score [B]), the same on every device. The state changes where the proxy's weights are
    kept for later (staleness), and where the reference is trained on the super-batch (online): on
    the view that is scored."""
    state, uses, loss_N = dict(state), SCORES[method.arm], {}
    if "learner" in uses:
        loss_N["learner"] = scoring_loss(outputs(state["learner"]["params"], batch_N, learner),
                                         batch_N)
    if "proxy" in uses:
        params = state["proxy"]["params"]
        if method.staleness:
            oldest = jax.tree.map(lambda w: w[0], state["stale"])
            state["stale"] = jax.tree.map(lambda w, new: jnp.concatenate([w[1:], new[None]]),
                                          state["stale"], params)
            params = oldest
        loss_N["proxy"] = scoring_loss(outputs(params, batch_N, proxy), batch_N)
    if "reference_loss" in batch_N:  # cached
        loss_N["reference"] = batch_N["reference_loss"]
    elif "opt" in state.get("reference", {}):  # online: one forward both scores and trains
        state["reference"], _, out = update(state["reference"], batch_N, proxy,
                                            optimisers["reference"], method.proxy_label_smoothing)
        loss_N["reference"] = scoring_loss(out, batch_N)
    elif "reference" in uses:
        loss_N["reference"] = scoring_loss(outputs(state["reference"]["params"], batch_N, proxy),
                                           batch_N)
    return state, gather(score(method.arm, loss_N))


def step_flops(arm, b, B, F_L, F_p, reference_scores):
    """FLOPs of one step by role: the paper's cost model (a training step is three forwards), and
    the selection, which the paper leaves out.

    With r = B / b, learnability costs 3 F_L + (2 r + 3) F_p for each example that the learner
    trains on if the reference's scores are computed: at the paper's r = 2, 3 F_L + 7 F_p. Uniform
    costs 3 F_L. A frozen reference is paid for once and not by the step: 3 b F_p for each update of
    its training and F_p for each cached score, in `Experiment.frozen_reference`.

    F_L, F_p: `forward_flops` of learner and proxy. reference_scores: 'cached', 'computed',
    'online', or None for an arm that has no reference.
    """
    uses = SCORES.get(arm, ())
    return {
        "learner": 3 * b * F_L,
        "actor_scoring": B * F_L * ("learner" in uses) + B * F_p * ("proxy" in uses),
        "actor_training": 3 * b * F_p * ("proxy" in uses),
        # for each candidate: subtract, multiply by the gain, add noise, about log2(B) comparisons
        "selection": B * (3 + B.bit_length()) if uses else 0,
        "reference_scoring": B * F_p * (reference_scores == "computed"),
        # online: the forward of the training step is the one that scores
        "reference_training": 3 * B * F_p * (reference_scores == "online"),
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


def evaluate(params, forward, pool, batch_size):
    """Metrics on all of a pool. forward: `make_forward` of the model.

    Classification: accuracy and cross-entropy. Image-text: recall at 1 and 10 of the right caption
    from an image and of the right image from a caption, the mean of the two, and its chance level.
    A caption that reads the same as the right one is right too.
    """
    got, _ = reference.forward_all(params, forward, pool, batch_size)
    out = got["out"]
    if isinstance(out, tuple):
        return retrieval.recalls(*out, got["caption_hash"], ks=(1, 10))
    return {"accuracy": float((out.argmax(1) == got["label"]).mean()),
            "eval_loss": float(np.mean(scoring_loss(out, got)))}


def make_forward(model):
    """`devices.pmap` of (params, sharded batch) -> the outputs as 'out' and everything in the batch
    but the image, gathered from all devices."""
    def forward(params, batch):
        return {**{k: gather(v) for k, v in batch.items() if k != "image"},
                "out": jax.tree.map(gather, outputs(params, batch, model))}
    return devices.pmap(forward, in_axes=(None, 0))


# ------------------------------------------------------ one seed: the reference, then the arms


def initial_state(arm, key, learner, proxy, optimisers, *, reference_scores=None, params=None,
                  proxy_init="random", staleness=0):
    """The state of `train_step` before step 0. The learner is the same for every arm.

    reference_scores: 'computed' (by the frozen `params`, in the step), 'online' (the reference is
    trained in the step), 'cached' (its losses come with the batch), or None.
    """
    key_learner, key_proxy, key_reference = jax.random.split(key, 3)
    state = {"learner": new_state(key_learner, learner, optimisers["learner"])}
    if reference_scores == "online":
        state["reference"] = new_state(key_reference, proxy, optimisers["reference"])
    if reference_scores == "computed":
        state["reference"] = {"params": params}
    if "proxy" in SCORES.get(arm, ()):
        state["proxy"] = new_state(key_proxy, proxy, optimisers["proxy"])
        if proxy_init == "reference":
            state["proxy"]["params"] = params
        if staleness:
            state["stale"] = jax.tree.map(lambda x: jnp.stack([x] * staleness),
                                          state["proxy"]["params"])
    return state


def load_batches(pool, seed, batch_size, steps, start, losses=None, selects=False):
    """Yields sharded batches of steps start .. steps - 1, with the reference's cached losses. If
    the step selects from a batch, no example may be in it twice."""
    for batch in data.batches(pool, seed=seed, batch_size=batch_size, start=start, stop=steps,
                              host=devices.host(), wrap=not selects, flags="--ratio"):
        if losses is not None:
            batch["reference_loss"] = losses[np.searchsorted(pool.ids, batch["id"])]
        yield devices.shard({k: v for k, v in batch.items() if k not in ("id", "caption_hash")})


@dataclasses.dataclass
class Experiment:
    """One seed: what its reference and its arms share."""
    config: flags.Namespace
    run: train.Run
    seed: int
    learner: Model
    proxy: Model  # also the reference's architecture
    arms: dict  # name -> `make_arm`; the reference's is among them
    forwards: dict  # model -> `make_forward`
    whole: data.Pool  # all examples: what uniform is trained on
    rest: data.Pool  # without a held-out part: what the arms select from
    of_reference: data.Pool  # what the reference is trained on
    test_pool: data.Pool
    about: dict  # see `train.Stage`, of the reference

    def frozen_reference(self, given=None):
        """The weights of the frozen reference, its losses of `rest` (None if they are computed in
        each step), and the `train.Totals` of making both. The totals enter an arm's bill as its
        set-up.

        given: (weights, totals) of a reference from elsewhere; without it, one is trained.
        """
        params, cost = given or self.train_reference()
        setup = reference.training_as_setup(cost)
        if self.config.reference_scores == "computed":
            return params, None, setup

        def losses():
            got, seconds = reference.forward_all(params, self.forwards[self.proxy], self.rest,
                                                 self.config.batch_size)
            return {"loss": np.asarray(scoring_loss(got["out"], got))}, seconds
        arrays, seconds = reference.cached(self.run.path(f"scores-{self.seed}.npz"),
                                           reference.made_by(params, self.rest), losses)
        return params, arrays["loss"], setup.plus(setup_seconds=seconds, flops={
            "reference_scoring": len(self.rest) * forward_flops(self.proxy)})

    def train_reference(self):
        """(weights, `train.Totals`) of a reference, trained uniformly on its pool."""
        arm, (key_init, key_steps) = self.arms["reference"], self.keys()
        key = jax.random.split(key_init, 3)[2]  # that of an online one, see `initial_state`
        state = {"learner": new_state(key, self.proxy, arm.optimisers["learner"])}
        stage = self.run.stage("reference", self.seed, arm.steps, about=self.about)
        b = self.config.batch_size
        load = functools.partial(load_batches, self.of_reference, self.seed, b, arm.steps)
        state = train_stage(
            stage, state, arm.step, key_steps, load, self.evaluator(self.proxy), trained=b,
            scored=b, flops={"reference_training": 3 * b * forward_flops(self.proxy)})
        return state["learner"]["params"], stage.totals

    def run_arm(self, name, frozen):
        """Trains an arm. frozen: `frozen_reference`, or None if no arm needs one.

        Returns: for an arm that selects, a function that gives what it would pick next, as
        picks.png shows it, and its `picks.Counts`. For others these are None.
        """
        config, arm, (key_init, key_steps) = self.config, self.arms[name], self.keys()
        b, selects = config.batch_size, name in SCORES
        n = super_batch_size(config) if selects else b
        kind, params, losses, setup = None, None, None, train.Totals()
        if "reference" in SCORES.get(name, ()):
            kind = "online" if config.reference == "online" else config.reference_scores
            if frozen:
                params, losses, setup = frozen
        # Uniform has the whole pool: a part that is held out is a cost of the method.
        pool = {"uniform": self.whole, "held_out": self.of_reference}.get(name, self.rest)
        state = initial_state(name, key_init, self.learner, self.proxy, arm.optimisers,
                              reference_scores=kind, params=params, proxy_init=config.proxy_init,
                              staleness=config.staleness)
        load = functools.partial(load_batches, pool, self.seed, n, losses=losses, selects=selects)
        counts = picks.Counts(pool, self.seed, n) if selects else None
        stage = self.run.stage(name, self.seed, arm.steps, spent=setup, counts=counts)
        state = train_stage(
            stage, state, arm.step, key_steps, functools.partial(load, arm.steps),
            self.evaluator(self.learner), trained=b, scored=n, flops=step_flops(
                name, b, n, forward_flops(self.learner), forward_flops(self.proxy), kind))

        def next_picks():
            batch = next(load(arm.steps + 1, arm.steps))
            _, got = arm.step(state, np.int32(arm.steps), key_steps, batch)
            got = jax.device_get(got)
            return dict(arm=name, pool=pool, ids=data.batch_ids(pool.ids, self.seed, arm.steps, n),
                        score_B=got["score"], pick_S=got["pick"])
        return (next_picks, counts) if selects else (None, None)

    def keys(self):
        """Keys for first weights, and for steps."""
        return jax.random.split(jax.random.key(self.seed))

    def evaluator(self, model):
        """params -> metrics on the test set."""
        return functools.partial(evaluate, forward=self.forwards[model], pool=self.test_pool,
                                 batch_size=self.config.batch_size)


# --------------------------------------------------------------------------------------- main


def super_batch_size(config):
    """B = ratio * b, which must be a whole number."""
    B = config.ratio * config.batch_size
    flags.require(config, abs(B - round(B)) < 1e-6 * B, "ratio",
                  f"a whole super-batch: ratio * batch_size is {B:.3f}")
    return round(B)


def check(config):
    """Raises ValueError, naming the flag, for flags that do not go together, whatever the data."""
    require = functools.partial(flags.require, config)
    flags.require_arms(config, ARMS)
    B = super_batch_size(config)
    require(config.score_view == "clean" or config.reference_scores == "computed" or
            config.augment == "none" or not needs_frozen_reference(config),
            "reference_scores",
            "'computed' with --score_view=train: a view that changes cannot be cached")
    require(config.proxy_init == "random" or (config.reference != "online" and
            "hard_learner" not in config.arms), "proxy_init",
            "'random' with an online reference or arm hard_learner: they have no trained one")
    unread = "label_noise" if config.task == "image_text" else "caption_noise"
    require(config[unread] == -1, unread, f"-1, since --task={config.task} does not read it")
    require("held_out" not in config.arms or config.reference == "held_out", "reference",
            "'held_out' with the arm of that name; or name --arms without it")
    require(config.task == "classification" or config.augment != "shift_flip", "augment", "'none' "
            "or 'shift' with captions, in which a flip would make 'left' and 'right' false")
    flags.require_warmup(config, config.steps, config.active_steps, config.reference_steps)
    devices.divides(batch_size=config.batch_size)
    n = jax.device_count()
    require(B % n == 0, "ratio", f"a super-batch (ratio * batch_size) that divides over {n} "
            f"devices: a multiple of {n}")


def needs_frozen_reference(config):
    return config.reference != "online" and any(
        "reference" in SCORES.get(arm, ()) for arm in config.arms)


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
    """What an arm is trained with: the number of steps, the optimisers, and `train_step` as a
    `devices.pmap`. The stage 'reference' counts as an arm here. It trains the proxy's architecture
    uniformly."""
    method = flags.build(Method, config, arm=arm if arm in SCORES else "uniform")
    steps, peak = config.steps, config.learning_rate
    if arm in SCORES:
        steps, peak = config.active_steps or steps, config.active_learning_rate or peak
    if arm in ("held_out", "reference"):
        steps, peak = config.reference_steps or steps, config.active_learning_rate or peak
    if arm == "reference":
        learner, peak = proxy, config.reference_learning_rate
        method = dataclasses.replace(method, label_smoothing=config.proxy_label_smoothing)
    optimiser = functools.partial(adamw, steps=steps, warmup=config.warmup,
                                  weight_decay=config.weight_decay)
    optimisers = {"learner": optimiser(peak), "proxy": optimiser(config.proxy_learning_rate),
                  "reference": optimiser(config.reference_learning_rate)}
    step = functools.partial(train_step, method=method, learner=learner, proxy=proxy,
                             optimisers=optimisers)
    return flags.Namespace(steps=steps, optimisers=optimisers,
                           step=devices.pmap(step, (None, None, None, 0), donate=True))


def main():
    config = flags.resolve(PRESETS)
    devices.start(config)
    check(config)
    text = config.task == "image_text"
    needed, field, noise_flag = (("caption", "tokens", "caption_noise") if text else
                                 ("label", "label", "label_noise"))
    noise = flags.planted(config, noise_flag, TOY_NOISE[noise_flag])
    encode, vocab = data.tokenizer(config.tokenizer)
    source, test_source = data.open_splits(config, encode, context=config.context if text else 0,
                                           need=(needed,), toy_image_size=TOY["image_size"])
    B, held_out = super_batch_size(config), config.reference == "held_out"
    n_held_out = data.part_size(source.ids, config.held_out_fraction,
                                "held_out_fraction") if held_out else 0
    if set(config.arms) & set(SCORES):
        data.check_batch(source.ids[n_held_out:], B, f"--ratio={config.ratio:g}")
    learner, proxy = build_models(config, source, vocab)
    about = {"model": {"image": vit.architecture(proxy.image)}}
    if text:
        about["model"]["text"] = vit.architecture(proxy.text)
        about["tokenizer"] = data.fingerprint(encode)
    given = {}  # references from elsewhere, by seed
    if config.reference not in ("in_domain", "held_out", "online"):
        template = jax.eval_shape(lambda: init(jax.random.key(0), proxy))
        given = {seed: reference.load(config.reference.replace("{seed}", str(seed)), template,
                                      about) for seed in config.seeds}

    run = train.Run(config, {"split": source.fingerprint, "eval_split": test_source.fingerprint})
    arms = {arm: make_arm(arm, config, learner, proxy) for arm in ("reference", *config.arms)}
    shared = dict(config=config, run=run, learner=learner, proxy=proxy, arms=arms,
                  forwards={model: make_forward(model) for model in (learner, proxy)},
                  test_pool=data.Pool(test_source), about=about)
    shown, counts = None, {}
    for seed in config.seeds:
        whole = rest = of_reference = data.Pool(source, noise=noise, field=field, seed=seed)
        if held_out:
            ids, rest_ids = data.split(whole.ids, config.held_out_fraction, seed)
            of_reference, rest = whole.subset(ids), whole.subset(rest_ids)
            if config.reference_noise >= 0:
                of_reference = of_reference.replant(config.reference_noise)
        experiment = Experiment(seed=seed, whole=whole, rest=rest, of_reference=of_reference,
                                **shared)
        frozen = None
        if needs_frozen_reference(config):
            frozen = experiment.frozen_reference(given.get(seed))
        for name in config.arms:
            next_picks, taken = experiment.run_arm(name, frozen)
            if taken:
                counts[name, seed] = taken
                shown = shown or next_picks()  # picks.png: of the first arm that selects

    if jax.process_index() == 0:
        picks.write(run.path("picks.csv"), counts)
        report.conclude(config.workdir, picks=shown)


if __name__ == "__main__":
    define_flags()
    flags.run(main)
