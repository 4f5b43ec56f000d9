"""DnC: Divide and Contrast (Tian, Henaff, van den Oord, 2105.08054).

Self-supervised learning from uncurated, heavy-tailed images. Contrasting images of one cluster
gives hard negatives, and rare clusters get models of their own. There are three stages:
  1. base: MoCLR (SimCLR's loss against a momentum encoder) on all images       `contrast_step`
  2. divide the images by k-means of the base's representations                `kmeans`, `divide`
     and train an expert on each cluster with the same loss                    `expert_batches`
  3. distil base and experts into one student. From each image it predicts the base's representation
     and that of the expert of the image's cluster                             `distil_step`
Only the student's encoder is evaluated, frozen (common/probe.py). The views are BYOL's
(common/augment.py).

Controls: `moclr` sees as many images as all stages together, and `moclr_flops` costs as many FLOPs
(`budget`). Batches of one cluster have harder negatives, but also another balance of classes. So
`dnc_random` divides at random into parts of the same sizes, `dnc_oracle` divides by label, and
`self_distil` has no experts.

Dimension letters: N images of a device (in `divide`, `clusters`, `partition`: of the pool), A of
all devices, E projection, D representation, K clusters, J candidates of k-means++, T rows of a
tile, R restarts, B blocks of S slots, C classes, H W C image.

Minutes on two CPU cores:  python dnc.py
The measurements:          python dnc.py --preset=wild --dataset=path/to/wild/1.0.0
ResNet-50, 224 px:         python dnc.py --preset=imagenet_R50  (a trial, on generated images)

There is no official code, and we could not read the paper's text in full. docs/differences.md lists
what is recalled or chosen. Most of it is a flag, and the rest is marked in its docstring.
"""

import dataclasses
import functools
import math
import time

from absl import logging
import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import augment, data, devices, flags, probe, reference, report, resnet, train, vit
from common.devices import AXIS

ARMS = ("moclr", "moclr_flops", "dnc", "dnc_random", "self_distil", "dnc_oracle")
DIVIDES = ("dnc", "dnc_random", "dnc_oracle")  # have experts
TOY = {"image_size": 16, "examples": 3000, "tail": 1.5, "radius": 0.25, "domains": 0}

PRESETS = {
    # the table of docs/results.md: heavy-tailed, halved to 16 px; give its path as --dataset. It
    # takes an hour a seed on one CPU core. To keep to that it runs 46 epochs, not thousands.
    "wild": dict(
        dataset="wild", arms=["moclr_flops", "dnc", "dnc_random"], image_size=16, hidden=256,
        head_hidden=256, crop_area=0.2, steps=18000, eval_every=1800, learning_rate=32.0,
        distil_learning_rate=32.0, clusters=10, base_fraction=0.3, experts_fraction=0.3,
        distil_fraction=0.4, expert_init="base", student_init="base"),
    # BYOL's model, rate, decay and m0 for 1000 epochs; so few updates of generated images show that
    # it runs. 3000 epochs, as recalled: --dataset=imagenet2012 --eval_split=validation
    # --batch_size=4096 --steps=938355
    "imagenet_R50": dict(
        arms=["moclr", "moclr_flops", "dnc", "dnc_random", "self_distil"], image_size=224,
        toy_examples=4096, toy_tail=1.0, model="50", hidden=4096, embed=256, head_hidden=4096,
        dtype="bfloat16", crop_area=0.08, jitter=1.0, blur=["1.0", "0.1"], solarise=["0.0", "0.2"],
        m0=0.996, clusters=5, steps=1000, batch_size=256, eval_every=500, learning_rate=0.2,
        distil_learning_rate=0.2, warmup=0.01),
}


def define_flags():
    f = flags.Group("Method")
    f.names("arms", ["moclr", "dnc", "dnc_random", "self_distil"], f"of {', '.join(ARMS)}; the "
            "first is the baseline")
    f.number("base_fraction", 1 / 3, "(0, 1)", "fraction of --steps that trains the base")
    f.number("experts_fraction", 1 / 2, "(0, 1)", "fraction of --steps that the experts share, in "
             "proportion to the sizes of their clusters")
    f.number("distil_fraction", 1 / 6, "(0, 1)", "fraction of --steps that trains the student (the "
             "paper's split, as we recall it, is 1000 + 1500 + 500 epochs)")
    f.integer("clusters", 4, "[1, inf)", "K (paper: 5 and 10)")
    f.integer("restarts", 10, "[1, inf)", "runs of k-means, of which the best is taken")
    f.integer("kmeans_iterations", 20, "[1, inf)", "of Lloyd at most, in each run")
    f.integer("kmeans_examples", 1_000_000, "[1, inf)", "k-means is fitted on at most so many; all "
              "are assigned")
    f.choice("expert_init", "scratch", ["scratch", "base"], "initial weights of the experts")
    f.choice("student_init", "scratch", ["scratch", "base"], "initial weights of the student")
    f.number("temperature", 0.1, "(0, inf)", "tau of the contrastive loss")
    f.switch("same_view_negatives", True, "the other images' targets of an image's own view are "
             "negatives too (SimCLR; MoCo v3 has none)")
    f.number("m0", 0.97, "[0, 1]", "decay of the momentum encoder at the start; 1 at the end "
             "(BYOL: .97 for 40 epochs, .99 for 100 and 300, .996 for 1000)")

    f = flags.Group("Augmentation (the defaults suit images up to 64 px: SimCLR's for CIFAR)")
    f.number("crop_area", 0.3, "(0, 1]", "least area of a crop (BYOL: 0.08)")
    f.number("jitter", 0.5, "[0, 2.5]", "strength of the colour jitter, as a factor of BYOL's; at "
             "2.5 a factor reaches 0")
    f.names("blur", ["0", "0"], "probability of blur, in each of the two views (BYOL: 1.0,0.1)")
    f.names("solarise", ["0", "0"], "probability of solarisation, in each view (BYOL: 0.0,0.2)")

    f = flags.Group("Models")
    f.text("model", "8/16", "ResNet: 18, 50, or 'depth/width' with depth 18, 50 or 6n + 2; up to "
           "64 px with a stem for small images")
    f.integer("hidden", 128, "[1, inf)", "hidden width of the projector (BYOL: 4096)")
    f.integer("embed", 64, "[1, inf)", "width E of the projection (BYOL: 256)")
    f.integer("head_hidden", 128, "[1, inf)", "hidden width of the student's regression heads")
    f.choice("dtype", "float32", ["float32", "bfloat16"], "type of the activations")

    f = flags.Group("Optimisation")
    f.integer("steps", 600, "[1, inf)", "updates, in all stages of an arm together")
    f.integer("batch_size", 64, "[2, inf)", "images per update: at least a negative for each")
    f.number("learning_rate", 4.0, "(0, inf)", "of LARS, at 256 images; times batch_size / 256; "
             "linear warm-up, cosine to 0 in each stage (BYOL: .45 for 40 and 100 epochs, .3 for "
             "300, .2 for 1000)")
    f.number("distil_learning_rate", 4.0, "(0, inf)", "the same of the distillation")
    f.number("weight_decay", 1.5e-6, "[0, inf)", "inside LARS, on kernels")
    f.number("warmup", 0.05, "[0, 1)", "fraction of a stage's steps")

    flags.define_shared("dnc", toy=TOY, toy_noise={})
    f = flags.Group("Data")
    f.integer("class_cap", 0, "[0, inf)", "at most so many examples of a class in the pool: the "
              "balanced twin of a heavy-tailed set; 0: all")


# ------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of an encoder, of the projector behind it and of the student's heads."""
    encoder: resnet.ResNet
    hidden: int  # hidden width of the projector
    embed: int  # width E of the projection
    head_hidden: int  # hidden width of the student's heads


def init(key, model):
    """(params, stats) of an encoder and its projector: Linear, batch norm, ReLU, Linear. The last
    layer has no bias, as in BYOL's code."""
    key_encoder, key_up, key_down = jax.random.split(key, 3)
    encoder, encoder_stats = resnet.resnet_init(key_encoder, model.encoder)
    norm, norm_stats = resnet.norm_init(model.hidden)
    projector = {"up": vit.dense_init(key_up, model.encoder.features, model.hidden), "norm": norm,
                 "down": {"w": vit.dense_init(key_down, model.hidden, model.embed)["w"]}}
    return ({"encoder": encoder, "projector": projector},
            {"encoder": encoder_stats, "projector": norm_stats})


def project(params, stats, image_NHWC, model):
    """(z [N, E], stats): encoder and projector in training mode, inside `pmap`. The batch norms
    average over all devices. The last layer has none."""
    h_ND, encoder = resnet.resnet_apply(params["encoder"], stats["encoder"], image_NHWC,
                                        model.encoder, train=True)
    p = params["projector"]
    y, projector = resnet.batch_norm(p["norm"], stats["projector"], vit.dense(p["up"], h_ND), True)
    return jax.nn.relu(y) @ p["down"]["w"], {"encoder": encoder, "projector": projector}


def represent(net, image_NHWC, model):
    """h [N, D] of normalised images, by a frozen encoder {'params', 'stats'} in evaluation mode."""
    return resnet.resnet_apply(net["params"], net["stats"], image_NHWC, model.encoder,
                               train=False)[0]


def unit(z):
    """Rows divided by their length. A row of zeros stays zero and has a finite gradient."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), -1, keepdims=True), 1e-12))


def gather(x, axis=None):
    """Rows of all devices along the mapped axis of that name, in order. Without an axis, x."""
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def total(x, axis=None):
    """Sum over all devices along the mapped axis of that name. Without an axis, x."""
    return x if axis is None else jax.lax.psum(x, axis)


def encoder_of(state):
    """What a stage leaves to the next: {'params', 'stats'} of its online encoder."""
    return {"params": state["learner"]["params"]["encoder"], "stats": state["stats"]["encoder"]}


def forward_flops(model):
    """FLOPs in one forward of one image: (of the encoder, of the encoder with its projector). A
    multiply-add counts as two."""
    D, encoder = model.encoder.features, resnet.resnet_flops(model.encoder)
    return encoder, encoder + 2 * model.hidden * (D + model.embed)


# -------------------------------------------------------------------------- 1. base: MoCLR


def info_nce(q_NE, k_AE, temperature, same_AE=None, offset=0):
    """(loss, hardness): InfoNCE of the online projections q against the targets k.

    loss: the mean over rows i of -log softmax of q_i.k / tau at i's own row of k. The negatives of
    i are all other rows of k and, if `same_AE` is given, all other rows of it (the targets of q's
    own view). hardness: the mean of log sum exp over the negatives alone. All rows must be
    L2-normalised. Row i of q owns row offset + i of k.
    """
    own_NA = jax.nn.one_hot(offset + jnp.arange(len(q_NE)), len(k_AE), dtype=bool)
    logits_NA = jnp.einsum("ne,ae->na", q_NE, k_AE) / temperature
    positive_N = jnp.sum(logits_NA, axis=1, where=own_NA)
    negatives = jnp.where(own_NA, -jnp.inf, logits_NA)
    if same_AE is not None:
        same_NA = jnp.einsum("ne,ae->na", q_NE, same_AE) / temperature
        negatives = jnp.concatenate([negatives, jnp.where(own_NA, -jnp.inf, same_NA)], axis=1)
    hardness_N = jax.nn.logsumexp(negatives, axis=1)
    return jnp.logaddexp(positive_N, hardness_N).mean() - positive_N.mean(), hardness_N.mean()


def moclr_loss(q1_NE, q2_NE, k1_NE, k2_NE, temperature, same_view_negatives=True, axis=None):
    """(loss, hardness) of MoCLR: the mean of InfoNCE of view 1's online projections q against
    view 2's targets k, and of view 2's q against view 1's k. The hardness is only reported.

    All four are [N, E] and are normalised here. No gradient reaches k. same_view_negatives: the
    other images' targets of an image's own view are negatives too. Inside `pmap`, `axis` names the
    mapped axis: then the k of all devices are used, and the mean of this loss over the devices is
    the loss of the whole batch. The same holds for its gradient.
    """
    offset = jax.lax.axis_index(axis) * len(q1_NE) if axis else 0  # of this device's first row
    q1_NE, q2_NE = unit(q1_NE), unit(q2_NE)
    k1_AE, k2_AE = (gather(jax.lax.stop_gradient(unit(k)), axis) for k in (k1_NE, k2_NE))
    same = (k1_AE, k2_AE) if same_view_negatives else (None, None)
    ways = (info_nce(q1_NE, k2_AE, temperature, same[0], offset),
            info_nce(q2_NE, k1_AE, temperature, same[1], offset))
    return jax.tree.map(lambda a, b: 0.5 * (a + b), *ways)


def ema_decay(step, total_steps, m0):
    """Decay of the momentum encoder: 1 - (1 - m0) (1 + cos(pi step / total_steps)) / 2. It rises
    from m0 at the start to 1 at the end (BYOL)."""
    return 1 - (1 - m0) * (1 + jnp.cos(jnp.pi * step / total_steps)) / 2


def warmup_cosine(step, total_steps, warmup, peak):
    """Learning rate: from 0 to `peak` along a line in `warmup` steps, then along half a cosine to 0
    at `total_steps`."""
    progress = jnp.clip((step - warmup) / jnp.maximum(total_steps - warmup, 1), 0, 1)
    return peak * jnp.where(step < warmup, step / jnp.maximum(warmup, 1),
                            (1 + jnp.cos(jnp.pi * progress)) / 2)


def lars(weight_decay, *, trust=1e-3, momentum=0.9):
    """LARS as in BYOL's code, without the learning rate, which `update` applies.

    g = gradient + weight_decay w, u = trust |w| / |g| g, m = momentum m + u. Where a norm is 0,
    u = g. Only kernels, the leaves named 'w' of nested dicts, have decay and trust ratio. For
    biases and norms u is the gradient.
    """
    is_kernel = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "w", params)
    return optax.chain(optax.masked(optax.add_decayed_weights(weight_decay), is_kernel),
                       optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), is_kernel),
                       optax.trace(momentum))


def update(learner, grads, optimiser, rate):
    """One step of {'params', 'opt'}: w - rate m, where m is the optimiser's update.

    The rate is an argument of every step, so that stages of different lengths share one program.
    It stands outside the momentum, as in BYOL's code. Inside (You et al., 1708.03888), a step would
    still move by rates of steps before, which differ most during the warm-up.
    """
    m, opt = optimiser.update(grads, learner["opt"], learner["params"])
    return {"params": jax.tree.map(lambda w, m: w - rate * m, learner["params"], m), "opt": opt}


def contrast_step(state, index, key, batch_N, *, model, optimiser, views, temperature,
                  same_view_negatives, peak, warmup, m0, n_classes):
    """(state, metrics) after step `index` (from 0) of MoCLR, inside `pmap`. It trains the base on
    everything, and an expert on its cluster.

    Args:
      state: {'learner': {'params', 'opt'}, 'stats': running statistics of its batch norms,
        'target': the momentum encoder's parameters, 'total': number of steps of this stage}. The
        target's batch norms use the statistics of its own batch, so none are kept for it.
      batch_N: 'image' uint8 [N, H, W, C]; 'label' [N], which is only used for a metric.
      peak: learning rate after the warm-up. warmup: a fraction of the stage. m0: see `ema_decay`.
    """
    image_NHWC = batch_N["image"]
    view1, view2 = augment.draw_views(jax.random.fold_in(key, index), devices.places(image_NHWC),
                                      image_NHWC, views, 2)
    k1_NE, k2_NE = (project(state["target"], state["stats"], v, model)[0] for v in (view1, view2))

    def loss_of(params):
        q1_NE, stats = project(params, state["stats"], view1, model)
        q2_NE, stats = project(params, stats, view2, model)
        loss, hardness = moclr_loss(q1_NE, q2_NE, k1_NE, k2_NE, temperature, same_view_negatives,
                                    AXIS)
        return loss, (hardness, stats)

    (loss, (hardness, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(
        state["learner"]["params"])
    loss, hardness, grads = devices.mean((loss, hardness, grads))
    rate = warmup_cosine(index, state["total"], jnp.round(warmup * state["total"]), peak)
    learner = update(state["learner"], grads, optimiser, rate)
    target = optax.incremental_update(learner["params"], state["target"],
                                      1 - ema_decay(index, state["total"], m0))
    # reported only: batches of one cluster also have another balance of classes
    classes = effective_classes(gather(batch_N["label"], AXIS), n_classes)
    return ({**state, "learner": learner, "stats": stats, "target": target},
            {"loss": loss, "hardness": hardness, "effective_classes": classes})


def effective_classes(label_A, n_classes):
    """exp of the entropy of a batch's labels: so many equally common classes have that entropy."""
    p_C = jnp.bincount(label_A, length=n_classes) / len(label_A)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p_C, p_C)))


# ------------------------------------- 2. divide: k-means (needs only `gather` and `total`)


def kmeans(key, x_ND, k, *, restarts=10, iterations=20, valid_N=None, axis=None, tile=4096):
    """(centres [K, D], inertia): the best of several runs of k-means++ and Lloyd's iterations.

    `nearest(x_ND, centres_KD)` then assigns points to the centres. If the points lie far from the
    origin, subtract their mean from points and centres first. Requires k <= N, because a point can
    be one centre only.

    valid_N: 1 for points, 0 for padding. Padding must stand at the end of the last device's rows.
    Inside `pmap`, `axis` names the mapped axis and x is this device's share of the points. All
    devices then return what one device with all points would. Memory holds x and the distances of
    one `tile` of points, never all distances.
    """
    valid_N = jnp.ones(len(x_ND)) if valid_N is None else valid_N.astype(jnp.float32)
    # distances lose fewest digits where the points lie around 0: see `nearest`
    mean_D = total(valid_N @ x_ND, axis) / total(valid_N.sum(), axis)
    x_ND = (x_ND - mean_D) * valid_N[:, None]

    def once(key):
        draw_KJ = jax.random.uniform(key, (k, n_candidates(k)))
        centres_KD = kmeans_plus_plus(draw_KJ, x_ND, valid_N, axis)
        centres_KD = lloyd(x_ND, centres_KD, iterations, valid_N, axis, tile)
        return centres_KD, total(valid_N @ nearest(x_ND, centres_KD, valid_N, tile)[1], axis)

    centres_RKD, inertia_R = jax.lax.map(once, jax.random.split(key, restarts))
    best = jnp.argmin(inertia_R)
    return centres_RKD[best] + mean_D, inertia_R[best]


def n_candidates(k):
    """Candidates for each centre of k-means++: 2 + ln K, as in the authors' experiments and in
    scikit-learn."""
    return 2 + int(math.log(k))


def kmeans_plus_plus(draw_KJ, x_ND, valid_N, axis=None):
    """First centres [K, D] by greedy k-means++ (Arthur and Vassilvitskii, 2007).

    The first centre is a random point. For every further one, J candidates are drawn from the
    points. The probability of a point is proportional to its mass, the squared distance to its
    nearest centre so far. The candidate that leaves the least sum of masses is the new centre.
    draw_KJ: uniform in [0, 1). Only one draw is used for the first centre.
    """
    first_row = jax.lax.axis_index(axis) * len(x_ND) if axis else 0
    last_row = total(valid_N.sum(), axis).astype(int) - 1  # of the valid rows of all devices
    distance_N = lambda centre_D: valid_N * jnp.square(x_ND - centre_D).sum(1)

    def points(mass_N, draw_J):
        """The points [J, D] where the running sum of the masses first exceeds the draw's part of
        the whole. Masses 1, 0, 3 have running sums 1, 1, 4: draws below 1/4 give the first point,
        the others give the third, and no draw gives the second, which is a centre already."""
        running_A = jnp.cumsum(gather(mass_N, axis))
        row_J = jnp.searchsorted(running_A, draw_J * running_A[-1], side="right")
        row_J = jnp.minimum(row_J, last_row) - first_row  # rounding may lead beyond the last row
        mine_J = (row_J >= 0) & (row_J < len(x_ND))
        # each row is on one device, so that the sum over all devices is that row
        return total(jnp.where(mine_J[:, None], x_ND[row_J], 0), axis)

    def add_centre(mass_N, draw_J):
        centre_JD = points(mass_N, draw_J)
        mass_JN = jnp.minimum(mass_N, jax.vmap(distance_N)(centre_JD))
        left_J = total(mass_JN.sum(1), axis)
        # Two points that only affect each other leave the same sum, whichever becomes a centre. The
        # first of equal candidates is taken, and not the one that rounding favours.
        best = jnp.argmax(left_J <= (1 + 1e-5) * left_J.min())
        return mass_JN[best], centre_JD[best]

    centre_1D = points(valid_N, draw_KJ[0, :1])
    return jnp.concatenate([centre_1D, jax.lax.scan(
        add_centre, distance_N(centre_1D), draw_KJ[1:])[1]])


def lloyd(x_ND, centres_KD, iterations, valid_N, axis=None, tile=4096):
    """Centres [K, D] after Lloyd's iterations. Each one assigns every point to its nearest centre
    and moves each centre to the mean of its points. They stop early once no centre moves.

    A centre that has no points is moved to a point. The first such centre moves to the point that
    is farthest from its own centre, the second one to the next farthest, and so on.
    """
    K = len(centres_KD)

    def reseed(centres_KD, moved_KD, empty_K):
        distance_N = nearest(x_ND, centres_KD, valid_N, tile)[1]
        # the farthest points of each device, and of these the farthest of all devices
        far_F, row_F = jax.lax.top_k(jnp.where(valid_N > 0, distance_N, -1), min(K, len(x_ND)))
        order_K = jax.lax.top_k(gather(far_F, axis), K)[1]
        far_KD = gather(x_ND[row_F], axis)[order_K]
        return jnp.where(empty_K[:, None], far_KD[jnp.cumsum(empty_K) - 1], moved_KD)

    def iteration(carry):
        i, centres_KD, _ = carry
        _, _, sum_KD, count_K = nearest(x_ND, centres_KD, valid_N, tile)
        sum_KD, count_K = total(sum_KD, axis), total(count_K, axis)
        moved_KD = sum_KD / jnp.maximum(count_K, 1)[:, None]
        moved_KD = jax.lax.cond(jnp.any(count_K == 0), reseed, lambda c, moved, e: moved,
                                centres_KD, moved_KD, count_K == 0)
        return i + 1, moved_KD, jnp.any(moved_KD != centres_KD)

    return jax.lax.while_loop(lambda carry: (carry[0] < iterations) & carry[2], iteration,
                              (0, centres_KD, True))[1]


def nearest(x_ND, centres_KD, valid_N=None, tile=4096):
    """(index [N] of each point's nearest centre, squared distance to it [N], sum [K, D] and number
    [K] of each centre's points). Of equally near centres the first counts.

    It goes through a tile of points at a time. The last tile starts earlier than its turn, so that
    it is full as well: 10 points in tiles of 4 are rows 0-3, 4-7 and 6-9, and of the last tile only
    rows 8 and 9 are new. (To fill up the points instead would copy them all.)
    """
    N, K, tile = len(x_ND), len(centres_KD), min(tile, len(x_ND))
    valid_N = jnp.ones(N) if valid_N is None else valid_N
    norm_K = jnp.square(centres_KD).sum(1)

    def one(sums, start):
        at = jnp.minimum(start, N - tile)
        x_TD, valid_T = (jax.lax.dynamic_slice_in_dim(v, at, tile) for v in (x_ND, valid_N))
        counts_T = (at + jnp.arange(tile) >= start) & (valid_T > 0)
        # |x - c|^2 without |x|^2, which does not change which centre is nearest. The difference
        # loses digits where |c| is large compared with what tells the points apart.
        score_TK = norm_K - 2 * jnp.einsum("td,kd->tk", x_TD, centres_KD,
                                           precision=jax.lax.Precision.HIGHEST)
        # the first centre with the least score: on CPUs twice as fast as argmin
        is_least_TK = score_TK <= score_TK.min(1, keepdims=True)
        index_T = jnp.where(is_least_TK, jnp.arange(K), K - 1).min(1)
        distance_T = jnp.square(x_TD - centres_KD[index_T]).sum(1)
        group_T = jnp.where(counts_T, index_T, K)  # group K is dropped by `segment_sum`
        add = lambda v: jax.ops.segment_sum(v, group_T, K)
        return (sums[0] + add(x_TD), sums[1] + add(jnp.ones(tile))), (index_T, distance_T)

    zeros = jnp.zeros_like(centres_KD), jnp.zeros(K)
    (sum_KD, count_K), parts = jax.lax.scan(one, zeros, jnp.arange(0, N, tile))
    # all rows of all tiles but the last, and the new rows of the last
    index_N, distance_N = (jnp.concatenate([v[:-1].reshape(-1), v[-1, -N % tile:]]) for v in parts)
    return index_N, distance_N, sum_KD, count_K


def kmeans_flops(n_fit, n_all, K, D, restarts, iterations):
    """FLOPs of `kmeans` on n_fit points and of assigning n_all points.

    A candidate of k-means++ costs 3 N D. An assignment costs 2 N K D for products and 3 N D for
    distances, and an iteration N D more for sums. All iterations are counted, also those that
    `lloyd` saves by stopping early.
    """
    assign = lambda n: n * D * (2 * K + 3)
    candidates = 1 + (K - 1) * n_candidates(K)
    return restarts * (3 * n_fit * D * candidates + iterations * (assign(n_fit) + n_fit * D)
                       + assign(n_fit)) + assign(n_all)


# --------------------------------------------------------------- 2. divide: partition, experts


def cluster(key, h_ND, k, *, examples, restarts, iterations, seed):
    """(cluster [N] of each representation, seconds). k-means is fitted on a random part of at most
    `examples`, and then all N are assigned. The time to compile does not count."""
    fit = np.sort(np.random.default_rng((seed, 4)).permutation(len(h_ND))[:examples])

    def sharded(x_ND):
        """This host's rows, filled up to a multiple of the devices, and which of them are valid."""
        rows = -(-len(x_ND) // jax.device_count()) * jax.local_device_count()
        mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
        valid = np.arange(rows) + mine.start < len(x_ND)
        return devices.shard({"x": np.pad(x_ND[mine], ((0, rows - len(x_ND[mine])), (0, 0))),
                              "valid": valid})

    fit_to = devices.pmap(lambda key, b: kmeans(
        key, b["x"], k, restarts=restarts, iterations=iterations, valid_N=b["valid"],
        axis=AXIS)[0], (None, 0))
    assign = devices.pmap(lambda centres_KD, b: gather(
        nearest(b["x"], centres_KD, b["valid"])[0], AXIS), (None, 0))
    begin = devices.clock()
    centres_KD = jax.device_get(fit_to(key, sharded(h_ND[fit])))
    cluster_N = np.asarray(assign(centres_KD, sharded(h_ND)))[:len(h_ND)]
    seconds = devices.clock() - begin
    return cluster_N.astype(np.int32), seconds


def partition(arm, cluster_N, label_N, k, seed):
    """Cluster [N] of each example in an arm.

    dnc keeps the clusters of k-means. dnc_random shuffles them among the examples, so that their
    sizes stay. dnc_oracle groups whole classes: the largest class first, each class joins the group
    that has the fewest examples so far.
    """
    if arm == "dnc_random":
        return np.random.default_rng((seed, 5)).permutation(cluster_N)
    if arm == "dnc_oracle":
        count_C, count_K, group_C = np.bincount(label_N), np.zeros(k, int), {}
        for c in np.argsort(-count_C, kind="stable"):
            group_C[c] = count_K.argmin()
            count_K[group_C[c]] += count_C[c]
        return np.array([group_C[c] for c in label_N], np.int32)
    return cluster_N


def expert_steps(sizes, total_steps):
    """Steps of each expert, in proportion to the size of its cluster.

    The paper says "epochs in proportion". We read these as epochs of the whole set. So every expert
    goes over its own cluster equally often. The shares are rounded down, and those with the largest
    remainders get one step more, so that all steps are used.
    """
    N = sum(int(size) for size in sizes)
    steps = [total_steps * int(size) // N for size in sizes]
    remainder = [total_steps * int(size) % N for size in sizes]
    for j in sorted(range(len(steps)), key=lambda j: -remainder[j])[:total_steps - sum(steps)]:
        steps[j] += 1
    return steps


def expert_batches(pool, cluster_N, j, **how):
    """`data.batches` of cluster j alone, so that every negative is from the same cluster. If the
    cluster is smaller than a batch, its images repeat within a batch: then copies of an image are
    among its negatives."""
    return data.batches(pool.subset(pool.ids[cluster_N == j]), wrap=True, **how)


# ----------------------------------------------------------------------------------- 3. distil


def student_init(key, model, n_experts):
    """(params, stats) of the student: an encoder and K + 1 regression heads. A head is Linear,
    ReLU, Linear to the width D of the teachers' representations."""
    key_encoder, key_heads = jax.random.split(key)
    params, stats = resnet.resnet_init(key_encoder, model.encoder)
    D, heads = model.encoder.features, {}
    for i in range(n_experts + 1):
        key_up, key_down = jax.random.split(jax.random.fold_in(key_heads, i))
        heads[f"expert{i - 1}" if i else "base"] = {
            "up": vit.dense_init(key_up, D, model.head_hidden),
            "down": vit.dense_init(key_down, model.head_hidden, D)}
    return {"encoder": params, "heads": heads}, {"encoder": stats}


def head(p, h_ND):
    """A regression head: the prediction [N, D] of a teacher's representation."""
    return vit.dense(p["down"], jax.nn.relu(vit.dense(p["up"], h_ND)))


def distil_loss(base_ND, heads_NKD, to_base_ND, to_own_ND, cluster_N):
    """Mean over images of (2 - 2 cos(base head, base) + 2 - 2 cos(own head, own expert)) / 2. The
    equal weights are recalled, not read in the paper.

    base_ND: predictions of the base head. heads_NKD: predictions of the K expert heads, of which
    only that of an image's cluster is used. None: there are no experts, and only the base's term
    remains. to_base_ND, to_own_ND: the targets, to which no gradient flows.
    """
    regress = lambda y, t: 2 - 2 * jnp.einsum("nd,nd->n", unit(y), jax.lax.stop_gradient(unit(t)))
    loss_N = regress(base_ND, to_base_ND)
    if heads_NKD is not None:
        own_ND = jnp.take_along_axis(heads_NKD, cluster_N[:, None, None], axis=1)[:, 0]
        loss_N = 0.5 * (loss_N + regress(own_ND, to_own_ND))
    return loss_N.mean()


def own_expert(experts, image_NHWC, cluster_N, model):
    """h [N, D] of each image by the expert of its own cluster.

    All K experts on all images would cost K N forwards. Instead the images are sorted by cluster
    and cut into blocks, each of a single cluster, and a block goes through its expert. The blocks
    hold at most a quarter more than N images (`block_shape`). experts: frozen encoders, stacked
    [K, ...].

    Example: the clusters of 4 images are 1, 0, 1, 1, and a block has 2 slots. Sorted by cluster
    they are images 1, 0, 2, 3. The blocks are (1, -) for expert 0, and (0, 2) and (3, -) for expert
    1. So the sorted images are in slots 0, 2, 3, 4. Slots 1 and 5 are empty: they are computed for
    image 0, and nothing reads the result.
    """
    N, K = len(image_NHWC), len(jax.tree.leaves(experts)[0])
    size, n_blocks = block_shape(N, K)
    count_K = jnp.bincount(cluster_N, length=K)
    blocks_K = -(-count_K // size)  # rounded up: (1, 2) in the example
    order_N = jnp.argsort(cluster_N)
    sorted_N = cluster_N[order_N]
    # a sorted image's slot: where its cluster's first block begins, plus its rank in the cluster
    rank_N = jnp.arange(N) - (jnp.cumsum(count_K) - count_K)[sorted_N]
    slot_N = (jnp.cumsum(blocks_K) - blocks_K)[sorted_N] * size + rank_N
    image_S = jnp.zeros(n_blocks * size, int).at[slot_N].set(order_N)
    # block b belongs to the first cluster whose blocks end after it; blocks at the end may be idle
    expert_B = jnp.searchsorted(jnp.cumsum(blocks_K), jnp.arange(n_blocks), side="right")
    expert_B = jnp.minimum(expert_B, K - 1)

    def block(expert_and_images):
        expert, images = expert_and_images
        return represent(jax.tree.map(lambda x: x[expert], experts), image_NHWC[images], model)

    h_BSD = jax.lax.map(block, (expert_B, einops.rearrange(image_S, "(b s) -> b s", s=size)))
    h_SD = einops.rearrange(h_BSD, "b s d -> (b s) d")
    return h_SD[jnp.zeros(N, int).at[order_N].set(slot_N)]  # back in the order of the images


def block_shape(n, k):
    """(slots of a block, number of blocks). n images of k clusters never need more blocks: each
    cluster leaves at most size - 1 slots empty."""
    size = max(1, n // (4 * k))
    return size, (n + k * (size - 1)) // size


def distil_step(state, index, key, batch_N, *, model, optimiser, views, peak, warmup):
    """(state, metrics) after step `index` (from 0) of distillation, inside `pmap`.

    The teachers see the very view that the student sees: a target from another crop would ask the
    student to guess ("consistent teaching", Beyer et al., 2106.05237). They are frozen and in
    evaluation mode.

    Args:
      state: {'learner': {'params', 'opt'}, 'stats' and 'total' as in `contrast_step`, 'base':
        {'params', 'stats'}, 'experts': the same, stacked [K, ...], or absent}.
      batch_N: 'image' uint8 [N, H, W, C]; 'cluster' [N] if there are experts.
      views: only the first view is used.
    """
    image_NHWC = batch_N["image"]
    view, = augment.draw_views(jax.random.fold_in(key, index), devices.places(image_NHWC),
                               image_NHWC, views, 1)
    cluster_N, experts = batch_N.get("cluster"), state.get("experts")
    to_base_ND = represent(state["base"], view, model)
    to_own_ND = own_expert(experts, view, cluster_N, model) if experts else None

    def loss_of(params):
        h_ND, stats = resnet.resnet_apply(params["encoder"], state["stats"]["encoder"], view,
                                          model.encoder, train=True)
        heads = {name: head(p, h_ND) for name, p in params["heads"].items()}
        heads_NKD = jnp.stack([heads[f"expert{j}"] for j in range(len(heads) - 1)],
                              axis=1) if experts else None
        return distil_loss(heads["base"], heads_NKD, to_base_ND, to_own_ND, cluster_N), stats

    (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state["learner"]["params"])
    loss, grads = devices.mean((loss, grads))
    rate = warmup_cosine(index, state["total"], jnp.round(warmup * state["total"]), peak)
    learner = update(state["learner"], grads, optimiser, rate)
    return {**state, "learner": learner, "stats": {"encoder": stats}}, {"loss": loss}


# ------------------------------------------------------------------------------------ the bill


def plan(arm, steps, fractions, flops_steps=0):
    """{'base', 'experts', 'distil'}: steps of the stages of an arm. They add up to `steps`, and for
    `moclr_flops` to `flops_steps`. Without experts, the student gets the experts' steps as well."""
    if arm in ("moclr", "moclr_flops"):
        return {"base": flops_steps if arm == "moclr_flops" else steps, "experts": 0, "distil": 0}
    base, experts = (round(f * steps) for f in fractions[:2])
    distil = steps - base - experts
    return {"base": base, "experts": experts if arm in DIVIDES else 0,
            "distil": distil if arm in DIVIDES else distil + experts}


def step_flops(role, b, model, *, K=0):
    """FLOPs of one step of b images. A training step is three forwards (one and its backward).

    MoCLR: for each of two views, a training step online and a forward of the target. Distillation:
    a training step of the student with its K + 1 heads, a forward of the base, and the forwards of
    `own_expert` on one device (on more, its blocks are smaller and as well filled).
    """
    F, F_projected = forward_flops(model)
    if role in ("base", "experts"):
        return 2 * (3 + 1) * b * F_projected
    assert role == "distillation", role
    F_heads = (K + 1) * 4 * model.encoder.features * model.head_hidden
    own = math.prod(block_shape(b, K)) if K else 0
    return 3 * b * (F + F_heads) + b * F + own * F


def clustering_flops(model, config, N):
    """FLOPs of the clusters of N images: a forward of each by the base, and k-means."""
    return N * forward_flops(model)[0] + kmeans_flops(
        min(config.kmeans_examples, N), N, config.clusters, model.encoder.features, config.restarts,
        config.kmeans_iterations)


def declared_flops(arm, steps, model, config, N):
    """{role: FLOPs} of a whole arm, whose stages have these `steps`, on a pool of N images.
    dnc_random pays for the clusters too, because it uses their sizes. dnc_oracle gets its groups
    for nothing."""
    b, K = config.batch_size, config.clusters if arm in DIVIDES else 0
    return {"base": steps["base"] * step_flops("base", b, model),
            "clustering": clustering_flops(model, config, N) * (arm in ("dnc", "dnc_random")),
            "experts": steps["experts"] * step_flops("experts", b, model),
            "distillation": steps["distil"] * step_flops("distillation", b, model, K=K)}


def budget(config, model, N):
    """{arm: steps by stage}. `moclr_flops` gets the steps that cost as much as dnc."""
    fractions = config.base_fraction, config.experts_fraction, config.distil_fraction
    dnc = declared_flops("dnc", plan("dnc", config.steps, fractions), model, config, N)
    equal = max(1, round(sum(dnc.values()) / step_flops("base", config.batch_size, model)))
    return {arm: plan(arm, config.steps, fractions, equal) for arm in config.arms}


# ------------------------------------------------------------------------- training, evaluation


def train_stage(stage, state, step, key, load, evaluate, **cost):
    """Trains a stage, from its last checkpoint to its end, and returns the state.

    step: `contrast_step` or `distil_step` as a `devices.pmap`. load(start) yields the sharded
    batches from step `start` on. evaluate(state, ends) -> metrics. cost: what `stage.count` charges
    for a step.
    """
    state = stage.resume(state)
    for index, batch in stage.batches(load):
        state, metrics = step(state, index, key, batch)
        stage.count(metrics, **cost)
        if stage.evaluates:
            stage.write(evaluate(state, stage.ends))
        stage.save(state)
    return state


def make_forward(model):
    """`devices.pmap` of (frozen encoder, sharded batch) -> features 'h' and everything in the batch
    but the image, gathered from all devices. What is clustered and evaluated is the whole image (of
    an oblong one the centre square, which is cut when it is read)."""
    def forward(net, batch):
        h_ND = represent(net, augment.normalise(augment.rgb(batch["image"])), model)
        out = {k: v for k, v in batch.items() if k != "image"} | {"h": h_ND}
        return {k: gather(v, AXIS) for k, v in out.items()}
    return devices.pmap(forward, in_axes=(None, 0))


def evaluate(net, forward, pools, batch_size, n_classes, ends):
    """Metrics of a frozen encoder on (training pool, test pool). On the way: nearest neighbours,
    which are cheap. At the end also the linear probe, the paper's own measure and so the headline.
    """
    train, test = (reference.forward_all(net, forward, pool, batch_size)[0] for pool in pools)
    metrics = probe.knn_metrics(train, test, n_classes)
    return metrics | probe.linear_metrics(train, test, n_classes) if ends else metrics


def pixels(pool, batch_size):
    """The images themselves in the place of features: no method should be worth less."""
    parts = [(b["image"][b["valid"]], b["label"][b["valid"]]) for b in data.sweep(pool, batch_size)]
    image, label = (np.concatenate(x) for x in zip(*parts))
    return {"h": einops.rearrange(image, "n h w c -> n (h w c)").astype(np.float32), "label": label}


# ---------------------------------------------------------------------------------- Figure 2


@dataclasses.dataclass
class Experiment:
    """One seed: what all stages of all arms share."""
    config: flags.Namespace
    run: train.Run
    seed: int
    model: Model
    pool: data.Pool
    label_N: np.ndarray  # of the pool's examples; only for reports, and for dnc_oracle
    test_pool: data.Pool
    n_classes: int
    steps: dict  # `make_steps`
    forward: object  # `make_forward`

    def run_arm(self, arm, steps):
        """Figure 2 of the paper, for an arm with so many steps in each stage (`plan`).

        Returns: (cluster [N] of each image or None, its agreement with the labels or None).
        """
        everything = functools.partial(data.batches, self.pool)
        if not steps["distil"]:  # moclr, moclr_flops
            self.contrast(arm, steps["base"], everything)
            return None, None
        base, spent = self.contrast("base", steps["base"], everything)
        cluster_N, nmi, experts = None, None, []
        if arm in DIVIDES:
            cluster_N, spent = self.divide(arm, base, spent)
            nmi = probe.nmi(cluster_N, self.label_N)
            sizes = np.bincount(cluster_N, minlength=self.config.clusters)
            for j, n_steps in enumerate(expert_steps(sizes, steps["experts"])):
                expert, spent = self.expert(f"{arm}_expert{j}", n_steps, j, cluster_N, base, spent)
                experts.append(expert)
        self.distil(arm, steps["distil"], base, experts, cluster_N, nmi, spent)
        return cluster_N, nmi

    def keys(self):
        """Keys for first weights, for steps and for k-means."""
        return jax.random.split(jax.random.key(self.seed), 3)

    def contrast(self, name, n_steps, batches, *, start_from=None, spent=None, fold=None,
                 role="base"):
        """Trains MoCLR: (state, `train.Totals`).

        batches(**how) yields those of `data.batches`. fold: a number that gives an expert random
        keys of its own.
        """
        config, (key_init, key_steps, _) = self.config, self.keys()
        if fold is not None:
            key_init, key_steps = (jax.random.fold_in(key, fold) for key in (key_init, key_steps))

        def load(start):
            for batch in batches(seed=self.seed, batch_size=config.batch_size, start=start,
                                 stop=n_steps, host=devices.host()):
                yield devices.shard({k: batch[k] for k in ("image", "label")})

        state = new_state(key_init, self.model, lars(config.weight_decay), n_steps, start_from)
        return self._train(name, n_steps, spent, state, self.steps["contrast"], key_steps, load,
                           role, evaluates=role == "base")

    def expert(self, name, n_steps, j, cluster_N, base, spent):
        """Trains expert j, on cluster j alone: (state, `train.Totals`).

        Experts are trained one after the other, each on all devices: their numbers of steps differ,
        and batch norm and negatives want the whole batch.
        """
        size, b = int((cluster_N == j).sum()), self.config.batch_size
        if n_steps == 0:
            logging.warning("%s: %d examples get no step: the base stands in", name, size)
            return base, spent
        if size < b:
            logging.warning("%s: %d examples are less than a batch of %d: it is filled by going "
                            "round", name, size, b)
        return self.contrast(
            name, n_steps, functools.partial(expert_batches, self.pool, cluster_N, j), spent=spent,
            start_from=base if self.config.expert_init == "base" else None, fold=1 + j,
            role="experts")

    def divide(self, arm, base, spent):
        """(cluster [N] of each image in this arm, `train.Totals`).

        k-means clusters the base's representations of the whole images, in evaluation mode and
        L2-normalised. It runs once, and its clusters are kept in the work directory. Each arm that
        uses them is charged for it.
        """
        config, cluster_N = self.config, None
        if arm != "dnc_oracle":
            net, key = encoder_of(base), self.keys()[2]

            def make():
                out, seconds = reference.forward_all(net, self.forward, self.pool,
                                                     config.batch_size)
                cluster_N, took = cluster(
                    key, probe.unit(out["h"]), config.clusters, examples=config.kmeans_examples,
                    restarts=config.restarts, iterations=config.kmeans_iterations, seed=self.seed)
                return {"cluster": cluster_N}, seconds + took
            arrays, seconds = reference.cached(
                self.run.path(f"assignment-{self.seed}.npz"),
                reference.made_by(net, self.pool, clusters=config.clusters), make)
            cluster_N = arrays["cluster"]
            spent = spent.plus(seconds=seconds, examples_scored=len(self.pool),
                               flops={"clustering": clustering_flops(
                                   self.model, config, len(self.pool))})
        return partition(arm, cluster_N, self.label_N, config.clusters, self.seed), spent

    def distil(self, arm, n_steps, base, experts, cluster_N, nmi, spent):
        """Trains the student on base and experts."""
        config = self.config
        key_init, key_steps = (jax.random.fold_in(key, 0) for key in self.keys()[:2])

        def load(start):
            for batch in data.batches(self.pool, seed=self.seed, batch_size=config.batch_size,
                                      start=start, stop=n_steps, host=devices.host()):
                if cluster_N is not None:
                    batch["cluster"] = cluster_N[np.searchsorted(self.pool.ids, batch["id"])]
                yield devices.shard({k: batch[k] for k in ("image", "cluster") if k in batch})

        state = new_student(key_init, self.model, lars(config.weight_decay), n_steps,
                            encoder_of(base), [encoder_of(expert) for expert in experts],
                            config.student_init == "base")
        return self._train(arm, n_steps, spent, state, self.steps["distil", len(experts)],
                           key_steps, load, "distillation", nmi=nmi)

    def _train(self, name, n_steps, spent, state, step, key, load, role, evaluates=True, nmi=None):
        """(state, `train.Totals`) at the end of a stage."""
        b = self.config.batch_size
        stage = self.run.stage(name, self.seed, n_steps, spent=spent)

        def metrics(state, ends):
            if not evaluates:
                return {}
            got = evaluate(encoder_of(state), self.forward, (self.pool, self.test_pool), b,
                           self.n_classes, ends)
            return got | {"nmi": nmi} if ends and nmi is not None else got
        # 0 while contrasting, where there are no heads
        n_experts = len(state["learner"]["params"].get("heads", [0])) - 1
        state = train_stage(stage, state, step, key, load, metrics, trained=b, scored=b,
                            flops={role: step_flops(role, b, self.model, K=n_experts)})
        return state, stage.totals


def make_steps(config, model, n_classes):
    """{'contrast', and ('distil', number of experts)}: steps as a `devices.pmap`."""
    shared = dict(model=model, optimiser=lars(config.weight_decay), warmup=config.warmup)
    views = augment.Views(config.crop_area, config.jitter, tuple(config.blur),
                          tuple(config.solarise))
    # Distillation has one view. BYOL's first view is always blurred, so that single view has the
    # mean probabilities of the two.
    mean = lambda p: (sum(p) / 2,) * 2
    single = dataclasses.replace(views, blur=mean(views.blur), solarise=mean(views.solarise))
    program = lambda step, **more: devices.pmap(functools.partial(step, **shared, **more),
                                                (None, None, None, 0), donate=True)
    scale = config.batch_size / 256
    return {"contrast": program(
                contrast_step, views=views, temperature=config.temperature, m0=config.m0,
                peak=config.learning_rate * scale, n_classes=n_classes,
                same_view_negatives=config.same_view_negatives),
            **{("distil", n): program(distil_step, views=single,
                                      peak=config.distil_learning_rate * scale)
               for n in (0, config.clusters)}}


def new_state(key, model, optimiser, n_steps, start_from=None):
    """State of `contrast_step`, from scratch or from the parameters and statistics of another."""
    params, stats = (start_from["learner"]["params"], start_from["stats"]) if start_from else init(
        key, model)
    return {"learner": {"params": params, "opt": optimiser.init(params)}, "stats": stats,
            "target": params, "total": np.int32(n_steps)}


def new_student(key, model, optimiser, n_steps, base, experts=(), from_base=False):
    """State of `distil_step`. The frozen teachers are part of it."""
    params, stats = student_init(key, model, len(experts))
    if from_base:
        params["encoder"], stats["encoder"] = base["params"], base["stats"]
    teachers = {"base": base}
    if experts:
        teachers["experts"] = jax.tree.map(lambda *x: np.stack(x), *experts)
    return {"learner": {"params": params, "opt": optimiser.init(params)}, "stats": stats,
            "total": np.int32(n_steps), **teachers}


# --------------------------------------------------------------------------------------- main


def check(config):
    """Raises ValueError, naming the flag, for flags that do not go together, whatever the data.
    Also turns --blur and --solarise into lists of numbers, in place."""
    require = functools.partial(flags.require, config)
    flags.require_arms(config, ARMS)
    require(config.kmeans_examples >= config.clusters, "kmeans_examples",
            f"at least one for each of {config.clusters} clusters")
    for flag in ("blur", "solarise"):
        try:
            config[flag] = [float(p) for p in config[flag]]
        except ValueError:
            config[flag] = []
        require(len(config[flag]) == 2 and all(0 <= p <= 1 for p in config[flag]), flag,
                "two probabilities, of the first view and the second")
    parts = [config.base_fraction, config.experts_fraction, config.distil_fraction]
    if abs(sum(parts) - 1) > 1e-6:
        raise ValueError(f"--base_fraction, --experts_fraction, --distil_fraction: {parts}: want "
                         "three fractions that add up to 1")
    require(min(plan("dnc", config.steps, parts).values()) >= 1, "steps",
            "at least one for each stage")
    devices.divides(batch_size=config.batch_size)
    try:
        resnet.size(config.model)
    except ValueError as e:
        raise ValueError(f"--model: {e}") from None


def check_data(config, source, N):
    """The same for what depends on the data; N is the size of a training pool."""
    side, _, channels = source.image_shape
    if side < 8 or channels not in (1, 3):
        raise ValueError(f"--image_size: images of {side} px in {channels} channels: want 8 px or "
                         "more, in 1 or 3")
    data.check_batch(range(N), config.batch_size, f"--batch_size={config.batch_size}")
    flags.require(config, config.clusters <= N, "clusters", f"at most one per example, {N}")
    n_classes = len(source.class_names)
    if config.clusters > n_classes and "dnc_oracle" in config.arms:
        raise ValueError(f"--clusters={config.clusters}: dnc_oracle has only {n_classes} classes "
                         "to group")


def training_pool(source, label_N, seed, class_cap=0):
    """(pool, label [N] of its examples): the whole source, or at most `class_cap` of a class."""
    pool = data.Pool(source, seed=seed)
    if not class_cap:
        return pool, label_N
    order_N = np.random.default_rng((seed, 6)).permutation(len(pool))
    kept = np.sort(np.concatenate([order_N[label_N[order_N] == c][:class_cap]
                                   for c in np.unique(label_N)]))
    return pool.subset(pool.ids[kept]), label_N[kept]


def main():
    config = flags.resolve(PRESETS)
    devices.start(config)
    check(config)
    source, test_source = data.open_splits(config, need=("label",),
                                           toy_image_size=TOY["image_size"])
    b, n_classes = config.batch_size, len(source.class_names)
    labels = np.concatenate([x["label"][x["valid"]] for x in data.sweep(data.Pool(source), b)])
    pools = {seed: training_pool(source, labels, seed, config.class_cap) for seed in config.seeds}
    N = len(pools[config.seeds[0]][0])  # for each seed the same
    check_data(config, source, N)
    model = Model(resnet.ResNet(config.model, source.image_shape[0], dtype=config.dtype),
                  config.hidden, config.embed, config.head_hidden)
    steps_of = budget(config, model, N)
    run = train.Run(config, {"split": source.fingerprint, "eval_split": test_source.fingerprint})
    shared = dict(model=model, test_pool=data.Pool(test_source), n_classes=n_classes,
                  steps=make_steps(config, model, n_classes), forward=make_forward(model))

    shown = None
    for seed in config.seeds:
        pool, label_N = pools[seed]
        experiment = Experiment(config=config, run=run, seed=seed, pool=pool, label_N=label_N,
                                **shared)
        for arm in config.arms:
            cluster_N, nmi = experiment.run_arm(arm, steps_of[arm])
            if cluster_N is not None and (shown is None or arm == "dnc"):
                shown = dict(pool=pool, cluster_N=cluster_N, nmi=nmi)

    if jax.process_index() == 0:
        report.conclude(config.workdir, clusters=shown)
        print("", batches_seen(run.metrics.rows()), sep="\n")
        if source.image_shape[0] <= 32:  # on larger images this is a probe of a million inputs
            got = probe.linear_metrics(pixels(pool, b), pixels(shared["test_pool"], b), n_classes)
            print("linear probe on pixels:", ", ".join(f"{k} {v:.3f}" for k, v in got.items()
                                                       if v is not None))
        if config.dataset == "toy":
            print("toy is too small, and its clusters follow the backgrounds, not the classes. It "
                  "checks that all stages run\nand is no evidence for DnC or against it.")


def batches_seen(rows):
    """A line for each stage that contrasts: balance of its batches and hardness of its negatives,
    means over its rows and experts."""
    stages = {}
    for r in rows:
        if "hardness" in r:
            stages.setdefault(r["arm"].rstrip("0123456789"), []).append(r)
    return "\n".join(f"{name}: {np.mean([r['effective_classes'] for r in rs]):.1f} effective "
                     f"classes in a batch, log sum exp of the negatives "
                     f"{np.mean([r['hardness'] for r in rs]):.2f}" for name, rs in stages.items())


if __name__ == "__main__":
    define_flags()
    flags.run(main)
