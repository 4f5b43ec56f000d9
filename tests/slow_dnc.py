"""Slow reference for "Divide and Contrast" (Tian, Henaff, van den Oord, arXiv 2105.08054).

Float64 numpy and plain loops, one function per equation. They were written from a digest of the
paper and from the usual definitions of SimCLR, BYOL, LARS and k-means, not from the implementation
under test. Letters: B images in a batch, E projection width, N points, D their width, k centres or
neighbours, K experts, tau a temperature, F one encoder forward. `python tests/slow_dnc.py` checks
the functions against values known by hand.
"""

import colorsys
import math

import numpy as np

# ---------------------------------------------------------------- vectors


def _dot(a, b):
    """Inner product of two vectors."""
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def _norm(a):
    """Euclidean length of an array of any shape."""
    flat = np.ravel(np.asarray(a, np.float64))
    return math.sqrt(_dot(flat, flat))


def _unit_rows(x):
    """Each row divided by its length, which must not be 0."""
    return np.array([np.asarray(row, np.float64) / _norm(row) for row in x], np.float64)


def _cosine(a, b):
    """Cosine of the angle between two vectors."""
    return _dot(a, b) / (_norm(a) * _norm(b))


def _square_distance(a, b):
    """Squared Euclidean distance of two vectors."""
    return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))


def _log_sum_exp(row):
    """log sum_j exp(row_j), shifted by the largest entry."""
    top = max(float(x) for x in row)
    return top + math.log(sum(math.exp(float(x) - top) for x in row))


# ---------------------------------------------------------------- augmentation


def jitter(image, order, brightness, contrast, saturation, hue):
    """BYOL's colour jitter of an image [H, W, 3] in [0, 1]. `order` lists the changes by number:
    0 adds `brightness`; 1 scales each channel about its own mean; 2 scales the saturation of HSV,
    at most up to 1; 3 adds to the hue of HSV. After each change the colours are clipped."""
    image = np.array(image, np.float64)

    def in_hsv(change):
        return np.array([[colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel)))
                          for pixel in row] for row in image])

    for kind in order:
        if kind == 0:
            image = image + brightness
        elif kind == 1:
            for c in range(3):
                mean = sum(float(v) for v in image[..., c].ravel()) / image[..., c].size
                image[..., c] = contrast * (image[..., c] - mean) + mean
        elif kind == 2:
            image = in_hsv(lambda h, s, v: (h, min(s * saturation, 1.0), v))
        else:
            image = in_hsv(lambda h, s, v: ((h + hue) % 1.0, s, v))
        image = np.clip(image, 0, 1)
    return image


def grey(image):
    """All three channels .2989 red + .587 green + .114 blue."""
    out = np.zeros(np.shape(image), np.float64)
    for c in range(3):
        out[..., c] = 0.2989 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]
    return out


def blur(image, sigma, radius):
    """Gaussian blur of [H, W, C] with 2 radius + 1 weights each way. Beyond the edge is black."""
    offsets = range(-radius, radius + 1)
    whole = sum(math.exp(-(d**2) / (2 * sigma**2)) for d in offsets)
    weight = {d: math.exp(-(d**2) / (2 * sigma**2)) / whole for d in offsets}
    height, width, _ = np.shape(image)
    out = np.zeros(np.shape(image), np.float64)
    for i in range(height):
        for j in range(width):
            for di in offsets:
                for dj in offsets:
                    if 0 <= i + di < height and 0 <= j + dj < width:
                        out[i, j] += weight[di] * weight[dj] * image[i + di, j + dj]
    return out


# ---------------------------------------------------------------- contrastive loss (base, experts)


def info_nce(q, k, temperature, same_view=None):
    """InfoNCE: mean over i of -log(exp(q_i.k_i / tau) / sum over candidates of exp(q_i.c / tau)).

    The candidates of i are all B rows of k and, if the targets s of q's own view are given, the
    B - 1 rows s_j, j != i. Shapes [B, E]; the rows are normalised here.
    """
    q, k = _unit_rows(q), _unit_rows(k)
    s = None if same_view is None else _unit_rows(same_view)
    n = len(q)
    total = 0.0
    for i in range(n):
        candidates = [_dot(q[i], k[j]) / temperature for j in range(n)]
        positive = candidates[i]
        if s is not None:
            candidates += [_dot(q[i], s[j]) / temperature for j in range(n) if j != i]
        total += _log_sum_exp(candidates) - positive
    return total / n


def moclr_loss(q1, q2, k1, k2, temperature, same_view_negatives):
    """MoCLR: the mean of InfoNCE of q1 against k2 and of q2 against k1.

    q are the online projections of the two views, k those of the EMA target. There is no predictor.
    """
    first = info_nce(q1, k2, temperature, k1 if same_view_negatives else None)
    second = info_nce(q2, k1, temperature, k2 if same_view_negatives else None)
    return (first + second) / 2


# ---------------------------------------------------------------- target network


def ema_decay(step, total, m0):
    """BYOL's schedule, m0 at the start and 1 at `total`: 1 - (1 - m0) (1 + cos(pi t / T)) / 2."""
    return 1 - (1 - m0) * (1 + math.cos(math.pi * step / total)) / 2


def ema(target, online, decay):
    """decay target + (1 - decay) online, tensor by tensor; `online` is already updated."""
    new = {}
    for name in target:
        old, current = np.asarray(target[name], np.float64), np.asarray(online[name], np.float64)
        new[name] = decay * old + (1 - decay) * current
    return new


# ---------------------------------------------------------------- optimiser


def lars_step(
    params,
    grads,
    momentum,
    lr,
    weight_decay,
    *,
    trust=1e-3,
    momentum_coefficient=0.9,
    excluded=(),
):
    """LARS as in BYOL's code: one update -> (params, momentum), dicts of arrays.

    g = grad + wd w, u = (trust |w| / |g|) g, m = mu m + u, w = w - lr m. The rate is outside the
    momentum. The ratio is 1 if either norm is 0. Names in `excluded` have no decay and ratio 1.
    """
    new_params, new_momentum = {}, {}
    for name in params:
        w, g = np.asarray(params[name], np.float64), np.asarray(grads[name], np.float64)
        ratio = 1.0
        if name not in excluded:
            g = g + weight_decay * w
            if _norm(w) > 0 and _norm(g) > 0:
                ratio = trust * _norm(w) / _norm(g)
        u = ratio * g
        new_momentum[name] = momentum_coefficient * np.asarray(momentum[name], np.float64) + u
        new_params[name] = w - lr * new_momentum[name]
    return new_params, new_momentum


def warmup_cosine(step, total, warmup, peak):
    """0 to peak linearly in `warmup` steps, then half a cosine to 0 at `total` and 0 after it.

    step counts the updates already made, so with a warm-up the first update has rate 0.
    """
    if step >= total:
        return 0.0
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


# ---------------------------------------------------------------- batch normalisation


def _moments(x):
    """Mean and biased variance of each channel (last axis) over all the other axes. [C], [C]."""
    rows = np.reshape(np.asarray(x, np.float64), (-1, np.shape(x)[-1]))
    n, channels = rows.shape
    mean, var = np.zeros(channels, np.float64), np.zeros(channels, np.float64)
    for c in range(channels):
        mean[c] = sum(float(v) for v in rows[:, c]) / n
        var[c] = sum((float(v) - mean[c]) ** 2 for v in rows[:, c]) / n
    return mean, var


def batch_norm(x, scale, bias, eps=1e-5):
    """Training mode: scale (x - mean) / sqrt(var + eps) + bias, by channel. [N, ..., C] -> same."""
    mean, var = _moments(x)
    out = np.zeros(np.shape(x), np.float64)
    for c in range(len(mean)):
        centred = np.asarray(x, np.float64)[..., c] - mean[c]
        out[..., c] = float(scale[c]) * centred / math.sqrt(var[c] + eps) + float(bias[c])
    return out


def batch_norm_running(batches, decay=0.9):
    """The statistics kept for evaluation after these batches -> (mean, var), as in haiku.

    hidden = decay hidden + (1 - decay) batch, from 0; divided by 1 - decay^n after n batches. The
    batch's variance is the biased one here too.
    """
    mean, var = 0.0, 0.0
    for x in batches:
        batch_mean, batch_var = _moments(x)
        mean = decay * mean + (1 - decay) * batch_mean
        var = decay * var + (1 - decay) * batch_var
    return mean / (1 - decay ** len(batches)), var / (1 - decay ** len(batches))


# ---------------------------------------------------------------- divide


def kmeans_plus_plus(x, k, draws):
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007) from uniforms [k, J] in [0, 1): k indices.

    The first is floor(draws[0][0] N). For the c-th there is a candidate for each of draws[c]: the
    first point whose running sum of D^2, the squared distance to the nearest centre so far, exceeds
    the draw times the whole sum. The candidate with the least sum of D^2 afterwards is chosen, of
    equal ones (to 1e-5) the first.
    """
    n = len(x)
    chosen = [int(float(draws[0][0]) * n)]
    for c in range(1, k):
        mass = [min(_square_distance(x[i], x[j]) for j in chosen) for i in range(n)]
        total = sum(mass)
        assert total > 0, "fewer distinct points than centres"
        candidates = []
        for draw in draws[c]:
            running = 0.0
            for i in range(n):
                running += mass[i]
                if running > float(draw) * total:
                    candidates.append(i)
                    break
        assert len(candidates) == len(draws[c]), "draws must be below 1"
        left = [sum(min(mass[i], _square_distance(x[i], x[j])) for i in range(n))
                for j in candidates]
        chosen.append(next(j for j, v in zip(candidates, left) if v <= (1 + 1e-5) * min(left)))
    return np.array(chosen)


def _nearest(x, centres):
    """Index of, and squared distance to, each point's nearest centre; of equal ones the first."""
    assignment, distance = [], []
    for point in x:
        to_centres = [_square_distance(point, centre) for centre in centres]
        assignment.append(to_centres.index(min(to_centres)))
        distance.append(min(to_centres))
    return np.array(assignment), distance


def lloyd(x, centres, iterations):
    """Lloyd's k-means -> (centres [k, D], assignment [N], inertia), the last two for the first.

    An iteration assigns every point and moves each centre to its points' mean. Empty clusters, in
    order, take the points farthest from the centre they were just assigned to (before it moves),
    one point each, of equal ones the first; such a point still counts in its old cluster's mean.
    """
    x, centres = np.asarray(x, np.float64), np.array(centres, np.float64)
    for _ in range(iterations):
        assignment, distance = _nearest(x, centres)
        farthest = sorted(range(len(x)), key=lambda i: (-distance[i], i))
        moved = np.zeros_like(centres)
        for c in range(len(centres)):
            members = [x[i] for i in range(len(x)) if assignment[i] == c]
            moved[c] = sum(members) / len(members) if members else x[farthest.pop(0)]
        centres = moved
    assignment, distance = _nearest(x, centres)
    return centres, assignment, float(sum(distance))


def expert_steps(sizes, total_steps):
    """Steps per expert in proportion to its cluster's size, adding up to total_steps.

    Largest remainder: round every share down, then one more each to the largest remainders, of
    equal ones the first. In integers, so that equal remainders are equal.
    """
    everything = sum(int(size) for size in sizes)
    steps = [total_steps * int(size) // everything for size in sizes]
    remainders = [total_steps * int(size) % everything for size in sizes]
    order = sorted(range(len(steps)), key=lambda c: (-remainders[c], c))
    for c in order[: total_steps - sum(steps)]:
        steps[c] += 1
    return steps


# ---------------------------------------------------------------- distil


def distil_loss(base_pred, expert_pred, base_target, expert_target, assignment):
    """Mean over images of half of [2 - 2 cos to the base] + [2 - 2 cos to the own expert].

    Only the head of the image's cluster is read: expert_pred is [B, K, E], expert_target [B, E]
    holds the representation by that same cluster's expert.
    """
    n = len(base_pred)
    total = 0.0
    for i in range(n):
        own_head = expert_pred[i][int(assignment[i])]
        to_base = 2 - 2 * _cosine(base_pred[i], base_target[i])
        to_expert = 2 - 2 * _cosine(own_head, expert_target[i])
        total += (to_base + to_expert) / 2
    return total / n


# ---------------------------------------------------------------- evaluation


def knn_predict(train, labels, test, k, temperature, n_classes):
    """Each of the k training points of largest cosine votes exp(cos / tau) for its class. [M].

    Of equal cosines, or equal classes, the first wins.
    """
    train, test = _unit_rows(train), _unit_rows(test)
    out = []
    for point in test:
        similarity = [_dot(point, other) for other in train]
        order = sorted(range(len(train)), key=lambda i: (-similarity[i], i))
        votes = [0.0] * n_classes
        for i in order[:k]:
            votes[int(labels[i])] += math.exp(similarity[i] / temperature)
        out.append(votes.index(max(votes)))
    return np.array(out)


def balanced_accuracy(pred, labels):
    """Mean over the classes that occur in labels of the share of the class predicted right."""
    recalls = []
    for c in sorted({int(y) for y in labels}):
        hits = [int(p) == c for p, y in zip(pred, labels, strict=True) if int(y) == c]
        recalls.append(sum(hits) / len(hits))
    return sum(recalls) / len(recalls)


def _entropy(labelling):
    """-sum p log p over the values of a list, in nats."""
    n = len(labelling)
    shares = [labelling.count(value) / n for value in set(labelling)]
    return -sum(p * math.log(p) for p in shares)


def nmi(a, b):
    """Normalised mutual information, I(a; b) / ((H(a) + H(b)) / 2); 1 if both are constant."""
    a, b = [int(v) for v in a], [int(v) for v in b]
    pairs = list(zip(a, b, strict=True))
    mean_entropy = (_entropy(a) + _entropy(b)) / 2
    if mean_entropy == 0:
        return 1.0
    n = len(pairs)
    information = 0.0
    for u, v in set(pairs):
        joint = pairs.count((u, v)) / n
        information += joint * math.log(joint / ((a.count(u) / n) * (b.count(v) / n)))
    return information / mean_entropy


def linear_probe_loss(w, b, x, y, l2):
    """Mean cross-entropy of the logits x w + b, plus l2 / 2 sum w^2; the bias is not decayed."""
    w = np.asarray(w, np.float64)
    n = len(x)
    total = 0.0
    for i in range(n):
        logits = [_dot(x[i], w[:, c]) + float(b[c]) for c in range(w.shape[1])]
        total += _log_sum_exp(logits) - logits[int(y[i])]
    return total / n + l2 / 2 * _norm(w) ** 2


# ---------------------------------------------------------------- the bill

FORWARD = 1  # the unit, F
BACKWARD = 2 * FORWARD
TEACHER = FORWARD  # any network that is only read: EMA target, base, expert
VIEWS = 2  # of an image in a contrastive step


def visits_cost(stage):
    """Encoder forwards per visit of an image: what one view costs, times the views."""
    update = FORWARD + BACKWARD
    distil = update + TEACHER + TEACHER  # the base and the expert of the image's cluster
    by_stage = {
        "moclr": VIEWS * (update + TEACHER),
        "simclr": VIEWS * update,
        "clustering": FORWARD,
        "distil": distil,
    }
    return by_stage[stage]


# ---------------------------------------------------------------- values known by hand


def check():
    """The functions above against cases small enough to do on paper."""
    orange = np.array([[[1.0, 0.5, 0.0]]])  # hue 30 degrees; turned by 60 it is yellow-green
    assert np.allclose(jitter(orange, [3], 0, 1, 1, 1 / 6), [[[0.5, 1, 0]]])
    assert np.allclose(jitter(orange, [2], 0, 1, 0.5, 0), [[[1, 0.75, 0.5]]])
    assert np.allclose(jitter([[[0.8, 0.6, 0.4]]], [2], 0, 1, 9.0, 0), [[[0.8, 0.4, 0]]])
    assert np.allclose(jitter(orange, [0, 1], 0.25, 1, 1, 0), [[[1, 0.75, 0.25]]])  # clipped
    two = np.array([[[0.2, 0.5, 0.5], [0.4, 0.5, 0.9]]])  # each channel about its own mean
    assert np.allclose(jitter(two, [1], 0, 0.5, 1, 0), [[[0.25, 0.5, 0.6], [0.35, 0.5, 0.8]]])
    assert np.allclose(grey(orange), 0.2989 + 0.2935)
    flat = blur(np.ones((5, 5, 1)), 0.5, 1)  # weights e^-2, 1, e^-2
    assert math.isclose(flat[2, 2, 0], 1)
    assert math.isclose(flat[0, 2, 0], (1 + math.exp(-2)) / (1 + 2 * math.exp(-2)))

    # One image has no negatives in the other view, nor, its own row being left out, in its own.
    one, other = [[0.3, -2.0]], [[1.0, 5.0]]
    assert info_nce(one, other, 0.1) == 0 and info_nce(one, other, 0.1, one) == 0
    for n in (2, 5):
        same = np.full((n, 3), 0.7)
        assert math.isclose(info_nce(same, same, 0.1), math.log(n))
        assert math.isclose(info_nce(same, same, 0.1, same), math.log(2 * n - 1))
        assert math.isclose(moclr_loss(same, same, same, same, 0.1, False), math.log(n))
        assert math.isclose(moclr_loss(same, same, same, same, 0.1, True), math.log(2 * n - 1))
    eye, swapped = np.eye(2), np.eye(2)[::-1]
    assert math.isclose(info_nce(3 * eye, eye, 0.5), math.log1p(math.exp(-2)))
    # The other image's own-view target is as close as the positive: e^2 against 2 e^2 + 1.
    assert math.isclose(info_nce(eye, 2 * eye, 0.5, swapped), math.log(2 + math.exp(-2)))
    # q1 meets its positive in k2; each row of q2 lies along the other image's k1 instead.
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert math.isclose(moclr_loss(eye, swapped, eye, eye, 0.5, False), (right + wrong) / 2)
    right, wrong = math.log(1 + 2 * math.exp(-2)), math.log(1 + 2 * math.exp(2))
    assert math.isclose(moclr_loss(eye, swapped, eye, eye, 0.5, True), (right + wrong) / 2)
    # Both pairs agree across views; within them, k1 going with q1, the other image is close.
    loss = moclr_loss(eye, swapped, swapped, eye, 0.5, True)
    assert math.isclose(loss, math.log(2 + math.exp(-2)))

    assert math.isclose(ema_decay(0, 10, 0.97), 0.97) and ema_decay(10, 10, 0.97) == 1
    assert math.isclose(ema_decay(5, 10, 0.9), 0.95)
    assert np.allclose(ema({"w": [1.0, 2.0]}, {"w": [3.0, 0.0]}, 0.75)["w"], [1.5, 1.5])

    # |w| = 5 and g = [6, 5.5] + .5 [0, 5] = [6, 8]: m = trust |w| / |g| g, then with momentum.
    w, g = {"w": [0.0, 5.0], "b": [2.0]}, {"w": [6.0, 5.5], "b": [3.0]}
    zero = {"w": [0.0, 0.0], "b": [0.0]}
    p, m = lars_step(w, g, zero, 0.5, 0.5, trust=0.1, excluded=("b",))
    assert np.allclose(m["w"], [0.3, 0.4]) and np.allclose(p["w"], [-0.15, 4.8])
    assert np.allclose(m["b"], 3) and np.allclose(p["b"], 0.5)
    p, m = lars_step(w, g, m, 2.0, 0.5, trust=0.1, momentum_coefficient=0.8, excluded=("b",))
    assert np.allclose(m["w"], [0.54, 0.72]) and np.allclose(m["b"], 0.8 * 3 + 3)
    assert np.allclose(p["w"], [-1.08, 5 - 1.44])  # the new rate moves by the old momentum too
    p, m = lars_step(zero, g, zero, 0.5, 0.5)  # no length of w, ratio 1
    assert np.allclose(p["w"], [-3.0, -2.75]) and np.allclose(p["b"], -1.5)
    rates = [warmup_cosine(s, 12, 4, 2.0) for s in (0, 2, 4, 8, 12, 13)]
    assert np.allclose(rates, [0, 1, 2, 1, 0, 0]) and warmup_cosine(0, 12, 0, 2.0) == 2

    x = np.array([[[1.0, 5.0], [3.0, 5.0]]])  # channels: mean 2 and 5, variance 1 and 0
    assert np.allclose(batch_norm(x, [3.0, 1.0], [1.0, 7.0], eps=8.0), [[[0, 7], [2, 7]]])
    mean, var = batch_norm_running([x], decay=0.75)
    assert np.allclose(mean, [2, 5]) and np.allclose(var, [1, 0])
    mean, var = batch_norm_running([x, 2 * x], decay=0.5)  # the newer has twice the weight
    assert np.allclose(mean, [10 / 3, 25 / 3]) and np.allclose(var, [3, 0])

    line = np.array([[0.0], [1.0], [3.0]])  # from the first, D^2 = 0, 1, 9
    assert list(kmeans_plus_plus(line, 2, [[0.0], [0.0]])) == [0, 1]
    assert list(kmeans_plus_plus(line, 2, [[0.3], [0.09]])) == [0, 1]
    assert list(kmeans_plus_plus(line, 3, [[0.0], [0.11], [0.999]])) == [0, 2, 1]
    assert list(kmeans_plus_plus(line, 1, [[0.99]])) == [2]
    # of the candidates 1 and 2 the latter leaves 1, the former 4
    assert list(kmeans_plus_plus(line, 2, [[0.0, 0.9], [0.0, 0.5]])) == [0, 2]
    points = np.array([[0.0], [2.0], [10.0], [14.0]])
    centres, assignment, inertia = lloyd(points, [[0.0], [9.0]], 3)
    assert np.array_equal(centres, [[1], [12]]) and np.array_equal(assignment, [0, 0, 1, 1])
    assert inertia == 10
    # All go to the first; the other two take 14 and 10, the farthest.
    centres, assignment, inertia = lloyd(points, [[1.0], [100.0], [200.0]], 1)
    assert np.array_equal(centres, [[6.5], [14], [10]])
    assert np.array_equal(assignment, [0, 0, 2, 1]) and inertia == 6.5**2 + 4.5**2
    centres, assignment, inertia = lloyd(points, [[1.0], [1.0]], 0)  # ties go to the first
    assert np.array_equal(assignment, [0] * 4) and inertia == 1 + 1 + 81 + 169
    assert expert_steps([1, 1, 1], 8) == [3, 3, 2] and expert_steps([6, 3, 1], 7) == [4, 2, 1]
    assert expert_steps([5, 3], 16) == [10, 6]

    heads = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [5.0, 5.0]]])
    ones, up = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 3.0], [0.0, 3.0]])
    assert math.isclose(distil_loss(ones, heads, ones, up, [1, 0]), 0, abs_tol=1e-15)
    assert math.isclose(distil_loss(ones, heads, -ones, up, [0, 0]), 2.5)  # (4 + 2) / 2, 4 / 2

    # One near neighbour outvotes two far ones if the temperature is low.
    train, labels = [[1.0, 0.0], [0.0, 1.0], [0.0, 4.0], [-1.0, 0.0]], [1, 0, 0, 2]
    assert list(knn_predict(train, labels, [[2.0, 1.0]], 3, 0.07, 3)) == [1]
    assert list(knn_predict(train, labels, [[2.0, 1.0]], 3, 10.0, 3)) == [0]
    assert list(knn_predict(train, labels, [[2.0, 1.0], [-1.0, 0.1]], 1, 10.0, 3)) == [1, 2]
    assert math.isclose(balanced_accuracy([0, 0, 0, 2], [0, 0, 0, 5]), 0.5)
    assert math.isclose(balanced_accuracy([1, 0, 1], [0, 0, 1]), 0.75)
    assert math.isclose(nmi([0, 0, 1, 2], [0, 0, 1, 2]), 1)
    assert math.isclose(nmi([0, 0, 1, 2], [7, 7, 3, 1]), 1)
    assert math.isclose(nmi([0, 0, 1, 1], [0, 1, 0, 1]), 0, abs_tol=1e-15)
    assert math.isclose(nmi([0, 0, 1, 1], [0, 1, 2, 3]), 2 / 3)  # log 2 over (log 2 + log 4) / 2
    assert nmi([4, 4], [1, 1]) == 1
    probe = linear_probe_loss(np.zeros((2, 3)), np.zeros(3), np.ones((4, 2)), [0, 1, 2, 0], 9.0)
    assert math.isclose(probe, math.log(3))
    probe = linear_probe_loss([[2.0, 0.0]], [0.0, 1.0], [[1.0]], [0], 0.5)
    assert math.isclose(probe, math.log1p(math.exp(-1)) + 1)

    costs = {"moclr": 8, "simclr": 6, "clustering": 1, "distil": 5}
    for stage, forwards in costs.items():
        assert visits_cost(stage) == forwards, stage
    return True


if __name__ == "__main__":
    check()
    print("all values known by hand reproduced")
