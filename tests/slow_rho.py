"""Slow reference for "Bad Students Make Great Teachers" (Evans et al., arXiv 2312.05328).

Float64 numpy and plain loops, one function per equation, written from the paper's figures and
digests of its text, without looking at the implementation under test. Letters: n examples, c
classes, d embedding width, k draws, rho = B/b, F_L and F_p the forward cost of the learner and of
the proxy (= reference). `python tests/slow_rho.py` checks it against the costs measured off the
paper's figures and the overheads and break-even savings derived from them.
"""

import itertools
import math

import numpy as np

# ---------------------------------------------------------------- losses


def _log_sum_exp(row):
    """log sum_j exp(row_j), shifted by the largest entry."""
    top = max(float(x) for x in row)
    return top + math.log(sum(math.exp(float(x) - top) for x in row))


def _dot(a, b):
    """Inner product of two vectors."""
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def cross_entropy(logits, labels):
    """Settings, classification loss: l_i = log sum_j exp(logits_ij) - logits_i,labels_i.

    Shapes [n, c], [n] -> [n].
    """
    return smoothed_cross_entropy(logits, labels, 0.0)


def smoothed_cross_entropy(logits, labels, smoothing):
    """Settings, label smoothing s: l_i = -sum_j q_ij log p_ij, q = (1 - s) onehot + s / c.

    Shapes [n, c], [n] -> [n].
    """
    n, c = np.shape(logits)
    loss = np.zeros(n, np.float64)
    for i in range(n):
        log_z = _log_sum_exp(logits[i])
        for j in range(c):
            target = (1.0 - smoothing) * (j == labels[i]) + smoothing / c
            loss[i] -= target * (float(logits[i][j]) - log_z)
    return loss


def clip_loss(zi, zt, t):
    """Variants, ActiveCLIP: 1/(2n) sum_i [CE(t zi_i.zt_*, i) + CE(t zi_*.zt_i, i)].

    t is the inverse temperature. Embeddings are used as given: normalising them is the caller's
    part.
    """
    n = len(zi)
    total = 0.0
    for i in range(n):
        image_to_text = [t * _dot(zi[i], zt[j]) for j in range(n)]
        text_to_image = [t * _dot(zi[j], zt[i]) for j in range(n)]
        total += _log_sum_exp(image_to_text) - image_to_text[i]
        total += _log_sum_exp(text_to_image) - text_to_image[i]
    return total / (2 * n)


def siglip_loss(zi, zt, t, b):
    """Variants, ActiveSigLIP: 1/n sum_i sum_j -log sigmoid(y_ij (t zi_i.zt_j + b)).

    y_ij = 1 if i = j else -1.
    """
    n = len(zi)
    total = 0.0
    for i in range(n):
        for j in range(n):
            label = 1.0 if i == j else -1.0
            x = label * (t * _dot(zi[i], zt[j]) + b)
            total += max(-x, 0.0) + math.log1p(math.exp(-abs(x)))  # -log sigmoid(x)
    return total / n


def dot_product_loss(zi, zt):
    """Variants, l_act of an image-text pair: -zi_i . zt_i, free of the rest of the batch.

    Shapes [n, d], [n, d] -> [n].
    """
    return np.array([-_dot(a, b) for a, b in zip(zi, zt, strict=True)], np.float64)


# ---------------------------------------------------------------- score and selection


def score(kind, online, reference):
    """Eqs 4-5: hard learner l(x|o), easy reference -l(x|r), learnability their sum. [n] each."""
    out = []
    for l_online, l_reference in zip(online, reference, strict=True):
        hard, easy = float(l_online), -float(l_reference)
        by_kind = {"hard_learner": hard, "easy_reference": easy, "learnability": hard + easy}
        out.append(by_kind[kind])
    return np.array(out, np.float64)


def set_probabilities(scores, k, temperature=1.0):
    """Algorithm 1, draw b of B with SoftMax(s / T), without replacement: {set: probability}.

    Each draw renormalises over what is left; a set's probability is the sum over its k! orders.
    """
    n = len(scores)
    assert 0 <= k <= n <= 7, "enumeration is for small problems"
    s = [float(x) / temperature for x in scores]
    probabilities = {}
    for order in itertools.permutations(range(n), k):
        left = list(range(n))
        log_p = 0.0
        for i in order:
            log_p += s[i] - _log_sum_exp([s[j] for j in left])
            left.remove(i)
        chosen = frozenset(order)
        probabilities[chosen] = probabilities.get(chosen, 0.0) + math.exp(log_p)
    return probabilities


def inclusion_probabilities(scores, k, temperature=1.0):
    """P(i is in the sub-batch) under `set_probabilities`; the n entries sum to k."""
    inclusion = np.zeros(len(scores), np.float64)
    for chosen, p in set_probabilities(scores, k, temperature).items():
        for i in chosen:
            inclusion[i] += p
    return inclusion


def top_k(scores, k):
    """RHO-LOSS (2206.07137): the indices of the k largest scores; of equal ones the first win."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return set(order[:k])


# ---------------------------------------------------------------- the bill

LEVELS = ("fully amortized policy", "foundation dataset", "pretrained reference", "no amortization")


def bill(F_L, F_p, rho=2.0, reference_examples_per_learner_example=1.0):
    """The bill: cost of each role per example the learner trains on, in the unit of F_L and F_p."""
    return {
        "learner_update": 3 * F_L,  # forward 1, backward 2
        "online_scoring": rho * F_p,
        "online_update": 3 * F_p,
        "reference_scoring": rho * F_p,
        "reference_training": 3 * F_p * reference_examples_per_learner_example,
    }


def cumulative(levels):
    """Running sums of a sequence: [a, b, c] -> [a, a + b, a + b + c]."""
    sums, total = [], 0.0
    for level in levels:
        total += level
        sums.append(total)
    return sums


def total_over_iid(beta, F_L, F_p, rho=2.0):
    """Amortisation figure: {level: total / i.i.d. run}, each level charging one more item.

    The run is beta times as long as the i.i.d. one but its reference trains on as many examples as
    the i.i.d. run, 1/beta per learner example. At rho = 2 the last level is beta (3 F_L + 7 F_p) /
    (3 F_L) + F_p / F_L.
    """
    b = bill(F_L, F_p, rho, reference_examples_per_learner_example=1 / beta)
    items = [
        b["learner_update"],
        b["online_scoring"] + b["online_update"],
        b["reference_scoring"],
        b["reference_training"],
    ]
    return {name: beta * x / (3 * F_L) for name, x in zip(LEVELS, cumulative(items), strict=True)}


def overhead_factor(F_L, F_p, rho=2.0):
    """The bill, all five roles over 3 F_L at beta = 1: 1 + (2 rho + 6) F_p / (3 F_L)."""
    return sum(bill(F_L, F_p, rho).values()) / (3 * F_L)


def rho_loss_factor(F_L, F_p, rho=2.0):
    """The bill of RHO, whose learner scores: (3 F_L + rho (F_L + F_p) + 3 F_p) / (3 F_L)."""
    return (3 * F_L + rho * (F_L + F_p) + 3 * F_p) / (3 * F_L)


def break_even_saving(k, F_L, F_p):
    """Learner saving 1 - beta that repays k proxy forwards per learner example.

    1 - 1 / (1 + k F_p / (3 F_L)). k = 4 scoring, 7 with the online update, 10 with reference
    training. All k scale with beta, so at k = 10 the reference trains only as long as the shortened
    run, unlike in `total_over_iid`.
    """
    return 1 - 1 / (1 + k * F_p / (3 * F_L))


def break_even_saving_full_reference(F_L, F_p, rho=2.0):
    """1 - beta at which the last level of `total_over_iid` is 1.

    With x = F_p / (3 F_L) it is (2 rho + 6) x / (1 + (2 rho + 3) x): the reference costs the same
    however short the learner's run.
    """
    x = F_p / (3 * F_L)
    return (2 * rho + 6) * x / (1 + (2 * rho + 3) * x)


# ---------------------------------------------------------------- optimiser


def adamw_step(param, grad, m, v, t, lr, b1=0.9, b2=0.999, eps=1e-8, wd=0.0):
    """AdamW (Loshchilov & Hutter, 1711.05101): one update -> (param, m, v).

    param - lr (m_hat / (sqrt(v_hat) + eps) + wd param). t is 1 at the first update; the decay is
    scaled by lr, is not in the moments, and uses the old parameter.
    """
    new_param, new_m, new_v = (np.zeros(np.shape(param), np.float64) for _ in range(3))
    for i in np.ndindex(np.shape(param)):
        p, g = float(np.asarray(param)[i]), float(np.asarray(grad)[i])
        new_m[i] = b1 * float(np.asarray(m)[i]) + (1 - b1) * g
        new_v[i] = b2 * float(np.asarray(v)[i]) + (1 - b2) * g * g
        m_hat, v_hat = new_m[i] / (1 - b1**t), new_v[i] / (1 - b2**t)
        new_param[i] = p - lr * (m_hat / (math.sqrt(v_hat) + eps) + wd * p)
    return new_param, new_m, new_v


def lr(step, peak, warmup, total):
    """Settings, cosine decay: 0 to peak linearly in `warmup`, then half a cosine to 0 at `total`.

    step counts the updates already made, so with a warm-up the first update has rate 0.
    """
    if step >= total:
        return 0.0
    if step < warmup:
        return peak * step / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


# ---------------------------------------------------------------- vision transformer cost

VIT = {  # width, depth, mlp
    "Mu": (32, 1, 128),
    "Ti": (192, 12, 768),
    "S": (384, 12, 1536),
    "B": (768, 12, 3072),
    "L": (1024, 24, 4096),
}


def vit_forward_flops(width, depth, mlp, tokens, patches=0, patch_dim=0):
    """Forward FLOPs (2 per multiply-add) of one image: blocks, and the patch embedding if given.

    Summed product by product; the blocks equal depth (T (8 D^2 + 4 D F) + 4 T^2 D). No norms, no
    softmax, no head.
    """
    flops = 2 * patches * patch_dim * width
    for _ in range(depth):
        for _ in ("query", "key", "value", "output"):
            flops += 2 * tokens * width * width
        for _ in ("query.key", "weights.value"):
            flops += 2 * tokens * tokens * width
        for _ in ("mlp in", "mlp out"):
            flops += 2 * tokens * width * mlp
    return flops


# ---------------------------------------------------------------- the printed numbers

GMACS = {"Ti": 1.26, "S": 4.6, "B": 17.5, "L": 61.6}  # forward, 224 pixels, as the figures use them
OVERHEAD = {("Ti", "L"): 1.068, ("S", "L"): 1.249, ("B", "L"): 1.947, ("Ti", "B"): 1.24}
AMORTISATION = {  # scorer -> ViT-L; the first entry is beta
    "B": (0.690, 1.019, 1.150, 1.436),
    "S": (0.700, 0.787, 0.822, 0.897),
    "Ti": (0.740, 0.766, 0.776, 0.798),
    "Mu": (0.760, 0.766, 0.768, 0.773),
}
BREAK_EVEN = {  # per cent at k = 4, 7, 10; whole numbers are printed as such
    ("Ti", "L"): (2.7, 4.6, 6.4),
    ("S", "L"): (9.1, 14.8, 19.9),
    ("B", "L"): (27.5, 39.9, 48.6),
    ("Ti", "B"): (8.8, 14.4, 19.4),
    ("S", "B"): (26, 38, 46.7),
}


def vit_gmacs(name):
    """Forward multiply-adds, in units of 1e9, 224 pixels, 16-pixel patches, a class token."""
    width, depth, mlp = VIT[name]
    flops = vit_forward_flops(width, depth, mlp, tokens=197, patches=196, patch_dim=16 * 16 * 3)
    return flops / 2e9


def check():
    """Every printed number within half a unit of its last digit, unless a tolerance is said."""
    for (p, learner), printed in OVERHEAD.items():
        assert abs(overhead_factor(GMACS[learner], GMACS[p]) - printed) <= 0.0005, (p, learner)
    assert abs(rho_loss_factor(GMACS["B"], GMACS["Ti"]) - 1.787) <= 0.0005

    for p in ("B", "S", "Ti"):  # measured off a plot: 1 %
        printed = AMORTISATION[p]
        ours = total_over_iid(printed[0], GMACS["L"], GMACS[p])
        for name, value in zip(LEVELS, printed, strict=True):
            assert abs(ours[name] / value - 1) <= 0.01, (p, name, ours[name], value)
    # Row Mu is not reproduced by its size: the plot's Mu costs about 30 times more. 2 %.
    ours = total_over_iid(AMORTISATION["Mu"][0], GMACS["L"], vit_gmacs("Mu"))
    for name, value in zip(LEVELS, AMORTISATION["Mu"], strict=True):
        assert abs(ours[name] / value - 1) <= 0.02, (name, ours[name], value)

    for (p, learner), printed in BREAK_EVEN.items():
        for k, value in zip((4, 7, 10), printed, strict=True):
            tolerance = 0.5 if isinstance(value, int) else 0.05
            ours = 100 * break_even_saving(k, GMACS[learner], GMACS[p])
            assert abs(ours - value) <= tolerance, (p, learner, k, ours)
    beta = 1 - break_even_saving_full_reference(GMACS["L"], GMACS["B"])
    assert abs(total_over_iid(beta, GMACS["L"], GMACS["B"])["no amortization"] - 1) < 1e-12

    for name, value in GMACS.items():  # the closed form omits norms, softmax and head: 1 %
        assert abs(vit_gmacs(name) / value - 1) <= 0.01, (name, vit_gmacs(name))
    for width, depth, mlp in VIT.values():
        closed = depth * (197 * (8 * width**2 + 4 * width * mlp) + 4 * 197**2 * width)
        assert vit_forward_flops(width, depth, mlp, tokens=197) == closed

    # Values known by hand, so that the equations above are held to something too.
    zero, eye = np.zeros((4, 3)), np.eye(2)
    assert np.allclose(cross_entropy(zero, [0, 1, 2, 0]), math.log(3))
    assert np.allclose(cross_entropy([[math.log(3), 0.0]], [1]), math.log(4))
    smoothed = math.log(4) - 0.05 * math.log(3)
    assert np.allclose(smoothed_cross_entropy([[math.log(3), 0.0]], [1], 0.1), smoothed)
    assert math.isclose(clip_loss(eye, eye, 2.0), math.log(1 + math.exp(-2)))
    # Two equal images: either text's column costs log 2, the rows differ.
    rows = math.log1p(math.exp(-2)) + math.log1p(math.exp(2))
    clip = clip_loss([[1.0], [1.0]], [[3.0], [1.0]], 1.0)
    assert math.isclose(clip, (rows + 2 * math.log(2)) / 4)
    assert math.isclose(siglip_loss(eye, eye, 2.0, -1.0), 2 * math.log1p(math.exp(-1)))
    assert math.isclose(siglip_loss(zero, zero, 5.0, 0.0), 4 * math.log(2))
    assert np.array_equal(dot_product_loss([[1, 2]], [[3, 4]]), [-11])
    for kind, value in {"learnability": 1.5, "easy_reference": -0.5, "hard_learner": 2.0}.items():
        assert score(kind, [2.0], [0.5]) == [value]
    sets = set_probabilities([math.log(2), 0.0, 0.0], 2)  # p = 1/2, 1/4, 1/4
    assert math.isclose(sets[frozenset({0, 1})], 5 / 12)
    assert math.isclose(sets[frozenset({1, 2})], 1 / 6)
    assert np.allclose(inclusion_probabilities([math.log(2), 0.0, 0.0], 2), [5 / 6, 7 / 12, 7 / 12])
    assert np.allclose(inclusion_probabilities(np.zeros(6), 3, 0.7), 1 / 2)
    assert np.allclose(inclusion_probabilities([math.log(2), 0.0], 1, 0.5), [4 / 5, 1 / 5])
    assert top_k([1.0, 3.0, 2.0, 3.0], 2) == {1, 3} and top_k(np.zeros(3), 1) == {0}
    # The first step is the gradient's sign, plus the decay.
    p, m, v = adamw_step([2.0], [-3.0], [0.0], [0.0], 1, 0.1, eps=0.0, wd=0.25)
    assert np.allclose(p, 2.0 - 0.1 * (-1 + 0.5)) and np.allclose(m, -0.3) and np.allclose(v, 0.009)
    p, m, v = adamw_step([1.0], [2.0], [1.0], [5.0], 2, 0.1, b1=0.5, b2=0.8, eps=0.5)
    assert np.allclose(m, 1.5) and np.allclose(v, 4.8)  # hats: 1.5 / 0.75, 4.8 / 0.36
    assert np.allclose(p, 1.0 - 0.1 * 2.0 / (math.sqrt(4.8 / 0.36) + 0.5))
    assert np.allclose([lr(s, 2.0, 4, 12) for s in (0, 2, 4, 8, 12, 13)], [0, 1, 2, 1, 0, 0])
    return True


if __name__ == "__main__":
    check()
    print("all reproduced, but row Mu of the amortisation figure (1.6 % off)")
