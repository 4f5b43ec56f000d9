"""Slow reference for JEST, joint example selection (Evans et al., arXiv 2406.17711).

Float64 numpy and plain loops, one function per equation, written from a digest of the paper,
without looking at the implementation under test. Letters: B candidates, E embedding width, S the
[B, B] scores (row image, column text), T the indices drawn so far, r = 1 / (1 - f) candidates per
trained example. A side is one model's (z_im [B, E], z_txt [B, E], t, b): t multiplies the dot
product, the bias b is added, embeddings are used as given. `python tests/slow_jest.py` checks it
against the paper's cost per iteration and against values known by hand.
"""

import math

import numpy as np

# ---------------------------------------------------------------- losses


def _dot(a, b):
    """Inner product of two vectors, in float64."""
    return float(np.dot(np.asarray(a, np.float64), np.asarray(b, np.float64)))


def _log_sum_exp(row):
    """log sum_j exp(row_j), shifted by the largest entry; entries of -inf count as nothing."""
    top = max(float(x) for x in row)
    return top + math.log(sum(math.exp(float(x) - top) for x in row))


def _minus_log_sigmoid(x):
    """log(1 + exp(-x)), without overflow at either end."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def pair_losses(z_im, z_txt, t, b):
    """Eq. 2, its terms: l_ij = -log sigmoid(y_ij (t zi_i.zt_j + b)), y_ij = 1 if i = j else -1.

    [B, B], row image, column text.
    """
    n = len(z_im)
    losses = np.zeros((n, n), np.float64)
    for i in range(n):
        for j in range(n):
            label = 1.0 if i == j else -1.0
            losses[i, j] = _minus_log_sigmoid(label * (t * _dot(z_im[i], z_txt[j]) + b))
    return losses


def sigmoid_loss(z_im, z_txt, t, b):
    """Eq. 2: 1/n sum_i sum_j l_ij. The divisor is n, though there are n^2 terms."""
    losses = pair_losses(z_im, z_txt, t, b)
    n = len(losses)
    return float(sum(losses[i, j] for i in range(n) for j in range(n)) / n)


def softmax_loss(z_im, z_txt, t):
    """Eq. 1: 1/(2n) sum_i [CE(t zi_i.zt_*, i) + CE(t zi_*.zt_i, i)]."""
    n = len(z_im)
    total = 0.0
    for i in range(n):
        image_to_text = [t * _dot(z_im[i], z_txt[j]) for j in range(n)]
        text_to_image = [t * _dot(z_im[j], z_txt[i]) for j in range(n)]
        total += _log_sum_exp(image_to_text) - image_to_text[i]
        total += _log_sum_exp(text_to_image) - text_to_image[i]
    return total / (2 * n)


# ---------------------------------------------------------------- scores


def _combine(kind, learner, reference):
    """One score out of the same quantity of both models."""
    if kind == "learnability":
        return learner - reference
    if kind == "easy_reference":
        return -reference
    if kind == "hard_learner":
        return learner
    raise ValueError(kind)


def score_matrix(kind, learner, reference):
    """S_ij: learner's loss minus reference's on a pair, or minus the latter, or the former alone.

    Either model's loss has its own t and b.
    """
    l_learner, l_reference = pair_losses(*learner), pair_losses(*reference)
    n = len(l_learner)
    scores = np.zeros((n, n), np.float64)
    for i in range(n):
        for j in range(n):
            scores[i, j] = _combine(kind, l_learner[i, j], l_reference[i, j])
    return scores


def set_score(S, T):
    """Score of a set: sum over a, b in T of S_ab, the diagonal included."""
    return float(sum(S[a, b] for a in T for b in T))


# ---------------------------------------------------------------- joint selection


def quotas(b, n_chunks):
    """Chunk sizes of a sub-batch of b (here a count): integers that sum to b, the larger first."""
    return [b // n_chunks + (1 if k < b % n_chunks else 0) for k in range(n_chunks)]


def chunk_logits(S, T):
    """Algorithm 1: S_ii + sum_{j in T} S_ij + sum_{j in T} S_ji, and -inf for i in T. [B]."""
    T = np.array(sorted(T), np.int64)
    S = np.asarray(S, np.float64)
    logits = np.diagonal(S) + S[:, T].sum(axis=1) + S[T, :].sum(axis=0)
    logits[T] = -np.inf
    return logits


def chunk_probabilities(S, T):
    """Algorithm 1: exp(logit_i - log sum_j exp(logit_j)); what is in T has probability 0. [B]."""
    logits = chunk_logits(S, T)
    log_z = _log_sum_exp(logits)
    return np.array([math.exp(x - log_z) for x in logits], np.float64)


def joint_sample(S, gumbel, sizes, first):
    """Algorithm 1 with the noise given: chunk k is the sizes[k] largest of logit + gumbel[k].

    Gumbel-top-k draws without replacement from the softmax of the logits, which stay as they are
    within a chunk. first = "self": chunk 0 has the logits S_ii; "uniform": equal ones. Returns one
    array of indices per chunk, largest first.
    """
    assert first in ("self", "uniform"), first
    T, chunks = [], []
    for k, (noise, size) in enumerate(zip(gumbel, sizes, strict=True)):
        logits = chunk_logits(S, T)
        if k == 0 and first == "uniform":
            logits = np.zeros(len(S), np.float64)
        key = logits + np.asarray(noise, np.float64)
        candidates = [i for i in range(len(S)) if i not in T]
        assert size <= len(candidates), "more draws than candidates"
        chunk = sorted(candidates, key=lambda i: -key[i])[:size]
        chunks.append(np.array(chunk, np.int64))
        T.extend(chunk)
    return chunks


def gibbs_step(S, T, out, gumbel):
    """One single-site Gibbs update of the law exp(set_score(T)) over sets of the size of T.

    `out` leaves; one candidate not in the rest, perhaps `out` again, takes its place in the list
    with probability the softmax of its logit given the rest: the largest logit + noise.
    """
    assert out in T
    rest = [j for j in T if j != out]
    key = chunk_logits(S, rest) + np.asarray(gumbel, np.float64)  # -inf for the rest
    drawn = int(np.argmax(key))
    return [drawn if j == out else int(j) for j in T]


# ---------------------------------------------------------------- softmax variant


def softmax_conditional(i, T, learner, reference, kind):
    """Softmax variant, logit of i given T: the difference between the models of c_i.

    c_i = -t zi_i.zt_i + (texts_i + images_i) / 2, texts_i = log sum_{j in T} exp(t zi_i.zt_j),
    images_i = log sum_{j in T} exp(t zi_j.zt_i). Each model has its own t, no bias enters. An empty
    T leaves the first term only.
    """
    terms = []
    for z_im, z_txt, t, _ in (learner, reference):
        c = -t * _dot(z_im[i], z_txt[i])
        if len(T):
            texts = _log_sum_exp([t * _dot(z_im[i], z_txt[j]) for j in T])
            images = _log_sum_exp([t * _dot(z_im[j], z_txt[i]) for j in T])
            c += (texts + images) / 2
        terms.append(c)
    return _combine(kind, *terms)


# ---------------------------------------------------------------- Flexi-JEST


def resize_weights(old, new, antialias):
    """Weight [new, old] of each old pixel in each new one, along one axis.

    Half-pixel centres: output pixel o sits at (o + 1/2) old / new - 1/2. The weight of a pixel
    falls off linearly with its distance from there. It is 0 at a distance of 1 or, with antialias
    and pixels that grow, at a distance of old / new. The weights are scaled to add up to 1.
    """
    reach = max(old / new, 1.0) if antialias else 1.0
    weights = np.zeros((new, old), np.float64)
    for o in range(new):
        centre = (o + 0.5) * old / new - 0.5
        for i in range(old):
            weights[o, i] = max(0.0, 1.0 - abs(i - centre) / reach)
        weights[o] /= weights[o].sum()
    return weights


def resize_image(x, new, antialias=False):
    """Bilinear resize [H, W] -> [new, new], rows and columns one after the other."""
    x = np.asarray(x, np.float64)
    h, w = x.shape
    return resize_weights(h, new, antialias) @ x @ resize_weights(w, new, antialias).T


def pi_resize_kernel(w, new):
    """PI-resize (FlexiViT): pinv(R^T) vec(w), column k of R the resize of the k-th unit kernel.

    Shapes [P, P] -> [new, new]; R is [new^2, P^2].
    """
    w = np.asarray(w, np.float64)
    P = len(w)
    R = np.zeros((new * new, P * P), np.float64)
    for k in range(P * P):
        unit = np.zeros((P, P), np.float64)
        unit[k // P, k % P] = 1.0
        R[:, k] = resize_image(unit, new).reshape(-1)
    return (np.linalg.pinv(R.T) @ w.reshape(-1)).reshape(new, new)


# ---------------------------------------------------------------- statistics, the bill


def spearman(x, y):
    """Rank correlation, no ties: 1 - 6 sum_i (rank x_i - rank y_i)^2 / (n (n^2 - 1))."""
    n = len(x)
    assert n == len(y) and len(set(map(float, x))) == len(set(map(float, y))) == n, "ties"
    total = 0
    for i in range(n):
        rank_x = sum(1 for other in x if other < x[i])
        rank_y = sum(1 for other in y if other < y[i])
        total += (rank_x - rank_y) ** 2
    return 1 - 6 * total / (n * (n * n - 1))


def iteration_cost(f, *, A=None, reuse=False):
    """The bill: one iteration over a uniform step (forward 1/3), the reference not charged.

    JEST 1 + r / 3; 1 + (r - 1) / 3 if the step reuses the forward that scored its examples.
    Flexi-JEST, a low-resolution forward (or step) costing A: (1 + A) / 2 + r A / 3.
    """
    r = 1 / (1 - f)
    if A is not None:
        assert not reuse, "half of the sub-batch trains at another resolution than it was scored at"
        return (1 + A) / 2 + r * A / 3
    return 1 + (r - 1) / 3 if reuse else 1 + r / 3


# ---------------------------------------------------------------- self-check


def _check_bill():
    """Costs within half a per cent, but the third: 110.7 in full, printed as 110."""
    assert abs(100 * iteration_cost(0.8, reuse=True) - 233) <= 0.5
    assert abs(100 * iteration_cost(0.8) - 267) <= 0.5
    assert 110 <= 100 * iteration_cost(0.8, A=1 - 0.72) < 111
    assert math.isclose(iteration_cost(0.0, reuse=True), 1.0)  # no filtering, nothing to pay
    assert math.isclose(iteration_cost(0.5, A=1.0), iteration_cost(0.5))


def _check_losses():
    """Two by two, and ties."""
    eye, zero = np.eye(2), np.zeros((4, 3))
    both = math.log1p(math.exp(-1))  # t = 2, b = -1: every label times logit is 1
    assert np.allclose(pair_losses(eye, eye, 2.0, -1.0), both)
    assert math.isclose(sigmoid_loss(eye, eye, 2.0, -1.0), 2 * both)
    assert math.isclose(sigmoid_loss(zero, zero, 5.0, 0.0), 4 * math.log(2))
    far = pair_losses(eye, eye, 0.0, -1e4)
    assert np.allclose(far, [[1e4, 0], [0, 1e4]])
    assert math.isclose(softmax_loss(eye, eye, 2.0), math.log(1 + math.exp(-2)))
    assert math.isclose(softmax_loss(zero, zero, 5.0), math.log(4))
    # Two equal images: either text's column costs log 2, the rows differ.
    rows = math.log1p(math.exp(-2)) + math.log1p(math.exp(2))
    loss = softmax_loss([[1.0], [1.0]], [[3.0], [1.0]], 1.0)
    assert math.isclose(loss, (rows + 2 * math.log(2)) / 4)
    # Rows are images: text 0 is far from both, text 1 equals image 0.
    losses = pair_losses([[1.0], [0.0]], [[0.0], [1.0]], 3.0, 0.0)
    assert np.allclose(losses, [[math.log(2), math.log1p(math.exp(3))], [math.log(2)] * 2])


def _check_selection(rng):
    """The invariant, the law of a chunk and of a Gibbs update, exact quotas."""
    learner = (rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), 2.0, -1.0)
    reference = (rng.normal(size=(9, 3)), rng.normal(size=(9, 3)), 3.0, -2.0)
    S = score_matrix("learnability", learner, reference)
    assert np.allclose(S, pair_losses(*learner) - pair_losses(*reference))
    assert np.array_equal(score_matrix("hard_learner", learner, reference), pair_losses(*learner))
    easy = score_matrix("easy_reference", learner, reference)
    assert np.array_equal(easy, -pair_losses(*reference))
    assert not np.allclose(S, S.T)

    for T in ([], [4], [7, 0, 3]):
        logits = chunk_logits(S, T)
        p = chunk_probabilities(S, T)
        assert math.isclose(p.sum(), 1.0)
        outside = [i for i in range(9) if i not in T]
        for i in T:
            assert logits[i] == -np.inf and p[i] == 0.0
        for i in outside:
            assert math.isclose(set_score(S, [*T, i]) - set_score(S, T), logits[i], abs_tol=1e-9)
            # Gibbs leaves exp(set_score) alone if its conditional is the ratio of that law.
            others = [set_score(S, [*T, j]) for j in outside]
            ratio = math.exp(set_score(S, [*T, i]) - _log_sum_exp(others))
            assert math.isclose(p[i], ratio, rel_tol=1e-9)
    assert np.allclose(chunk_probabilities(np.diag([1e5, 1e5, 0.0]), []), [0.5, 0.5, 0.0])

    assert quotas(32768, 16) == [2048] * 16  # int(163840 * (1 - 0.8) / 16) is 2047
    assert quotas(10, 4) == [3, 3, 2, 2] and quotas(2, 3) == [1, 1, 0]

    none = np.zeros(4)
    pull = np.diag([3.0, 2.0, 1.0, 0.0])
    pull[0, 3] = 1.0
    pull[3, 0] = 1.5  # given 0, the worst by itself becomes the best
    picks = joint_sample(pull, [none] * 2, [1, 2], "self")
    assert [list(c) for c in picks] == [[0], [3, 1]]
    assert [list(c) for c in joint_sample(pull, [none], [3], "self")] == [[0, 1, 2]]
    noise = [np.array([0.0, 0.2, 0.3, 0.1]), np.array([0.0, 0.0, 9.0, 3.5])]
    picks = joint_sample(pull, noise, [1, 3], "uniform")
    assert [list(c) for c in picks] == [[2], [3, 0, 1]]

    assert gibbs_step(pull, [1, 0], 1, none) == [3, 0]
    assert gibbs_step(pull, [1, 0], 1, [9.0, 0.6, 0.0, 0.0]) == [1, 0]  # 2.6 beats 2.5
    counts = np.zeros(9)
    for _ in range(4000):
        counts[gibbs_step(S, [7, 0, 3], 0, rng.gumbel(size=9))[1]] += 1
    assert np.abs(counts / 4000 - chunk_probabilities(S, [7, 3])).max() < 0.04  # 5 sigma at most


def _check_softmax_variant(rng):
    """No T: minus the logit of the pair. One in T: the mean of the two cross logits."""
    learner = (rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), 2.0, -1.0)
    reference = (rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), 3.0, -2.0)
    x, y = (t * z_im @ z_txt.T for z_im, z_txt, t, _ in (learner, reference))
    for T, by_hand in {
        (): lambda m: -m[1, 1],
        (4,): lambda m: -m[1, 1] + (m[1, 4] + m[4, 1]) / 2,
        (4, 4): lambda m: -m[1, 1] + (m[1, 4] + m[4, 1]) / 2 + math.log(2),
    }.items():
        for kind, value in {
            "learnability": by_hand(x) - by_hand(y),
            "easy_reference": -by_hand(y),
            "hard_learner": by_hand(x),
        }.items():
            ours = softmax_conditional(1, list(T), learner, reference, kind)
            assert math.isclose(ours, value, rel_tol=1e-9, abs_tol=1e-9), (T, kind)
    # With everyone in T, i itself too, the logit is the row's part of the loss.
    total = 0.0
    for i in range(5):
        total += softmax_conditional(i, range(5), learner, reference, "hard_learner")
    assert math.isclose(total / 5, softmax_loss(*learner[:3]))


def _check_resize(rng):
    """Known pixels; a kernel enlarged sees in an image enlarged likewise what it saw before."""
    assert np.allclose(resize_image([[0.0, 1.0]], 4), [[0, 0.25, 0.75, 1]] * 4)
    assert np.allclose(resize_image([[0.0, 1.0, 5.0, 9.0]], 2), [[0.5, 7]] * 2)  # no antialias
    assert np.allclose(resize_image([[0.0], [1.0], [5.0]], 1), 1)
    # With antialias a pixel twice as large sees four: 1/8, 3/8, 3/8, 1/8. At the edge it sees
    # three: 3/7, 3/7, 1/7.
    row = np.array([[0.0, 1.0, 5.0, 9.0, 2.0, 4.0]])
    inner = (1 + 3 * 5 + 3 * 9 + 2) / 8
    edges = (3 * 0 + 3 * 1 + 5) / 7, (3 * 4 + 3 * 2 + 9) / 7
    assert np.allclose(resize_image(row, 3, antialias=True), [[edges[0], inner, edges[1]]] * 3)
    for old, new in ((2, 3), (3, 4), (3, 6), (4, 8), (5, 7)):
        w, patch = rng.normal(size=(2, old, old))
        assert np.allclose(resize_image(w, old), w) and np.allclose(pi_resize_kernel(w, old), w)
        larger = np.sum(pi_resize_kernel(w, new) * resize_image(patch, new))
        assert math.isclose(larger, np.sum(w * patch), rel_tol=1e-9, abs_tol=1e-9), (old, new)
    # Least squares, of least norm: one weight is shared by four, four are summed to one.
    assert np.allclose(pi_resize_kernel([[4.0]], 2), 1)
    assert np.allclose(pi_resize_kernel([[1.0, 2.0], [3.0, 4.0]], 1), 10)


def check():
    """The paper's costs, the invariants, and values known by hand."""
    rng = np.random.default_rng(0)
    _check_bill()
    _check_losses()
    _check_selection(rng)
    _check_softmax_variant(rng)
    _check_resize(rng)
    assert spearman([1.0, 2.0, 3.0], [5.0, 6.0, 9.0]) == 1.0
    assert spearman([1.0, 2.0, 3.0], [9.0, 6.0, 5.0]) == -1.0
    assert math.isclose(spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]), 0.6)
    return True


if __name__ == "__main__":
    check()
    print("all reproduced: 233, 267 and 110 % per iteration, the set score, PI-resize")
