"""Joint example selection (JEST, Evans et al., arXiv 2406.17711), slowly and in float64 numpy.

A model is a dict: "image" [B, E] and "text" [B, E] are L2-normalised embeddings, "log_t" is the log
of the scale alpha, and "b" is the bias beta (only the sigmoid loss reads it). In every [B, B]
matrix the row is the image and the column is the text. `kind` names the score: "learnability",
"easy_reference" or "hard_learner". A model that this score does not use may be None.
"""

import numpy as np


def logsumexp(values):
    """log(sum(exp(values))) of a non-empty list, without overflow."""
    values = np.asarray(values, np.float64)
    largest = np.max(values)
    return largest + np.log(np.sum(np.exp(values - largest)))


def similarities(model):
    """alpha * image_i . text_j for every pair, [B, B], with alpha = exp(log_t) (section 3.1)."""
    image, text = np.asarray(model["image"], np.float64), np.asarray(model["text"], np.float64)
    return np.exp(np.float64(model["log_t"])) * image @ text.T


def sigmoid_losses(model):
    """The loss of each pair, [B, B]: -log sigmoid(label * logit) (eq. 2).

    The logit is alpha * image_i . text_j + beta. The label is +1 on the diagonal and -1 elsewhere.
    The bias has the sign of Algorithm 2; eq. 2 prints the opposite one.
    """
    logits = similarities(model) + np.float64(model["b"])
    labels = 2.0 * np.eye(len(logits)) - 1.0
    return np.logaddexp(0.0, -labels * logits)


def sigmoid_loss(model):
    """The sigmoid loss of a batch (eq. 2): the sum over all pairs, divided by n, not by n^2."""
    losses = sigmoid_losses(model)
    return np.sum(losses) / len(losses)


def softmax_loss(model):
    """The softmax loss of a whole batch (eq. 1): half image-to-text plus half text-to-image."""
    logits = similarities(model)
    total = 0.0
    for i in range(len(logits)):
        total += 0.5 * (logsumexp(logits[i, :]) - logits[i, i])
        total += 0.5 * (logsumexp(logits[:, i]) - logits[i, i])
    return total / len(logits)


def combine(kind, quantity, learner, reference):
    """One of the three scores of section 3.1, for a loss-like `quantity` of one model."""
    if kind == "hard_learner":
        return quantity(learner)
    if kind == "easy_reference":
        return -quantity(reference)
    if kind == "learnability":
        return quantity(learner) - quantity(reference)
    raise ValueError(f"unknown kind of score: {kind!r}")


def score_matrix(kind, learner, reference):
    """S [B, B]: the score of each pair under the sigmoid loss (section 3.1)."""
    return combine(kind, sigmoid_losses, learner, reference)


def matrix_logits(scores, taken, gain):
    """Logit of each candidate given S itself and the picks T = `taken`, [B] (section 3.2).

    logit_i = gain * (S[i, i] + sum_{j in T} S[i, j] + sum_{j in T} S[j, i]) (Algorithm 1).
    Candidates that are in T get a number too. The sampler leaves them out.
    """
    logits = np.zeros(len(scores))
    for i in range(len(scores)):
        total = scores[i, i]
        for j in taken:
            total += scores[i, j] + scores[j, i]
        logits[i] = gain * total
    return logits


def sigmoid_logits(kind, learner, reference, taken, gain):
    """`matrix_logits` of the models' own score matrix (sigmoid loss)."""
    return matrix_logits(score_matrix(kind, learner, reference), taken, gain)


def softmax_logits(kind, learner, reference, taken, gain):
    """Logit of each candidate given the picks T = `taken`, for the softmax loss, [B] (Algorithm 3).

    For each model the quantity is -alpha * image_i . text_i, plus half of the logsumexp of image_i
    with the texts in T, plus half of the logsumexp of text_i with the images in T. The candidate's
    own pair is not in these two sums. If T is empty only the first term is left. The gain applies
    once, to the combined score. The first chunk uses both models; the print repeats the learner.
    Candidates that are in T get a number too. The sampler leaves them out.
    """
    def quantity(model):
        similarity = similarities(model)
        values = np.zeros(len(similarity))
        for i in range(len(similarity)):
            values[i] = -similarity[i, i]
            if len(taken) > 0:
                to_texts = logsumexp([similarity[i, j] for j in taken])
                to_images = logsumexp([similarity[j, i] for j in taken])
                values[i] += (to_texts + to_images) / 2
        return values
    return gain * combine(kind, quantity, learner, reference)


def joint_logits(kind, learner, reference, taken, gain, loss="sigmoid"):
    """The logits that the next chunk is drawn from, [B] (section 3.2, Algorithms 1 and 3)."""
    function = {"sigmoid": sigmoid_logits, "softmax": softmax_logits}[loss]
    return function(kind, learner, reference, taken, gain)


def batch_score(kind, learner, reference, chosen):
    """score(T) = sum_{a, b in T} S[a, b] for the sigmoid loss (section 3.2, without its 1/b)."""
    scores = score_matrix(kind, learner, reference)
    return sum(scores[a, b] for a in chosen for b in chosen)


def invariant_error(kind, learner, reference, taken, gain):
    """Largest |gain * (score(T + {i}) - score(T)) - logit_i| over candidates i not in T (sigmoid).

    The conditional logit must be the gain in batch score, so this is zero up to rounding.
    """
    logits = sigmoid_logits(kind, learner, reference, taken, gain)
    before = batch_score(kind, learner, reference, taken)
    errors = [0.0]
    for i in range(len(logits)):
        if i not in taken:
            after = batch_score(kind, learner, reference, list(taken) + [i])
            errors.append(abs(gain * (after - before) - logits[i]))
    return max(errors)


def quotas(n_select, n_chunks):
    """Sizes of the chunks (section 3.2), exact integers that add up to n_select.

    Chunk k holds the picks from k * n_select // n_chunks up to the same edge of k + 1.
    """
    edges = [k * n_select // n_chunks for k in range(n_chunks + 1)]
    return [edges[k + 1] - edges[k] for k in range(n_chunks)]


def jointly_sample(noise_KB, kind, learner, reference, n_select, n_chunks, gain,
                   loss="sigmoid"):
    """The n_select picks in the order drawn, a list of ints (section 3.2, Algorithms 1 and 3)."""
    return sample_chunks(noise_KB, quotas(n_select, n_chunks), lambda taken: joint_logits(
        kind, learner, reference, taken, gain, loss))


def sample_chunks(noise_KB, sizes, logits_given):
    """The picks in the order drawn, from logits_given(picks so far).

    Row k of noise_KB is the standard Gumbel noise of chunk k. The members of a chunk do not see
    each other: they are the largest perturbed logits, in descending order. This draws them without
    replacement from softmax(logits) over the candidates that are not taken yet.
    """
    noise_KB = np.asarray(noise_KB, np.float64)
    taken = []
    for k, size in enumerate(sizes):
        perturbed = logits_given(taken) + noise_KB[k]
        free = [i for i in range(noise_KB.shape[1]) if i not in taken]
        taken = taken + sorted(free, key=lambda i: -perturbed[i])[:size]
    return taken


def draw_log_probabilities(logits, taken, n):
    """Like draw_probabilities, but the values are natural logs."""
    logits = np.asarray(logits, np.float64)
    log_p = {frozenset(): 0.0}
    for _ in range(n):
        grown = {}
        for drawn, log_p_drawn in log_p.items():
            free = [i for i in range(len(logits)) if i not in taken and i not in drawn]
            log_total = logsumexp([logits[i] for i in free])
            for i in free:
                log_p_path = log_p_drawn + logits[i] - log_total
                key = drawn | {i}
                grown[key] = np.logaddexp(grown.get(key, -np.inf), log_p_path)
        log_p = grown
    return log_p


def draw_probabilities(logits, taken, n):
    """Exact probability of each unordered set of n draws: dict frozenset -> p (small B only).

    The draws come one after the other, without replacement, from softmax(logits) over the
    candidates not in `taken`. The probability of a set is the sum over its orders. A set grows by
    one draw at a time; what is left to draw from depends on the set alone, not on its order.
    """
    return {drawn: np.exp(v) for drawn, v in draw_log_probabilities(logits, taken, n).items()}


def chain_probabilities(kind, learner, reference, n_select, n_chunks, gain,
                        loss="sigmoid"):
    """Exact probability of each set of all the picks of jointly_sample: dict frozenset -> p.

    The logits of a chunk depend on the set of earlier picks and not on their order, so the chain
    over chunks (section 3.2) is summed over sets. Small B only.
    """
    log_p = {frozenset(): 0.0}
    for size in quotas(n_select, n_chunks):
        grown = {}
        for taken, log_p_taken in log_p.items():
            logits = joint_logits(kind, learner, reference, sorted(taken), gain, loss)
            for drawn, log_p_drawn in draw_log_probabilities(logits, taken, size).items():
                key = taken | drawn
                grown[key] = np.logaddexp(grown.get(key, -np.inf), log_p_taken + log_p_drawn)
        log_p = grown
    return {chosen: np.exp(v) for chosen, v in log_p.items()}


def gibbs(rng, kind, learner, reference, start, n_sweeps, gain):
    """Gibbs sampling of sub-batches of fixed size, p(T) ~ exp(gain * score(T)) (figure 2).

    `start` holds distinct indices. A sweep takes out each member in turn and redraws its place from
    softmax(gain * (S[i, i] + sum_{j in rest} (S[i, j] + S[j, i]))) over all candidates not in the
    rest; the one taken out may come back. Returns the sub-batch, and its score after each sweep.
    """
    scores = score_matrix(kind, learner, reference)
    both_ways = scores + scores.T
    chosen = [int(i) for i in start]
    if len(set(chosen)) != len(chosen):
        raise ValueError("start must hold distinct indices")
    score_after_sweep = []
    for _ in range(n_sweeps):
        # The running sum starts afresh in each sweep, so that rounding errors do not pile up.
        running = np.diag(scores) + np.sum(both_ways[:, chosen], axis=1)
        is_free = np.ones(len(scores), bool)
        is_free[chosen] = False
        for place in range(len(chosen)):
            is_free[chosen[place]] = True
            running = running - both_ways[:, chosen[place]]
            logits = np.where(is_free, gain * running, -np.inf)
            p = np.exp(logits - logsumexp(logits))
            chosen[place] = int(rng.choice(len(scores), p=p / np.sum(p)))
            is_free[chosen[place]] = False
            running = running + both_ways[:, chosen[place]]
        score_after_sweep.append(np.sum(scores[np.ix_(chosen, chosen)]))
    return chosen, np.array(score_after_sweep)


def bill(method, f, A=None, reuse=None, cached_reference=True):
    """Cost of one iteration relative to uniform training, which is 1 (A.4).

    A forward pass is F = 1/3 of a training step, and B/b = 1 / (1 - f).
      "uniform"     1.
      "jest"        F (3 + B/b), or F (2 + B/b) if the training step reuses the forward pass that
                    scored the picks. A.4 assumes this, so it is the default; Algorithm 2 does not.
      "flexi_jest"  3 F (0.5 + 0.5 A) + A F B/b. A is the cost of the approximate forward relative
                    to the full one.
    Reference embeddings that are not cached cost a full forward of the super-batch, F B/b, more.
    """
    F, ratio = 1 / 3, 1 / (1 - f)
    if method == "uniform":
        return 1.0
    reference = 0.0 if cached_reference else F * ratio
    if method == "jest" and A is None:
        return F * ((3 if reuse is False else 2) + ratio) + reference
    if method == "flexi_jest" and A is not None and not reuse:
        return 3 * F * (0.5 + 0.5 * A) + A * F * ratio + reference
    raise ValueError(f"no bill for method={method!r} with A={A!r}, reuse={reuse!r}")


# Flexi-JEST (FlexiViT, 2212.08013)


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
