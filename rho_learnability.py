"""Bad Students Make Great Teachers: active learning with small proxies (Evans et al., 2312.05328).

Algorithm 1. A large learner L, a small online proxy o, a small frozen reference r; per step
  1. draw a super-batch of B = ratio * b examples (in epochs; the paper: i.i.d.)  `data.batches`
  2. score each: learnability = l_act(x | o) - l_act(x | r)          `score_super_batch`, `score`
  3. draw b of them without replacement with probability softmax(gain * score)    `select`
  4. update L on the sub-batch with its own loss, no importance weights           `update`
  5. update o on the same sub-batch, likewise                                     `update`
The learner never scores and the proxy never trains on what was not picked, so that scoring costs
what a small model costs; `step_flops` keeps the bill. Two tasks: classification (ClassAct), where
l_act is the cross-entropy, and image-text (ActiveCLIP, ActiveSigLIP), where it is -z_im.z_txt while
the models train on a contrastive loss. Arm `rho_loss` is the ancestor (Mindermann et al.,
2206.07137): there the learner itself scores, and the b highest are taken. In the code 'actor' is o,
and `proxy` the architecture that o and r share.

Dimension letters: B super-batch, N a device's share of it, S sub-batch (b) or a device's share, A
the rows of all devices, C classes (in NHWC: channels), E embedding, H W image.

A minute on a CPU:        python rho_learnability.py --steps=300
README's measurements:    python rho_learnability.py --preset=fashion_mnist, or emoji: see there
The paper's model sizes:  python rho_learnability.py --preset=classact_L, or activeclip_B (generated
                          images and a short schedule: give --dataset and --steps)

Where the paper is silent there is a flag (sampling, score gain, scored view, staleness); where we
differ: README, "Where we differ from the paper, or it is silent".
"""

import dataclasses
import functools
import os

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import checkpoint, data, devices, report, retrieval, run, stage, vit
from common.devices import AXIS

ARMS = ("uniform", "learnability", "easy_reference", "hard_learner", "rho_loss")
NEEDS_ACTOR = ("learnability", "hard_learner")  # the online proxy scores, and is trained
NEEDS_REFERENCE = ("learnability", "easy_reference", "rho_loss")

PRESETS = {
    # minutes on two CPU cores
    "toy": dict(
        label_noise=0.4, caption_noise=0.4, learner="64/2/256/4", proxy="mu", ratio=4.0,
        score_gain=2.0, reference="held_out", held_out_fraction=0.25, reference_noise=0.0,
        steps=400, reference_steps=800, learning_rate=2e-3, proxy_learning_rate=4e-3,
        reference_learning_rate=4e-3),
    # the README's tables
    "fashion_mnist": dict(
        dataset="fashion_mnist", label_noise=0.4, patch=7, learner="96/4/384/4",
        proxy="32/2/128/2", ratio=5.0, score_gain=2.0, reference="held_out",
        held_out_fraction=0.2, reference_noise=0.0, reference_steps=1000, steps=600,
        active_steps=320, eval_every=30, learning_rate=2e-3, proxy_learning_rate=4e-3,
        reference_learning_rate=4e-3),
    "emoji": dict(
        dataset="emoji", task="image_text", contrastive_loss="softmax", caption_noise=0.5,
        image_size=32, patch=8, context=24, learner="64/2/256/4", proxy="mu", ratio=4.0,
        score_gain=10.0, reference="held_out", held_out_fraction=0.33, reference_noise=0.0,
        steps=800, active_steps=400, reference_steps=800, eval_every=50, learning_rate=1e-3,
        proxy_learning_rate=4e-3, reference_learning_rate=4e-3),
    # the paper's model sizes, on generated images: give --dataset for real ones
    "classact_L": dict(
        image_size=224, toy_examples=4096, learner="L", proxy="Ti", patch=16, pool="gap",
        dtype="bfloat16", ratio=2.0, score_gain=1.0, sampling="gumbel", steps=1000,
        batch_size=256, reference_scores="computed", reference_steps=100),
    "activeclip_B": dict(
        task="image_text", contrastive_loss="softmax", image_size=224, toy_examples=4096,
        learner="B", proxy="Ti", patch=16, pool="map", embed=512, dtype="bfloat16", ratio=2.0,
        score_gain=1.0, sampling="gumbel", steps=1000, batch_size=256,
        reference_scores="computed", reference_steps=100),
}


def define_flags():
    run.define_flags("rho_learnability")
    flags.adopt_module_key_flags(run)  # so that --help shows them too
    f = flags
    # method
    f.DEFINE_list("arms", ["uniform", "learnability"], f"of {', '.join(ARMS)}; the first is the "
                  "baseline")
    f.DEFINE_float("ratio", 2.0, "B/b: super-batch over sub-batch (paper: 2 throughout)")
    f.DEFINE_float("score_gain", 1.0, "examples are drawn from softmax(score_gain * score): "
                   "1 / temperature (the paper prints none). The scores of image_text differ by "
                   "2 or less, so that a gain of 1 hardly selects there")
    f.DEFINE_enum("sampling", "gumbel", ["gumbel", "replacement", "topk"], "'gumbel': without "
                  "replacement; 'replacement'; 'topk': the b highest scores (rho_loss: always)")
    f.DEFINE_enum("score_view", "clean", ["clean", "train"], "the view that is scored: the plain "
                  "image, or the augmented one that will be trained on")
    f.DEFINE_integer("staleness", 0, "age in steps of the proxy's weights that score")
    f.DEFINE_string("reference", "in_domain", "'in_domain' (ClassAct): trained first on the pool; "
                    "'held_out' (ClassAct-HO): on a part of it, which the arms that select leave "
                    "out; 'online' (ClassAct-Online): beside the learner, on the whole "
                    "super-batch as it is scored; or a checkpoint directory of such a stage "
                    "('{seed}' is filled in)")
    f.DEFINE_enum("reference_scores", "cached", ["cached", "computed"], "'cached': the pool is "
                  "scored once, by example id; 'computed': each super-batch as it comes")
    f.DEFINE_string("score_cache", None, "file of cached reference scores; '{seed}' is filled in "
                    "(default: in the work directory)")
    f.DEFINE_integer("reference_steps", 0, "updates of the reference; 0: as many as --steps")
    f.DEFINE_float("reference_noise", -1.0, "label or caption noise of the reference's training "
                   "set; -1: the pool's")
    f.DEFINE_float("held_out_fraction", 0.5, "part of the pool that is the held-out reference's")
    f.DEFINE_enum("actor_init", "random", ["random", "reference"], "first weights of the proxy")
    # model
    f.DEFINE_enum("task", "classification", ["classification", "image_text"], "ClassAct, or "
                  "ActiveCLIP / ActiveSigLIP")
    f.DEFINE_enum("contrastive_loss", "sigmoid", ["sigmoid", "softmax"], "of image_text")
    f.DEFINE_string("learner", "toy", f"size: {', '.join(vit.SIZES)}, or width/depth/mlp/heads")
    f.DEFINE_string("proxy", "mu", "size of the online proxy and of the reference")
    f.DEFINE_integer("patch", 8, "patch side in pixels")
    f.DEFINE_enum("pool", "gap", ["gap", "map"], "mean of the tokens, or attention pooling")
    f.DEFINE_integer("embed", 64, "width of the joint embedding of image_text")
    f.DEFINE_integer("context", 64, "tokens (bytes) per caption; longer ones are cut")
    f.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the activations")
    f.DEFINE_bool("remat", False, "recompute blocks in the backward pass: memory for time")
    # optimisation
    f.DEFINE_integer("steps", 1000, "updates of the learner")
    f.DEFINE_integer("active_steps", 0, "updates in every arm but uniform; an arm's schedule "
                     "ends with it; 0: as many as --steps")
    f.DEFINE_integer("batch_size", 128, "b: examples per update")
    f.DEFINE_float("learning_rate", 1e-3, "peak, of AdamW; linear warm-up, cosine to 0")
    f.DEFINE_float("proxy_learning_rate", 1e-3, "peak, of the online proxy")
    f.DEFINE_float("reference_learning_rate", 1e-3, "peak, of the reference (paper: larger when it "
                   "is online)")
    f.DEFINE_float("weight_decay", 1e-4, "decoupled, on the dense layers' weights")
    f.DEFINE_float("warmup", 0.05, "fraction of the steps")
    f.DEFINE_float("label_smoothing", 0.1, "of the learner's cross-entropy")
    f.DEFINE_float("proxy_label_smoothing", 0.0, "of the proxy's and the reference's; the score's "
                   "loss has none")
    f.DEFINE_enum("augment", "none", ["none", "shift", "shift_flip"], "shift by up to an eighth of "
                  "the side; flip left and right")


# ------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Model:
    """A classifier (loss 'cross_entropy') or two towers (loss 'sigmoid' or 'softmax')."""
    loss: str
    image: vit.ViT
    text: vit.Text = None


def init(key, model):
    """Parameters. A classifier's head starts at 0: its loss is log C for every example, so that o
    has no say yet. t = exp(log_t) starts at 10 and b at -10, SigLIP's, for both losses (CLIP: t =
    1 / 0.07, capped at 100); the softmax has no b, which would cancel."""
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


def actor_loss(out, batch):
    """l_act(x | theta), per example [N]: the cross-entropy -log p(y | x), or -z_im . z_txt for a
    pair, since the contrastive loss of a pair would depend on the rest of the batch."""
    if isinstance(out, tuple):
        return -jnp.einsum("ne,ne->n", *out)
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["label"])


def score(kind, online_B, reference_B):
    """Score [B] from losses [B], of which `kind` may not need one; higher is picked sooner.
    hard-learner l(x|o); easy-reference -l(x|r); learnability l(x|o) - l(x|r), their sum."""
    return {"learnability": lambda: online_B - reference_B,
            "rho_loss": lambda: online_B - reference_B,  # with the learner itself as o
            "easy_reference": lambda: -reference_B,
            "hard_learner": lambda: online_B}[kind]()


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
    """A view of each image, drawn from its place in the super-batch: the same on any device."""
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
    """This device's part of the training loss of a sharded batch: the mean over its rows. Its
    gradient, averaged over the devices, is that of the whole batch's loss, negatives from all
    devices included. Pairs: inside `pmap` only."""
    if model.loss == "cross_entropy":
        target_SC = optax.smooth_labels(jax.nn.one_hot(batch["label"], out.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(out, target_SC).mean()
    image_SE, text_SE = out
    offset = jax.lax.axis_index(AXIS) * len(image_SE)  # where this device's rows stand in the batch
    if model.loss == "sigmoid":
        return sigmoid_loss(image_SE, devices.gather(text_SE), params["log_t"], params["b"], offset)
    return 0.5 * (softmax_loss(image_SE, devices.gather(text_SE), params["log_t"], offset)
                  + softmax_loss(text_SE, devices.gather(image_SE), params["log_t"], offset))


def softmax_loss(x_SE, y_AE, log_t, offset=0):
    """One direction of InfoNCE (CLIP): row i of x against all A rows of y; its own is offset + i."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE)
    own_S = offset + jnp.arange(len(x_SE))
    return optax.softmax_cross_entropy_with_integer_labels(logits_SA, own_S).mean()


def sigmoid_loss(x_SE, y_AE, log_t, b, offset=0):
    """SigLIP: mean over rows i of sum over j of -log sigmoid(+-(t x_i.y_j + b)), + for own j, with
    t = exp(log_t)."""
    logits_SA = jnp.exp(log_t) * jnp.einsum("se,ae->sa", x_SE, y_AE) + b
    own_S = offset + jnp.arange(len(x_SE))
    sign_SA = 2 * jax.nn.one_hot(own_S, len(y_AE)) - 1
    return -jax.nn.log_sigmoid(sign_SA * logits_SA).sum(1).mean()


# --------------------------------------------------------------------------- Algorithm 1, one step


def adamw(peak, steps, *, warmup=0.05, weight_decay=1e-4):
    """AdamW under a linear warm-up from 0 and a cosine that is 0 at `steps`. Decayed are the leaves
    named 'w' (weights of dense layers) and no others: not biases, norms, embeddings, positions."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, round(warmup * steps), steps, 0.0)
    dense = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "w", params)
    return optax.adamw(schedule, weight_decay=weight_decay, mask=dense)


def new_state(key, model, optimiser):
    params = init(key, model)
    return {"params": params, "opt": optimiser.init(params)}


def update(state, batch, model, optimiser, smoothing):
    """Inside `pmap`, one step of {'params', 'opt'} on a sharded batch; also the whole batch's loss
    and this device's outputs, both before it."""
    def loss_of(params):
        out = outputs(params, batch, model)
        return training_loss(out, params, batch, model, smoothing), out

    (loss, out), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
    loss, grads = devices.mean((loss, grads))
    updates, opt = optimiser.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss, out


def score_super_batch(state, index, batch_N, *, arm, learner, proxy, optimisers,
                      proxy_smoothing=0.0, staleness=0):
    """(state, score [B]) on every device. The state changes where the proxy's weights are kept for
    later (staleness) and where the reference is trained on the super-batch (ClassAct-Online)."""
    state = dict(state)
    online_N = reference_N = jnp.zeros(len(batch_N["image"]))
    if arm in NEEDS_ACTOR:
        params = state["actor"]["params"]
        if staleness:  # a ring: slot i holds the weights of the last step that was i mod staleness
            slot, ring = index % staleness, state["stale"]
            state["stale"] = jax.tree.map(lambda r, new: r.at[slot].set(new), ring, params)
            params = jax.tree.map(lambda r: r[slot], ring)
        online_N = actor_loss(outputs(params, batch_N, proxy), batch_N)
    if arm == "rho_loss":
        online_N = actor_loss(outputs(state["learner"]["params"], batch_N, learner), batch_N)
    if "reference_loss" in batch_N:  # cached
        reference_N = batch_N["reference_loss"]
    elif "opt" in state.get("reference", {}):  # online: one forward both scores and trains
        state["reference"], _, out = update(
            state["reference"], batch_N, proxy, optimisers["reference"], proxy_smoothing)
        reference_N = actor_loss(out, batch_N)
    elif arm in NEEDS_REFERENCE:  # a KeyError where there is none: zeros would be hard_learner
        reference_N = actor_loss(outputs(state["reference"]["params"], batch_N, proxy), batch_N)
    return state, score(arm, devices.gather(online_N), devices.gather(reference_N))


def algorithm_1(state, index, key, batch_N, *, arm, n_select, learner, proxy, optimisers,
                smoothing=0.1, proxy_smoothing=0.0, score_gain=1.0, sampling="gumbel", staleness=0,
                score_view="clean", view="none"):
    """(state, metrics) after step `index` (from 0), inside `pmap`.

    Args:
      state: {'learner', 'actor', 'reference'}: each {'params', 'opt'} as far as the arm needs it;
        a 'reference' without 'opt' is frozen. 'stale': the last `staleness` weights of the actor.
      key: the run's, the same at every step (`index` is folded in) and on every device.
      batch_N: this device's share of the super-batch, for arm 'uniform' of the sub-batch (all of it
        is trained on): 'image' uint8 [N, H, W, C], 'label' or 'tokens', bool truths that are
        reported on only, 'reference_loss' [N] where it is cached.
      n_select: b, on all devices together.
      optimisers: {'learner', 'actor', 'reference'} -> optax optimiser.
    """
    key_select, key_view = jax.random.split(jax.random.fold_in(key, index))
    truth_B = {k: devices.gather(v) for k, v in batch_N.items() if v.dtype == bool}
    batch_N = {k: v for k, v in batch_N.items() if v.dtype != bool}
    if score_view == "train":
        batch_N["image"] = augment(key_view, devices.places(batch_N), batch_N["image"], view)

    # score the super-batch and pick; scores are gathered, images stay where they are
    pick_S, batch_S, metrics = jnp.arange(n_select), batch_N, {}
    if arm != "uniform":
        state, score_B = score_super_batch(
            state, index, batch_N, arm=arm, learner=learner, proxy=proxy, optimisers=optimisers,
            proxy_smoothing=proxy_smoothing, staleness=staleness)
        pick_S = select(key_select, score_B, n_select, score_gain,
                        "topk" if arm == "rho_loss" else sampling)
        batch_S = {k: devices.take(v, pick_S) for k, v in batch_N.items()}
        metrics = {"score_pool": score_B.mean(), "score_pool_sd": score_B.std(),
                   "score_picked": score_B[pick_S].mean()}
    if score_view != "train":
        batch_S["image"] = augment(key_view, pick_S[devices.places(batch_S)], batch_S["image"],
                                   view)

    # both models train on what was picked, and on nothing else
    state = dict(state)
    state["learner"], loss, _ = update(
        state["learner"], batch_S, learner, optimisers["learner"], smoothing)
    if "actor" in state:
        state["actor"], metrics["actor_loss"], _ = update(
            state["actor"], batch_S, proxy, optimisers["actor"], proxy_smoothing)
    for k, v_B in truth_B.items():
        metrics |= {f"picked_{k}": v_B[pick_S].mean(), f"pool_{k}": v_B.mean()}
    return state, {"loss": loss, **metrics}


def step_flops(arm, batch_size, ratio, F_L, F_p, reference):
    """FLOPs of one step by role: the paper's cost model (a training step is three forwards), and
    the selection, which the paper leaves out.

    F_L, F_p: `forward_flops` of learner and proxy. `reference`: 'cached', 'computed', 'online', or
    None for an arm that has none. A frozen reference's training (3 b F_p an update) and its cached
    scores (F_p an example) are no part of a step: the caller charges them once, as `main` does.
    """
    b, B = batch_size, round(batch_size * ratio)
    has_actor = arm in NEEDS_ACTOR
    return {
        "learner": 3 * b * F_L,
        "actor_scoring": B * F_L if arm == "rho_loss" else B * F_p if has_actor else 0,
        "actor_training": 3 * b * F_p if has_actor else 0,
        # an operation each: subtract, divide, add noise, and log2(B) comparisons to place it
        "selection": 0 if arm == "uniform" else B * (3 + max(B, 2).bit_length()),
        "reference_scoring": B * F_p if reference == "computed" else 0,
        # online: trained on the super-batch, the same forward scores it
        "reference_training": 3 * B * F_p if reference == "online" else 0,
    }


# --------------------------------------------------------------------------------- evaluation


def evaluate(params, forward, pool, batch_size, model):
    """Metrics on all of a pool; `forward` is `make_forward(model)`.

    Classification: accuracy and cross-entropy. Image-text: recall at 1 and 10 of the right caption
    from an image and back (a caption that reads the same is right too), and the two's mean.
    """
    parts = [got for got, _ in stage.forward_all(params, forward, pool, batch_size)]
    got = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    out = got["out"]
    if model.loss == "cross_entropy":
        return {"accuracy": float((out.argmax(1) == got["label"]).mean()),
                "eval_loss": float(np.mean(actor_loss(out, got)))}
    return retrieval.recalls(*out, got["caption_hash"], ks=(1, 10))


def make_forward(model):
    """Program (params, sharded batch) -> the outputs as 'out', and what came along, gathered."""
    def forward(params, batch):
        return {**{k: devices.gather(v) for k, v in batch.items() if k != "image"},
                "out": jax.tree.map(devices.gather, outputs(params, batch, model))}
    return devices.Program(forward, in_axes=(None, 0))


def score_pool(params, pool, forward, batch_size, path):
    """Losses [len(pool)] of every example of a pool under a frozen reference, in the order of its
    ids, and the seconds it took; cached in the file `path`."""
    def make():
        parts = [(np.asarray(actor_loss(got["out"], got)), seconds)
                 for got, seconds in stage.forward_all(params, forward, pool, batch_size)]
        return {"loss": np.concatenate([x for x, _ in parts])}, sum(s for _, s in parts)
    arrays, seconds = stage.cached(path, params, pool, make)
    return arrays["loss"], seconds


# ------------------------------------------------------------------------------------ picture


def choose(arm, seed, index, pool, state, losses, config, learner, proxy, optimisers, n):
    """Scores (of the plain view) and picks on super-batch `index`, the one after the last step:
    what picks.png shows."""
    batch = next(data.batches(pool, seed=seed, batch_size=n, start=index, stop=index + 1,
                              host=devices.host()))
    ids = data.batch_ids(pool.ids, seed, index, n)
    if losses is not None:
        batch["reference_loss"] = losses[np.searchsorted(pool.ids, batch["id"])]

    def pick(state, key, batch_N):
        _, score_B = score_super_batch(state, index, batch_N, arm=arm, learner=learner, proxy=proxy,
                                       optimisers=optimisers, staleness=config.staleness,
                                       proxy_smoothing=config.proxy_label_smoothing)
        return score_B, select(key, score_B, config.batch_size, config.score_gain,
                               "topk" if arm == "rho_loss" else config.sampling)
    batch = {k: v for k, v in batch.items() if k in ("image", "label", "tokens", "reference_loss")}
    score_B, pick_S = jax.device_get(devices.pmap(pick, (None, None, 0))(
        state, jax.random.fold_in(jax.random.key(seed), index), devices.shard(batch)))
    return dict(arm=arm, pool=pool, ids=ids, score_B=score_B, pick_S=pick_S)


# --------------------------------------------------------------------------------------- main


def check(config, typed=()):
    """Raises ValueError, naming the flag, for what cannot work whatever the data. `typed`: the
    flags that were given."""
    want = functools.partial(run.want, config)
    for arm in config.arms:
        if arm not in ARMS:
            raise ValueError(f"--arms: {arm!r} is none of {', '.join(ARMS)}")
    want(config.arms and len(set(config.arms)) == len(config.arms), "arms", "each arm once")
    want(config.ratio >= 1, "ratio", "at least 1 (the super-batch holds the sub-batch)")
    want(0 < config.score_gain < float("inf"), "score_gain",
         "a number above 0 (for the limit of large gains there is --sampling=topk)")
    for flag in ("steps", "batch_size", "patch", "embed"):
        want(config[flag] >= 1, flag, "at least 1")
    for flag in ("staleness", "reference_steps", "active_steps", "proxy_learning_rate",
                 "weight_decay"):
        want(config[flag] >= 0, flag, "at least 0")
    for flag in ("learning_rate", "reference_learning_rate"):
        want(config[flag] > 0, flag, "more than 0")
    want(0 < config.held_out_fraction < 1, "held_out_fraction", "a fraction between 0 and 1")
    want(config.reference_noise == -1 or 0 <= config.reference_noise <= 1, "reference_noise",
         "a fraction from 0 to 1, or -1 for the pool's")
    for flag in ("label_smoothing", "proxy_label_smoothing"):
        want(0 <= config[flag] < 1, flag, "a fraction below 1")
    want(0 <= config.warmup < 1, "warmup", "a fraction below 1")
    want(config.context >= 2, "context", "at least 2")
    want((config.ratio * config.batch_size).is_integer(), "ratio", "a whole super-batch: "
         f"ratio * batch_size is {config.ratio * config.batch_size}")
    want(config.score_view == "clean" or config.reference_scores == "computed" or
         config.augment == "none" or config.reference == "online", "reference_scores",
         "'computed' with --score_view=train: a view that changes cannot be cached")
    want(config.actor_init == "random" or config.reference != "online", "actor_init",
         "'random' with an online reference")
    want(config.actor_init == "random" or "hard_learner" not in config.arms, "actor_init",
         "'random' with arm hard_learner, which has no reference")
    for flag in typed:
        if flag == ("label_noise" if config.task == "image_text" else "caption_noise"):
            raise ValueError(f"--{flag} is not read by --task={config.task}: give "
                             "--label_noise to classification, --caption_noise to image_text")
    devices.divides(batch_size=config.batch_size)
    want(round(config.ratio * config.batch_size) % jax.device_count() == 0, "ratio",
         f"a super-batch (ratio * batch_size) that divides over {jax.device_count()} devices: a "
         f"multiple of {jax.device_count()}")


def build_models(config, source):
    """(learner, proxy): the reference is the proxy's twin."""
    image_size = source.image_shape[0]
    if image_size % config.patch:
        raise ValueError(f"--patch={config.patch} does not divide the image side {image_size}")
    shared = dict(pool=config.pool, dtype=config.dtype, remat=config.remat)
    n_out = config.embed if config.task == "image_text" else len(source.class_names)
    loss = config.contrastive_loss if config.task == "image_text" else "cross_entropy"

    def model(flag):
        try:
            vit.size(config[flag])
        except ValueError as e:
            raise ValueError(f"--{flag}: {e}") from None
        image = vit.ViT(config[flag], image_size, config.patch, n_out, source.image_shape[2],
                        **shared)
        text = vit.Text(config[flag], data.VOCAB, config.context, config.embed, **shared)
        return Model(loss, image, text if config.task == "image_text" else None)
    return model("learner"), model("proxy")


def initial_state(arm, key, learner, proxy, optimisers, *, reference=None, params=None,
                  actor_init="random", staleness=0):
    """The state of `algorithm_1` before step 0. The learner is the same for every arm.

    reference: 'computed' (frozen `params`, scored in the step), 'online' (trained in it), 'cached'
    (its losses come with the batch) or None.
    """
    key_learner, key_actor, key_reference = jax.random.split(key, 3)
    state = {"learner": new_state(key_learner, learner, optimisers["learner"])}
    if reference == "online":
        state["reference"] = new_state(key_reference, proxy, optimisers["reference"])
    if reference == "computed":
        state["reference"] = {"params": params}
    if arm in NEEDS_ACTOR:
        state["actor"] = new_state(key_actor, proxy, optimisers["actor"])
        if actor_init == "reference" and params is not None:
            state["actor"]["params"] = params
        if staleness:
            state["stale"] = jax.tree.map(lambda x: jnp.stack([x] * staleness),
                                          state["actor"]["params"])
    return state


def make_step(arm, config, learner, proxy, steps, learning_rate, smoothing):
    """`algorithm_1` as a Program (state, index, key, sharded batch) -> (state, metrics), and its
    optimisers."""
    rule = functools.partial(adamw, warmup=config.warmup, weight_decay=config.weight_decay)
    optimisers = {"learner": rule(learning_rate, steps),
                  "actor": rule(config.proxy_learning_rate, steps),
                  "reference": rule(config.reference_learning_rate, steps)}
    step = functools.partial(
        algorithm_1, arm=arm, n_select=config.batch_size, learner=learner, proxy=proxy,
        optimisers=optimisers, smoothing=smoothing, proxy_smoothing=config.proxy_label_smoothing,
        score_gain=config.score_gain, sampling=config.sampling, staleness=config.staleness,
        score_view=config.score_view, view=config.augment)
    return devices.Program(step, (None, None, None, 0), donate=True), optimisers


def main():
    config, typed = run.resolve(PRESETS)
    devices.start(config.coordinator, config.num_processes, config.process_id)
    check(config, typed)
    text = config.task == "image_text"
    source, test_source = (data.open_source(
        config.dataset, split, data_dir=config.data_dir, image_size=config.image_size,
        context=config.context if text else 0, need=("caption",) if text else ("label",),
        toy_knobs=run.toy_knobs(config), flags=("dataset", flag))
        for flag, split in (("split", config.split), ("eval_split", config.eval_split)))
    if set(config.arms) != {"uniform"}:
        n_held_out = round(config.held_out_fraction * len(source.ids))
        data.check_batch(source.ids[n_held_out if config.reference == "held_out" else 0:],
                         round(config.ratio * config.batch_size), f"--ratio={config.ratio:g}")
    learner, proxy = build_models(config, source)
    like = jax.eval_shape(lambda: init(jax.random.key(0), proxy))
    stage.check_given(config, like, trains=("in_domain", "held_out", "online"))
    run.open_workdir(config)
    for part, flag in ((source, "split"), (test_source, "eval_split")) if text else ():
        data.count_captions(part, data.byte_ids, config.context, f"--{flag}={config[flag]}")
    metrics_file = report.MetricsFile(os.path.join(config.workdir, "metrics.jsonl"))
    stop, forwards = run.Stop(), {m: make_forward(m) for m in (learner, proxy)}
    test_pool = data.Pool(test_source)
    fields = ("image", "tokens" if text else "label", "reference_loss", *data.TRUTHS)
    b, B = config.batch_size, round(config.ratio * config.batch_size)
    F_L, F_p = forward_flops(learner), forward_flops(proxy)
    steps = {"reference": config.reference_steps or config.steps}
    programs = {"reference": make_step("uniform", config, proxy, proxy, steps["reference"],
                                       config.reference_learning_rate,
                                       config.proxy_label_smoothing)}
    for arm in config.arms:
        steps[arm] = (arm != "uniform" and config.active_steps) or config.steps
        programs[arm] = make_step(arm, config, learner, proxy, steps[arm], config.learning_rate,
                                  config.label_smoothing)
    noise = config.caption_noise if text else config.label_noise

    def train(name, seed, pool, state, key, model, *, per_step, n_scored=b, losses=None, **rest):
        """One stage or arm: loads its batches, cached reference losses among them, and fits."""
        def load(start):
            for batch in data.batches(pool, seed=seed, batch_size=n_scored, start=start,
                                      stop=steps[name], host=devices.host(), wrap=n_scored == b,
                                      flags=f"--ratio={config.ratio:g}"):
                if losses is not None:
                    batch["reference_loss"] = losses[np.searchsorted(pool.ids, batch["id"])]
                yield devices.shard({k: batch[k] for k in fields if k in batch})
        return stage.fit(
            name, seed, programs[name][0], state, key, load, steps=steps[name], batch_size=b,
            n_scored=n_scored, per_step=per_step, config=config, stop=stop,
            metrics_file=metrics_file, **rest, metrics_of=lambda state: evaluate(
                state["learner"]["params"], forwards[model], test_pool, b, model))

    def frozen_reference(seed, whole, pool, key_init, key_steps):
        """Weights, cached losses of `pool` (or None), FLOPs by role and seconds they all took."""
        if config.reference in ("in_domain", "held_out"):
            on = whole.replant(config.reference_noise) if config.reference_noise >= 0 else whole
            if config.reference == "held_out":
                on = on.subset(np.setdiff1d(whole.ids, pool.ids))
            state = {"learner": new_state(jax.random.split(key_init, 3)[2], proxy,
                                          programs["reference"][1]["learner"])}
            train("reference", seed, on, state, key_steps, proxy, one_off={}, setup_seconds=0.0,
                  per_step={"reference_training": 3 * b * F_p})
            where = os.path.join(config.workdir, "checkpoints", f"reference-{seed}")
        else:
            where = run.for_seed(config.reference, seed)
        params, books = checkpoint.restore_params(where, like, "reference")
        flops, seconds, losses = {"reference_training": books["flops"]}, books["seconds"], None
        if config.reference_scores == "cached":
            path = (run.for_seed(config.score_cache, seed) if config.score_cache else
                    os.path.join(config.workdir, f"scores-{seed}.npz"))
            losses, took = score_pool(params, pool, forwards[proxy], b, path)
            flops["reference_scoring"], seconds = len(pool) * F_p, seconds + took
        return params, losses, flops, seconds

    shown = None
    for seed in config.seeds:
        whole = data.Pool(source, noise=noise, field="tokens" if text else "label", seed=seed)
        rest = (whole.subset(data.split(whole.ids, config.held_out_fraction, seed)[1])
                if config.reference == "held_out" else whole)
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        reference = None
        for arm in config.arms:
            params, losses, one_off, seconds, kind = None, None, {}, 0.0, None
            if arm in NEEDS_REFERENCE and config.reference == "online":
                kind = "online"
            elif arm in NEEDS_REFERENCE:
                kind = config.reference_scores
                reference = reference or frozen_reference(seed, whole, rest, key_init, key_steps)
                params, losses, one_off, seconds = reference
            state = initial_state(
                arm, key_init, learner, proxy, programs[arm][1], reference=kind,
                params=params, actor_init=config.actor_init, staleness=config.staleness)
            # the baseline has the whole pool: a part held out is a cost of the method
            pool, n_scored = (whole, b) if arm == "uniform" else (rest, B)
            state = train(
                arm, seed, pool, state, key_steps, learner, n_scored=n_scored, losses=losses,
                one_off=one_off, setup_seconds=seconds,
                per_step=step_flops(arm, b, config.ratio, F_L, F_p, kind))
            if shown is None and arm != "uniform":
                shown = (arm, seed, steps[arm], rest, state, losses)

    picks = shown and choose(*shown, config, learner, proxy, programs[shown[0]][1], B)
    if jax.process_index() == 0:
        report.conclude(metrics_file.rows(), config.workdir, picks=picks, arms=config.arms,
                        seeds=config.seeds, script="rho_learnability",
                        dataset=run.dataset_name(config.dataset),
                        metric="recall@10" if text else "accuracy")


if __name__ == "__main__":
    define_flags()
    run.main(main)
