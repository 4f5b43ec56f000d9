"""DnC: Divide and Contrast (Tian, Henaff, van den Oord, 2105.08054).

Self-supervised learning from uncurated, heavy-tailed images. Contrasting images of one cluster
gives hard negatives, and rare clusters get models of their own. There are three stages:
  1. base: any self-supervised method on all images; here, as in the paper, MoCLR, which is
     SimCLR's loss against a momentum encoder                                   `contrast_step`
  2. divide the images by k-means of the base's representations                `kmeans`, `divide`
     and train an expert on each cluster with the same loss                    `contrast_step`
  3. distil base and experts into one student. From each image it predicts the base's representation
     and that of the expert of the image's cluster                             `distil_step`
Only encoders are evaluated, frozen (common/probe.py). The views are drawn as BYOL's
(common/augment.py); small images have weaker ones.

Controls: `moclr` trains on as many images as all stages of dnc together, and `moclr_flops` costs as
many FLOPs as they do (`budget`). Batches of one cluster have harder negatives, but also another
balance of classes. So `dnc_random` divides at random into parts of the same sizes, `dnc_oracle`
divides by label, and `self_distil` has no experts: it gives their steps to the student, which costs
less.

Dimension letters: N images of a device (of the pool where a stage is planned or images are
divided), A of all devices, E projection, D representation, K clusters, J candidates of k-means++, R
restarts, T rows of a tile, B blocks of S slots, C classes or channels, H W image. F is FLOPs of a
forward.

Three minutes on one CPU:  python dnc.py
The measurements:          python dnc.py --preset=wild --dataset=path/to/wild/1.0.0
ResNet-50, 224 px:         python dnc.py --preset=imagenet_R50  (a trial, on generated images)

There is no official code, and we could not read the paper's text in full. docs/differences.md lists
what is recalled or chosen, and which of it is a flag.
"""

import dataclasses
import functools
import math

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
    # the table of docs/results.md: a heavy-tailed mixture of eight sources, 25,085 images, halved
    # to 16 px. 65 minutes a seed on one CPU core: 46 epochs, not thousands. So short, it pays to
    # start experts and student from the base, and to give the student more than a sixth.
    "wild": dict(
        dataset="wild", arms=["moclr_flops", "dnc", "dnc_random"], image_size=16, hidden=256,
        head_hidden=256, crop_area=0.2, steps=18000, eval_every=1800, learning_rate=32.0,
        distil_learning_rate=32.0, clusters=10, base_fraction=0.3, experts_fraction=0.3,
        expert_init="base", student_init="base"),
    # BYOL's model, rate, decay and m0 for 1000 epochs, for a trial on generated images. The paper's
    # 3000 epochs, as recalled: --dataset=imagenet2012 --eval_split=validation --batch_size=4096
    # --steps=938355
    "imagenet_R50": dict(
        arms=["moclr", "moclr_flops", "dnc", "dnc_random", "self_distil"], image_size=224,
        toy_examples=4096, toy_tail=1.0, model="50", hidden=4096, embed=256, head_hidden=4096,
        dtype="bfloat16", crop_area=0.08, jitter=1.0, blur1=1.0, blur2=0.1, solarise2=0.2, m0=0.996,
        clusters=5, steps=1000, batch_size=256, eval_every=500, learning_rate=0.2,
        distil_learning_rate=0.2, warmup=0.01),
}


def define_flags():
    f = flags.Group("Method")
    f.names("arms", ["moclr", "dnc", "dnc_random", "self_distil"], f"of {', '.join(ARMS)}; the "
            "first is the baseline")
    f.number("base_fraction", 1 / 3, "(0, 1)", "fraction of --steps that trains the base")
    f.number("experts_fraction", 1 / 2, "(0, 1)", "fraction of --steps that the experts share, in "
             "proportion to the sizes of their clusters; what is left trains the student (the "
             "paper's split, as we recall it, is 1000 + 1500 + 500 epochs)")
    f.integer("clusters", 4, "[1, inf)", "K (paper: 5, 10 or more)")
    f.integer("restarts", 10, "[1, inf)", "runs of k-means, of which the best is taken")
    f.integer("kmeans_iterations", 20, "[1, inf)", "Lloyd's iterations in each run, at most")
    f.integer("kmeans_examples", 1_000_000, "[1, inf)", "k-means is fitted on at most so many "
              "images; then all are assigned")
    f.choice("expert_init", "scratch", ["scratch", "base"], "initial weights of the experts")
    f.choice("student_init", "scratch", ["scratch", "base"], "initial weights of the student")
    f.number("temperature", 0.1, "(0, inf)", "tau of the contrastive loss")
    f.switch("same_view_negatives", True, "the targets of the other images in the same view "
             "are negatives too (as in SimCLR; not in MoCo v3)")
    f.number("m0", 0.97, "[0, 1]", "decay of the momentum encoder at the start; 1 at the end "
             "(BYOL: .97 for 40 epochs, .99 for 100 and 300, .996 for 1000)")

    f = flags.Group("Augmentation (the defaults are for images up to 64 px: no blur, as SimCLR for "
                    "CIFAR; crops and jitter weaker than BYOL's are our choice)")
    f.number("crop_area", 0.3, "(0, 1]", "least area of a crop (BYOL: 0.08)")
    f.number("jitter", 0.5, "[0, 2.5]", "strength of the colour jitter, times BYOL's (beyond 2.5 "
             "the factor of the contrast could be negative)")
    f.number("blur1", 0.0, "[0, 1]", "probability of blur in the first view (BYOL: 1.0)")
    f.number("blur2", 0.0, "[0, 1]", "the same in the second view (BYOL: 0.1)")
    f.number("solarise1", 0.0, "[0, 1]", "probability of solarisation in the first view (BYOL: 0)")
    f.number("solarise2", 0.0, "[0, 1]", "the same in the second view (BYOL: 0.2)")

    f = flags.Group("Models")
    f.text("model", "8/16", "ResNet: 18, 50, or 'depth/width' with depth 18, 50 or 6n + 2. For "
           "images up to 64 px its first convolution is 3 x 3, without pooling")
    f.integer("hidden", 128, "[1, inf)", "hidden width of the projector (BYOL: 4096)")
    f.integer("embed", 64, "[1, inf)", "width E of the projection (BYOL: 256)")
    f.integer("head_hidden", 128, "[1, inf)", "hidden width of the student's regression heads")
    f.choice("dtype", "float32", ["float32", "bfloat16"], "type of the activations")

    f = flags.Group("Optimisation")
    f.integer("steps", 600, "[1, inf)", "updates, in all stages of an arm together; moclr_flops "
              "gets as many as dnc's FLOPs pay for")
    f.integer("batch_size", 64, "[2, inf)", "images per update; from 2 on, so that each has a "
              "negative")
    f.number("learning_rate", 4.0, "(0, inf)", "of LARS, at 256 images; times batch_size / 256; "
             "linear warm-up, cosine to 0 in each stage (BYOL: .45 for 40 and 100 epochs, .3 for "
             "300, .2 for 1000)")
    f.number("distil_learning_rate", 4.0, "(0, inf)", "the same, of the distillation")
    f.number("weight_decay", 1.5e-6, "[0, inf)", "added to the gradient of kernels before LARS "
             "scales it")
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
    """h [N, D] of images whose colours are normalised, by a frozen encoder {'params', 'stats'} in
    evaluation mode."""
    return resnet.resnet_apply(net["params"], net["stats"], image_NHWC, model.encoder,
                               train=False)[0]


def unit(z):
    """Rows divided by their length. A row of zeros stays zero and has a finite gradient."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), -1, keepdims=True), 1e-12))


def gather(x, axis=None):
    """Rows of all devices along the mapped axis of that name, in order. Without an axis, x."""
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def encoder_of(state):
    """What a stage leaves to the next: {'params', 'stats'} of its online encoder."""
    return {"params": state["learner"]["params"]["encoder"], "stats": state["stats"]["encoder"]}


# -------------------------------------------------------------------------- 1. base: MoCLR


def info_nce(q_NE, k_AE, temperature, own_view_AE=None, offset=0):
    """(loss, hardness): InfoNCE of the online projections q against the targets k.

    loss: the mean over rows i of -log softmax of q_i.k / tau at i's own row of k. The negatives of
    i are all other rows of k and, if `own_view_AE` is given, all other rows of it (the targets of
    q's own view). hardness: the mean of log sum exp over the negatives alone. All rows must be
    L2-normalised. Row i of q owns row offset + i of k.
    """
    own_NA = jax.nn.one_hot(offset + jnp.arange(len(q_NE)), len(k_AE), dtype=bool)
    logits_NA = jnp.einsum("ne,ae->na", q_NE, k_AE) / temperature
    positive_N = jnp.sum(logits_NA, axis=1, where=own_NA)
    negatives = jnp.where(own_NA, -jnp.inf, logits_NA)
    if own_view_AE is not None:
        same_NA = jnp.einsum("ne,ae->na", q_NE, own_view_AE) / temperature
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
    own_view = (k1_AE, k2_AE) if same_view_negatives else (None, None)
    loss1, hardness1 = info_nce(q1_NE, k2_AE, temperature, own_view[0], offset)
    loss2, hardness2 = info_nce(q2_NE, k1_AE, temperature, own_view[1], offset)
    return 0.5 * (loss1 + loss2), 0.5 * (hardness1 + hardness2)


def ema_decay(step, total_steps, m0):
    """Decay of the momentum encoder: 1 - (1 - m0) (1 + cos(pi step / total_steps)) / 2. It rises
    from m0 at the start to 1 at the end (BYOL)."""
    return 1 - (1 - m0) * (1 + jnp.cos(jnp.pi * step / total_steps)) / 2


def warmup_cosine(step, total_steps, warmup, peak):
    """Learning rate: from 0 to `peak` along a line in the first part `warmup` of the steps, then
    along half a cosine to 0 at `total_steps`."""
    warmup = jnp.round(warmup * total_steps)
    progress = jnp.clip((step - warmup) / jnp.maximum(total_steps - warmup, 1), 0, 1)
    return peak * jnp.where(step < warmup, step / jnp.maximum(warmup, 1),
                            (1 + jnp.cos(jnp.pi * progress)) / 2)


def lars(weight_decay, *, trust=1e-3, momentum=0.9):
    """LARS as in BYOL's code, without the learning rate, which `update` applies.

    g = gradient + weight_decay w, u = trust |w| / |g| g, m = momentum m + u. Where |w| or |g| is 0,
    u = g. Only kernels, the leaves named 'w' of nested dicts, have decay and trust ratio. For
    biases and batch norms u is the gradient. m is to be subtracted: with `optax.apply_updates`,
    chain this with `optax.scale_by_learning_rate(rate)`, which negates it.
    """
    is_kernel = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "w", params)
    return optax.chain(optax.masked(optax.add_decayed_weights(weight_decay), is_kernel),
                       optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), is_kernel),
                       optax.trace(momentum))


def update(learner, grads, optimiser, rate):
    """One step of {'params', 'opt'}: w - rate m, where m is the optimiser's update.

    The rate is an argument of every step, so that stages of different lengths share one program.
    It stands outside the momentum, as in BYOL's code. In the paper of LARS (You et al., 1708.03888)
    it stands inside: there the momentum keeps each update times the rate of its own step.
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
    rate = warmup_cosine(index, state["total"], warmup, peak)
    learner = update(state["learner"], grads, optimiser, rate)
    target = optax.incremental_update(learner["params"], state["target"],
                                      1 - ema_decay(index, state["total"], m0))
    # reported only: batches of one cluster also have another balance of classes
    classes = effective_classes(gather(batch_N["label"], AXIS), n_classes)
    return ({**state, "learner": learner, "stats": stats, "target": target},
            {"loss": loss, "hardness": hardness, "effective_classes": classes})


def new_state(key, model, optimiser, n_steps, start_from=None):
    """State of `contrast_step`, from scratch or from the parameters and statistics of another. The
    momentum encoder starts as a copy of the online one."""
    params, stats = (start_from["learner"]["params"], start_from["stats"]) if start_from else init(
        key, model)
    return {"learner": {"params": params, "opt": optimiser.init(params)}, "stats": stats,
            "target": params, "total": np.int32(n_steps)}


def effective_classes(label_A, n_classes):
    """exp of the entropy of a batch's labels: the number of equally common classes that would have
    the same entropy."""
    p_C = jnp.bincount(label_A, length=n_classes) / len(label_A)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p_C, p_C)))


# ------------------------------------------------- 2. divide: k-means, which stands alone


def kmeans(key, x_ND, k, *, restarts=10, iterations=20, tile=4096):
    """(centres [K, D], inertia): the best of several runs of k-means++ and Lloyd's iterations.

    `nearest(x_ND, centres_KD)` then assigns points to the centres. If the points lie far from the
    origin, subtract their mean from points and centres first. Requires k <= N, because a point can
    be one centre only. It runs on one device, whose memory holds x, a centred copy of it, the
    distance of each point to each of J = 2 + ln K candidates, and one `tile` of points' distances
    to all centres.
    """
    x_ND = jnp.asarray(x_ND, jnp.float32)
    mean_D = x_ND.mean(0)  # distances lose fewest digits where the points lie around 0
    x_ND -= mean_D

    def once(key):
        draw_KJ = jax.random.uniform(key, (k, n_candidates(k)))
        centres_KD = lloyd(x_ND, kmeans_plus_plus(draw_KJ, x_ND), iterations, tile)
        return centres_KD, nearest(x_ND, centres_KD, tile)[1].sum()

    centres_RKD, inertia_R = jax.lax.map(once, jax.random.split(key, restarts))
    best = jnp.argmin(inertia_R)
    return centres_RKD[best] + mean_D, inertia_R[best]


def n_candidates(k):
    """Candidates for each centre of k-means++: 2 + ln K, as in scikit-learn."""
    return 2 + int(math.log(k))


def kmeans_plus_plus(draw_KJ, x_ND):
    """First centres [K, D] by greedy k-means++ (Arthur and Vassilvitskii, 2007).

    The first centre is a random point. For every further one, J candidates are drawn from the
    points. The probability of a point is proportional to its mass, the squared distance to its
    nearest centre so far. The candidate that leaves the least sum of masses is the new centre.
    draw_KJ: uniform in [0, 1). Only one draw is used for the first centre.
    """
    distance_N = lambda centre_D: jnp.square(x_ND - centre_D).sum(1)

    def points(mass_N, draw_J):
        """The points [J, D] where the running sum of the masses first exceeds the draw's part of
        the whole. Masses 1, 0, 3 have running sums 1, 1, 4: draws below 1/4 give the first point,
        the others give the third, and no draw gives the second, which is a centre already."""
        running_N = jnp.cumsum(mass_N)
        row_J = jnp.searchsorted(running_N, draw_J * running_N[-1], side="right")
        return x_ND[jnp.minimum(row_J, len(x_ND) - 1)]  # rounding may lead beyond the last row

    def add_centre(mass_N, draw_J):
        centre_JD = points(mass_N, draw_J)
        mass_JN = jnp.minimum(mass_N, jax.vmap(distance_N)(centre_JD))
        left_J = mass_JN.sum(1)
        # Candidates can leave equal sums, such as two points that are nearest to each other alone.
        # Rounding must not choose between them: the first is taken.
        best = jnp.argmax(left_J <= (1 + 1e-5) * left_J.min())
        return mass_JN[best], centre_JD[best]

    centre_1D = points(jnp.ones(len(x_ND)), draw_KJ[0, :1])
    return jnp.concatenate([centre_1D, jax.lax.scan(
        add_centre, distance_N(centre_1D), draw_KJ[1:])[1]])


def lloyd(x_ND, centres_KD, iterations, tile=4096):
    """Centres [K, D] after Lloyd's iterations. Each one assigns every point to its nearest centre
    and moves each centre to the mean of its points. They stop early once no centre moves.

    A centre that has no points is moved to a point. The first such centre moves to the point that
    is farthest from its own centre, the second one to the next farthest, and so on.
    """
    K = len(centres_KD)

    def iteration(carry):
        i, centres_KD, _ = carry
        index_N, distance_N = nearest(x_ND, centres_KD, tile)
        sum_KD = jax.ops.segment_sum(x_ND, index_N, K)
        count_K = jnp.bincount(index_N, length=K)
        empty_K = count_K == 0
        far_KD = x_ND[jax.lax.top_k(distance_N, K)[1]]  # the farthest points, the farthest first
        moved_KD = jnp.where(empty_K[:, None], far_KD[jnp.cumsum(empty_K) - 1],
                             sum_KD / jnp.maximum(count_K, 1)[:, None])
        return i + 1, moved_KD, jnp.any(moved_KD != centres_KD)

    return jax.lax.while_loop(lambda carry: (carry[0] < iterations) & carry[2], iteration,
                              (0, centres_KD, True))[1]


def nearest(x_ND, centres_KD, tile=4096):
    """(index [N] of each point's nearest centre, squared distance to it [N]), a tile of points at a
    time. Of equally near centres the first counts."""
    N, K, tile = len(x_ND), len(centres_KD), min(tile, len(x_ND))
    x_ND, centres_KD = jnp.asarray(x_ND, jnp.float32), jnp.asarray(centres_KD, jnp.float32)
    norm_K = jnp.square(centres_KD).sum(1)

    def one(start):
        x_TD = jax.lax.dynamic_slice_in_dim(x_ND, start, tile)
        # |x - c|^2 without |x|^2, which does not change which centre is nearest. The difference
        # loses digits where |c| is large compared with what tells the points apart.
        score_TK = norm_K - 2 * jnp.matmul(x_TD, centres_KD.T, precision="highest")
        # the first centre with the least score: on CPUs twice as fast as argmin
        is_least_TK = score_TK <= score_TK.min(1, keepdims=True)
        index_T = jnp.where(is_least_TK, jnp.arange(K), K - 1).min(1)
        return index_T, jnp.square(x_TD - centres_KD[index_T]).sum(1)

    parts = jax.lax.map(one, jnp.arange(0, N, tile))
    # A slice that would reach over the end begins earlier: of the last tile, drop the rows that the
    # tile before it has too. (To fill up the points instead would copy them all.)
    return tuple(jnp.concatenate([v[:-1].reshape(-1), v[-1, -N % tile:]]) for v in parts)


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
    fit_ND = h_ND[np.sort(np.random.default_rng((seed, 4)).permutation(len(h_ND))[:examples])]

    def divided(key, fit_ND, h_ND):
        centres_KD, _ = kmeans(key, fit_ND, k, restarts=restarts, iterations=iterations)
        return nearest(h_ND, centres_KD)[0]

    program = jax.jit(divided).lower(key, fit_ND, h_ND).compile()
    begin = devices.clock()
    cluster_N = np.asarray(program(key, fit_ND, h_ND), np.int32)
    return devices.agree(cluster_N), devices.clock() - begin


def partition(arm, cluster_N, label_N, k, seed):
    """Cluster [N] of each example in an arm.

    dnc keeps the clusters of k-means. dnc_random shuffles them among the examples, so that their
    sizes stay. dnc_oracle groups whole classes: the largest class first, each class joins the group
    that has the fewest examples so far.
    """
    if arm == "dnc_random":
        return np.random.default_rng((seed, 5)).permutation(cluster_N)
    if arm == "dnc_oracle":
        count_C, count_K = np.bincount(label_N), np.zeros(k, int)
        group_C = np.zeros(len(count_C), np.int32)
        for c in np.argsort(-count_C, kind="stable"):
            group_C[c] = count_K.argmin()
            count_K[group_C[c]] += count_C[c]
        return group_C[label_N]
    return cluster_N


def expert_steps(sizes, total_steps):
    """Steps of each expert, in proportion to the size of its cluster.

    The paper, as we recall it, gives experts epochs in proportion to the sizes. We take them as
    epochs of the whole set, so that every expert goes over its own cluster equally often. Shares
    are rounded down, and the largest remainders get one step more.
    """
    sizes = np.asarray(sizes, np.int64)
    steps, remainder = np.divmod(total_steps * sizes, sizes.sum())
    steps[np.argsort(-remainder, kind="stable")[:total_steps - steps.sum()]] += 1
    return steps.tolist()


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


def distil_loss(predicted_base_ND, predicted_experts_NKD, base_ND, own_ND, cluster_N):
    """Mean over images of (2 - 2 cos(base head, base) + 2 - 2 cos(own head, own expert)) / 2. The
    equal weights are recalled, not read in the paper.

    predicted_base_ND, predicted_experts_NKD: what the K + 1 heads predict. Of the experts' heads
    only that of an image's cluster is used. None: there are no experts, and only the base's term
    remains. base_ND, own_ND: the teachers' representations, to which no gradient flows.
    """
    regress = lambda y, t: 2 - 2 * jnp.einsum("nd,nd->n", unit(y), jax.lax.stop_gradient(unit(t)))
    loss_N = regress(predicted_base_ND, base_ND)
    if predicted_experts_NKD is not None:
        predicted_own_ND = jnp.take_along_axis(predicted_experts_NKD, cluster_N[:, None, None],
                                               axis=1)[:, 0]
        loss_N = 0.5 * (loss_N + regress(predicted_own_ND, own_ND))
    return loss_N.mean()


def own_expert(experts, image_NHWC, cluster_N, model):
    """h [N, D] of each image by the expert of its own cluster.

    All K experts on all images would cost K N forwards. Instead the images of a cluster are put
    into blocks, and a block goes through its expert. The blocks hold at most a quarter more than N
    images (`block_shape`). experts: frozen encoders, stacked [K, ...]. cluster_N: 0 to K - 1.

    Example: the clusters of 4 images are 1, 0, 1, 1, and a block has 2 slots. Expert 0 gets the
    block (1, -) and expert 1 the blocks (0, 2) and (3, -). So images 0 to 3 are in slots 2, 0, 3,
    4. Slots 1 and 5 are empty: they are computed for image 0, and nothing reads the result.
    """
    N, K = len(image_NHWC), len(jax.tree.leaves(experts)[0])
    size, n_blocks = block_shape(N, K)
    # how many images of each cluster there are up to each image
    count_NK = jnp.cumsum(jax.nn.one_hot(cluster_N, K, dtype=int), axis=0)
    rank_N = count_NK[jnp.arange(N), cluster_N] - 1  # of an image in its cluster
    blocks_K = -(-count_NK[-1] // size)  # rounded up: (1, 2) in the example
    end_K = jnp.cumsum(blocks_K)
    slot_N = (end_K - blocks_K)[cluster_N] * size + rank_N
    image_S = jnp.zeros(n_blocks * size, int).at[slot_N].set(jnp.arange(N))
    # block b belongs to the first cluster whose blocks end after it; blocks at the end may be idle
    expert_B = jnp.minimum(jnp.searchsorted(end_K, jnp.arange(n_blocks), side="right"), K - 1)

    def block(expert_and_images):
        expert, images = expert_and_images
        return represent(jax.tree.map(lambda x: x[expert], experts), image_NHWC[images], model)

    h_BSD = jax.lax.map(block, (expert_B, einops.rearrange(image_S, "(b s) -> b s", s=size)))
    return einops.rearrange(h_BSD, "b s d -> (b s) d")[slot_N]


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
    view = augment.draw_views(jax.random.fold_in(key, index), devices.places(image_NHWC),
                              image_NHWC, views, 1)[0]
    cluster_N, experts = batch_N.get("cluster"), state.get("experts")
    base_ND = represent(state["base"], view, model)
    own_ND = own_expert(experts, view, cluster_N, model) if experts else None

    def loss_of(params):
        h_ND, stats = resnet.resnet_apply(params["encoder"], state["stats"]["encoder"], view,
                                          model.encoder, train=True)
        heads = {name: head(p, h_ND) for name, p in params["heads"].items()}
        heads_NKD = jnp.stack([heads[f"expert{j}"] for j in range(len(heads) - 1)],
                              axis=1) if experts else None
        return distil_loss(heads["base"], heads_NKD, base_ND, own_ND, cluster_N), stats

    (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state["learner"]["params"])
    loss, grads = devices.mean((loss, grads))
    rate = warmup_cosine(index, state["total"], warmup, peak)
    learner = update(state["learner"], grads, optimiser, rate)
    return {**state, "learner": learner, "stats": {"encoder": stats}}, {"loss": loss}


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


# ------------------------------------------------------------------------------------ the bill


def plan(arm, steps, fractions):
    """{'base', 'experts', 'distil'}: how the stages of an arm share its steps. Base and experts get
    these fractions and the student the rest, also the experts' steps where there are none."""
    if arm in ("moclr", "moclr_flops"):
        return {"base": steps, "experts": 0, "distil": 0}
    base, experts = (round(f * steps) for f in fractions)
    if arm not in DIVIDES:
        experts = 0
    return {"base": base, "experts": experts, "distil": steps - base - experts}


def contrast_flops(b, model):
    """FLOPs of one step of MoCLR on b images. For each of two views: a training step online, which
    is three forwards (one and its backward), and a forward of the target. A multiply-add counts as
    two."""
    F = resnet.resnet_flops(model.encoder)
    F_projector = 2 * model.hidden * (model.encoder.features + model.embed)
    return 2 * (3 + 1) * b * (F + F_projector)


def distil_flops(b, model, K):
    """FLOPs of one step of distillation on b images: a training step of the student with its K + 1
    heads, a forward of the base, and the forwards of `own_expert` on one device. (On several its
    blocks are smaller; there too at most a quarter of the slots is added.)"""
    F = resnet.resnet_flops(model.encoder)
    F_heads = (K + 1) * 4 * model.encoder.features * model.head_hidden
    own = math.prod(block_shape(b, K)) if K else 0
    return 3 * b * (F + F_heads) + b * F + own * F


def clustering_flops(model, config, N):
    """FLOPs of the clusters of N images: a forward of each by the base, and k-means."""
    return N * resnet.resnet_flops(model.encoder) + kmeans_flops(
        min(config.kmeans_examples, N), N, config.clusters, model.encoder.features, config.restarts,
        config.kmeans_iterations)


def budget(config, model, N):
    """{arm: steps by stage} on a pool of N images. `moclr_flops` gets the steps that cost as much
    as dnc."""
    b, fractions = config.batch_size, (config.base_fraction, config.experts_fraction)
    dnc = plan("dnc", config.steps, fractions)
    flops = ((dnc["base"] + dnc["experts"]) * contrast_flops(b, model)
             + clustering_flops(model, config, N)
             + dnc["distil"] * distil_flops(b, model, config.clusters))
    equal = max(1, round(flops / contrast_flops(b, model)))
    return {arm: plan(arm, equal if arm == "moclr_flops" else config.steps, fractions)
            for arm in config.arms}


# ------------------------------------------------------------------------- training, evaluation


def make_forward(model):
    """`devices.pmap` of (frozen encoder, sharded batch) -> features 'h' and everything in the batch
    but the image, gathered from all devices. What is clustered and evaluated is the whole image (of
    an oblong one the centre square, which is cut when it is read)."""
    def forward(net, batch):
        h_ND = represent(net, augment.normalise(augment.rgb(batch["image"])), model)
        out = {k: v for k, v in batch.items() if k != "image"} | {"h": h_ND}
        return {k: gather(v, AXIS) for k, v in out.items()}
    return devices.pmap(forward, in_axes=(None, 0))


def pixels(pool, batch_size):
    """The images themselves as features: a baseline that every method should beat."""
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
    programs: dict  # `make_programs`
    forward: object  # `make_forward`

    def run_arm(self, arm, steps):
        """Figure 2 of the paper, for an arm with so many steps in each stage (`plan`).

        Returns: cluster [N] of each image, or None where nothing is divided.
        """
        if not steps["distil"]:  # moclr, moclr_flops
            self.contrast(arm, steps["base"], self.pool)
            return None
        base, spent = self.contrast("base", steps["base"], self.pool)
        cluster_N, experts = None, []
        if arm in DIVIDES:
            cluster_N, spent = self.divide(arm, base, spent)
            sizes = np.bincount(cluster_N, minlength=self.config.clusters)
            for j, n_steps in enumerate(expert_steps(sizes, steps["experts"])):
                expert, spent = self.expert(f"{arm}_expert{j}", n_steps, j, cluster_N, base, spent)
                experts.append(expert)
        self.distil(arm, steps["distil"], base, experts, cluster_N, spent)
        return cluster_N

    def keys(self, fold):
        """Keys for first weights, for steps and for k-means. Each stage has its own: fold is 0 for
        the base (or MoCLR), 1 for the student, 2 + j for expert j."""
        return jax.random.split(jax.random.fold_in(jax.random.key(self.seed), fold), 3)

    def contrast(self, name, n_steps, pool, *, role="base", start_from=None, spent=None, fold=0):
        """Trains MoCLR on a pool: (state, `train.Totals`). role: of its FLOPs in the bill. spent:
        the totals before. fold: see `keys`."""
        key_init, key_steps, _ = self.keys(fold)
        state = new_state(key_init, self.model, lars(self.config.weight_decay), n_steps, start_from)
        flops = {role: contrast_flops(self.config.batch_size, self.model)}
        return self.train_stage(name, n_steps, pool, state, self.programs["contrast"], key_steps,
                                flops, spent)

    def expert(self, name, n_steps, j, cluster_N, base, spent):
        """Trains expert j, on cluster j alone, so that every negative is from the same cluster:
        (state, `train.Totals`).

        Experts are trained one after the other, each on all devices: their numbers of steps differ,
        and batch norm and the negatives are those of the whole batch.
        """
        ids = self.pool.ids[cluster_N == j]
        if n_steps == 0:
            logging.warning("%s: %d examples get no step: the base stands in", name, len(ids))
            return base, spent
        return self.contrast(name, n_steps, self.pool.subset(ids), role="experts", spent=spent,
                             start_from=base if self.config.expert_init == "base" else None,
                             fold=2 + j)

    def divide(self, arm, base, spent):
        """(cluster [N] of each image in this arm, `train.Totals`).

        k-means clusters the base's representations of the whole images, in evaluation mode and
        L2-normalised. It runs once. The clusters are kept in the work directory, with a hash of
        them and of the weights that made them. Each arm that uses them is charged for them, also
        dnc_random, which uses their sizes. dnc_oracle gets its groups for nothing.
        """
        config, cluster_N = self.config, None
        if arm != "dnc_oracle":
            net, key = encoder_of(base), self.keys(0)[2]

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

    def distil(self, arm, n_steps, base, experts, cluster_N, spent):
        """Trains the student on base and experts."""
        config, K = self.config, len(experts)
        key_init, key_steps, _ = self.keys(1)
        state = new_student(key_init, self.model, lars(config.weight_decay), n_steps,
                            encoder_of(base), [encoder_of(expert) for expert in experts],
                            config.student_init == "base")
        flops = {"distillation": distil_flops(config.batch_size, self.model, K)}
        self.train_stage(arm, n_steps, self.pool, state, self.programs["distil", K], key_steps,
                         flops, spent, cluster_N)

    def train_stage(self, name, n_steps, pool, state, step, key, flops, spent, cluster_N=None):
        """Trains a stage, from its last checkpoint to its end: (state, `train.Totals`).

        step: `contrast_step` or `distil_step` as a `devices.pmap`. flops: {role: FLOPs of a step}.
        If the pool is smaller than a batch, its images repeat within a batch: then copies of an
        image are among its negatives.
        """
        b = self.config.batch_size

        def load(start):
            for batch in data.batches(pool, seed=self.seed, batch_size=b, start=start, stop=n_steps,
                                      host=devices.host(), wrap=True):
                if cluster_N is not None:
                    batch["cluster"] = cluster_N[np.searchsorted(pool.ids, batch["id"])]
                yield devices.shard({k: batch[k] for k in ("image", "label", "cluster")
                                     if k in batch})

        stage = self.run.stage(name, self.seed, n_steps, spent=spent)
        state = stage.resume(state)
        for index, batch in stage.batches(load):
            state, metrics = step(state, index, key, batch)
            stage.count(metrics, trained=b, scored=b, flops=flops)
            if stage.evaluates:
                # experts are not evaluated
                stage.write({} if "experts" in flops else self.evaluate(state, stage.ends,
                                                                        cluster_N))
            stage.save(state)
        return state, stage.totals

    def evaluate(self, state, ends, cluster_N):
        """Metrics of the frozen encoder. On the way: nearest neighbours, which are cheap. At the
        end also the linear probe, the paper's own measure and so the headline."""
        train, test = (reference.forward_all(encoder_of(state), self.forward, pool,
                                             self.config.batch_size)[0]
                       for pool in (self.pool, self.test_pool))
        metrics = probe.knn_metrics(train, test, self.n_classes)
        if ends:
            logging.info("fitting the linear probe")
            metrics |= probe.linear_metrics(train, test, self.n_classes)
            if cluster_N is not None:
                metrics["nmi"] = probe.nmi(cluster_N, self.label_N)
        return metrics


def make_programs(config, model, n_classes):
    """{'contrast', and ('distil', number of experts)}: steps as a `devices.pmap`."""
    shared = dict(model=model, optimiser=lars(config.weight_decay), warmup=config.warmup)
    views = augment.Views(config.crop_area, config.jitter, (config.blur1, config.blur2),
                          (config.solarise1, config.solarise2))
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


# --------------------------------------------------------------------------------------- main


def check(config):
    """Raises ValueError, naming the flag, for flags that do not go together, whatever the data."""
    require = functools.partial(flags.require, config)
    flags.require_arms(config, ARMS)
    require(config.kmeans_examples >= config.clusters, "kmeans_examples",
            f"at least one for each of {config.clusters} clusters")
    require(config.base_fraction + config.experts_fraction < 1, "experts_fraction",
            f"less than 1 together with --base_fraction={config.base_fraction:g}: the student gets "
            "the rest")
    parts = plan("dnc", config.steps, (config.base_fraction, config.experts_fraction))
    require(min(parts.values()) >= 1, "steps", "at least one for each stage, as --base_fraction "
            "and --experts_fraction divide them")
    flags.require_warmup(config, config.steps, *parts.values())
    devices.divides(batch_size=config.batch_size)
    try:
        resnet.size(config.model)
    except ValueError as e:
        raise ValueError(f"--model: {e}") from None


def check_data(config, source, N):
    """Raises ValueError, naming the flag, for flags that do not fit the data. N: the size of a
    training pool."""
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
    # decodes the pool once; the labels are only for reports and for dnc_oracle
    labels = np.concatenate([x["label"][x["valid"]] for x in data.sweep(data.Pool(source), b)])
    pools = {seed: training_pool(source, labels, seed, config.class_cap) for seed in config.seeds}
    N = len(pools[config.seeds[0]][0])  # for each seed the same
    check_data(config, source, N)
    model = Model(resnet.ResNet(config.model, source.image_shape[0], dtype=config.dtype),
                  config.hidden, config.embed, config.head_hidden)
    steps_of = budget(config, model, N)
    run = train.Run(config, {"split": source.fingerprint, "eval_split": test_source.fingerprint})
    test_pool, forward = data.Pool(test_source), make_forward(model)
    programs = make_programs(config, model, n_classes)

    shown = None
    for seed in config.seeds:
        pool, label_N = pools[seed]
        experiment = Experiment(config, run, seed, model, pool, label_N, test_pool, n_classes,
                                programs, forward)
        for arm in config.arms:
            cluster_N = experiment.run_arm(arm, steps_of[arm])
            if cluster_N is not None and (shown is None or arm == "dnc"):
                shown = dict(pool=pool, cluster_N=cluster_N, nmi=probe.nmi(cluster_N, label_N))

    if jax.process_index() == 0:
        report.conclude(config.workdir, clusters=shown)
        rows = [r for r in run.metrics.rows() if r["seed"] in config.seeds]
        print("", batches_seen(rows), sep="\n")
        if source.image_shape[0] <= 32:  # at 224 px it would have 150,528 inputs
            logging.info("fitting the linear probe on pixels")
            got = probe.linear_metrics(pixels(pool, b), pixels(test_pool, b), n_classes)
            print("linear probe on pixels:", ", ".join(f"{k} {v:.3f}" for k, v in got.items()
                                                       if v is not None))
        if config.dataset == "toy" and not config.toy_domains and shown:
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
