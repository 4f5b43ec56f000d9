"""What frozen features are worth: nearest neighbours, a linear probe, accuracy by class frequency.

Every arm gets the same probe. Its only setting is the weight decay. It is chosen on a part of the
TRAINING features that is held out, and then the probe is fitted again on all of them.

Dimension letters: N training features, M test features, D width, C classes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


def knn_predict(train_ND, label_N, test_MD, n_classes, *, k=20, temperature=0.07, block=256):
    """Class [M] of each test feature. The k training features with the largest cosine vote for
    their classes, with weight exp(cosine / temperature) (Wu et al., 1805.01978)."""
    return np.asarray(_knn(unit(train_ND), np.asarray(label_N), unit(test_MD), n_classes,
                           min(k, len(train_ND)), temperature, min(block, len(test_MD))))


@functools.partial(jax.jit, static_argnums=(3, 4, 6))
def _knn(train_ND, label_N, test_MD, n_classes, k, temperature, block):
    def one(x_D):
        cosine_k, near_k = jax.lax.top_k(
            jnp.matmul(train_ND, x_D, precision=jax.lax.Precision.HIGHEST), k)
        vote_k = jnp.exp((cosine_k - 1) / temperature)  # the - 1 prevents overflow
        return jnp.zeros(n_classes).at[label_N[near_k]].add(vote_k).argmax()
    return jax.lax.map(one, test_MD, batch_size=block)


def unit(x_ND):
    """Rows divided by their length, in float32. A row of zeros stays zero."""
    x_ND = np.asarray(x_ND, np.float32)
    return x_ND / np.sqrt(np.maximum(np.square(x_ND).sum(-1, keepdims=True), 1e-12))


def linear_probe(train_ND, label_N, test_MD, n_classes, *, decays=DECAYS, held_out=0.2):
    """(class [M] of each test feature, the weight decay that was chosen).

    All features are standardised with the mean and deviation of the training features. A random
    part of these, of the fraction `held_out`, is kept back to choose the decay.
    """
    x_ND, mean_D = np.asarray(train_ND, np.float32), np.mean(train_ND, 0)
    scale_D = 1 / (np.std(x_ND, 0) + 1e-6)
    x_ND, test_MD = (x_ND - mean_D) * scale_D, (np.asarray(test_MD) - mean_D) * scale_D
    order = np.random.default_rng(0).permutation(len(x_ND))
    # rows are left out by weight 0: so every fit has the same shape and is compiled once
    fits = np.ones(len(x_ND), np.float32)
    fits[order[:max(1, round(held_out * len(x_ND)))]] = 0
    best, decay = -1.0, decays[0]
    for l2 in decays if fits.any() else decays[:1]:
        w_DC, b_C = fit_probe(x_ND, label_N, fits, l2, n_classes)
        right = (x_ND @ w_DC + b_C).argmax(1) == label_N
        if right[fits == 0].mean() >= best:  # of equally good ones the largest decay
            best, decay = right[fits == 0].mean(), l2
    w_DC, b_C = fit_probe(x_ND, label_N, np.ones_like(fits), decay, n_classes)
    return (test_MD @ w_DC + b_C).argmax(1), decay


def probe_loss(params, x_ND, label_N, weight_N, l2):
    """Weighted mean cross-entropy of softmax(x w + b), plus l2 / 2 |w|^2. b has no decay."""
    loss_N = optax.softmax_cross_entropy_with_integer_labels(
        x_ND @ params["w"] + params["b"], label_N)
    return jnp.sum(weight_N * loss_N) / weight_N.sum() + l2 / 2 * jnp.sum(params["w"]**2)


def fit_probe(x_ND, label_N, weight_N, l2, n_classes):
    """(w [D, C], b [C]) that minimise `probe_loss`, starting from 0."""
    return jax.device_get(_fit(x_ND, label_N, weight_N, l2, n_classes))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _fit(x_ND, label_N, weight_N, l2, n_classes, iterations=200):
    """L-BFGS until the norm of the gradient is at most 1e-4, or for so many iterations."""
    loss = lambda params: probe_loss(params, x_ND, label_N, weight_N, l2)
    rule, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def update(carry):
        params, opt, i, _ = carry
        value, grad = value_and_grad(params, state=opt)
        updates, opt = rule.update(grad, opt, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), opt, i + 1, optax.tree.norm(grad)

    params = {"w": jnp.zeros((x_ND.shape[1], n_classes)), "b": jnp.zeros(n_classes)}
    params, *_ = jax.lax.while_loop(lambda c: (c[2] < iterations) & (c[3] > 1e-4), update,
                                    (params, rule.init(params), 0, jnp.inf))
    return params["w"], params["b"]


# ------------------------------------------------------------------------------------ measures


def balanced_accuracy(predicted_M, label_M):
    """The fraction of each class that is predicted right, averaged over the classes that occur."""
    right = predicted_M == label_M
    return float(np.mean([right[label_M == c].mean() for c in np.unique(label_M)]))


def by_frequency(predicted_M, label_M, count_C):
    """{'head', 'middle', 'tail'}: accuracy on the test examples of three groups of classes.

    The classes are sorted by their number of training examples, count_C, and cut into thirds. The
    head is the commonest. A third without test examples has None.
    """
    order_C = np.argsort(-np.asarray(count_C), kind="stable")
    right = predicted_M == label_M
    return {name: float(right[rows].mean()) if (rows := np.isin(label_M, part)).any() else None
            for name, part in zip(("head", "middle", "tail"), np.array_split(order_C, 3))}


def nmi(a_N, b_N):
    """Normalised mutual information I(a; b) / ((H(a) + H(b)) / 2). It is 1 if both are constant."""
    _, a_N = np.unique(a_N, return_inverse=True)
    _, b_N = np.unique(b_N, return_inverse=True)
    joint = np.zeros((a_N.max() + 1, b_N.max() + 1))
    np.add.at(joint, (a_N, b_N), 1 / len(a_N))
    entropy = lambda p: -np.sum(p[p > 0] * np.log(p[p > 0]))
    h_a, h_b = entropy(joint.sum(1)), entropy(joint.sum(0))
    return float(2 * (h_a + h_b - entropy(joint)) / (h_a + h_b)) if h_a + h_b > 0 else 1.0


def knn_metrics(train, test, n_classes):
    """Accuracy of nearest neighbours. train, test: {'h': features, 'label'} of the two pools."""
    predicted_M = knn_predict(train["h"], train["label"], test["h"], n_classes)
    return {"knn": float((predicted_M == test["label"]).mean()),
            "knn_balanced": balanced_accuracy(predicted_M, test["label"])}


def linear_metrics(train, test, n_classes):
    """Accuracies of the linear probe on the same, and the weight decay that it chose."""
    predicted_M, decay = linear_probe(train["h"], train["label"], test["h"], n_classes)
    count_C = np.bincount(train["label"], minlength=n_classes)
    return {"linear_probe": float((predicted_M == test["label"]).mean()),
            "balanced_accuracy": balanced_accuracy(predicted_M, test["label"]),
            **by_frequency(predicted_M, test["label"], count_C), "probe_decay": decay}
