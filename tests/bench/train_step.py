"""How long one training step takes, ours beside torch eager: `python tests/bench/train_step.py`.

A step is the forward pass, the backward pass and AdamW on one batch of random images with labels.
Both frameworks train the same ViT of common/vit.py in float32, in one process, in turns: what else
the machine does slows both alike. The figures are medians over the turns, and their ratio means
more than the milliseconds. Without torch only our own step is timed. Nothing is asserted: this is
not a test.

    python tests/bench/train_step.py                      # the three sizes below
    python tests/bench/train_step.py 96/4/384/4,28,7,128  # size, image side, patch side, batch

A compiled step asks for its scratch memory at every call, 80 MB for the first size. Where Linux has
set /sys/kernel/mm/transparent_hugepage/enabled to `madvise`, as Debian and Ubuntu do, the kernel
gives this memory out in 20,000 small pages, and that takes a quarter of the time of a step.
With this setting it gives out large pages:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python tests/bench/train_step.py
"""

import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import vit

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

CASES = ("96/4/384/4,28,7,128", "64/4/256/4,32,8,128", "Ti,96,16,32")
CLASSES = 10
TURNS = 15
SECONDS = 0.5  # at least, for one framework in one turn


def our_step(config, image, label):
    """() -> loss, a Python float: one step of our own program, its state kept between calls."""
    optimiser = optax.adamw(1e-3, weight_decay=1e-4)

    def step(state, image, label):
        def loss(params):
            logits = vit.vit_apply(params, image, config)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimiser.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    params = jax.jit(vit.vit_init, static_argnums=1)(jax.random.key(0), config)
    state = params, optimiser.init(params)
    image, label = jnp.asarray(image), jnp.asarray(label)
    compiled = jax.jit(step, donate_argnums=0).lower(state, image, label).compile()

    def run():
        nonlocal state
        state, value = compiled(state, image, label)
        return float(value)
    return run


def torch_step(config, image, label):
    """The same as `our_step`, by torch: the usual modules, fused attention, fused AdamW. It starts
    from our weights, so that both must print the same losses."""
    D, L, M, H = vit.size(config.size)
    P = config.patch

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_attention, self.norm_mlp = (torch.nn.LayerNorm(D, eps=1e-6) for _ in "12")
            self.qkv, self.o = torch.nn.Linear(D, 3 * D), torch.nn.Linear(D, D)
            self.up, self.down = torch.nn.Linear(D, M), torch.nn.Linear(M, D)

        def forward(self, x):
            B, T, _ = x.shape
            qkv = self.qkv(self.norm_attention(x)).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(B, T, D)
            x = x + self.o(y)
            return x + self.down(F.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))

    class ViT(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Linear(P * P * config.channels, D)
            self.position = torch.nn.Parameter(torch.zeros(config.tokens, D))
            self.blocks = torch.nn.Sequential(*(Block() for _ in range(L)))
            self.norm = torch.nn.LayerNorm(D, eps=1e-6)
            self.head = torch.nn.Linear(D, config.n_out)

        def forward(self, image):
            B, S, _, C = image.shape
            x = image.view(B, S // P, P, S // P, P, C).transpose(2, 3).reshape(B, -1, P * P * C)
            return self.head(self.norm(self.blocks(self.embed(x) + self.position)).mean(1))

    model = ViT()
    params = jax.jit(vit.vit_init, static_argnums=1)(jax.random.key(0), config)
    tensor = lambda x: torch.tensor(np.asarray(x))

    @torch.no_grad()
    def copy(module, *ours):  # linear maps side by side, or one norm
        if "w" in ours[0]:
            module.weight.copy_(tensor(np.concatenate([p["w"] for p in ours], 1).T))
            module.bias.copy_(tensor(np.concatenate([p["b"] for p in ours])))
        else:
            module.weight.copy_(tensor(ours[0]["scale"]))
            module.bias.copy_(tensor(ours[0]["bias"]))

    copy(model.embed, params["embed"])
    copy(model.norm, params["norm"])
    copy(model.head, params["head"])
    model.position.data = tensor(params["position"])
    for i, block in enumerate(model.blocks):
        p = jax.tree.map(lambda x: x[i], params["blocks"])
        copy(block.norm_attention, p["norm_attention"])
        copy(block.qkv, *(p["attention"][name] for name in "qkv"))
        copy(block.o, p["attention"]["o"])
        copy(block.norm_mlp, p["norm_mlp"])
        copy(block.up, p["mlp"]["up"])
        copy(block.down, p["mlp"]["down"])

    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4, fused=True)
    image, label = tensor(image), tensor(label).long()

    def run():
        optimiser.zero_grad()
        value = F.cross_entropy(model(image), label)
        value.backward()
        optimiser.step()
        return value.item()
    return run


def time_in_turns(steps):
    """{name: step} -> {name: seconds per step, the median over the turns}."""
    repeats = {}
    for name, step in steps.items():
        for _ in range(2):  # warm up
            step()
        begin = time.perf_counter()
        step()
        repeats[name] = 1 + int(SECONDS / (time.perf_counter() - begin))
    seconds = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            step()  # the threads of the other framework come to rest
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            seconds[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(cases):
    print(f"{'size, side, patch, batch':28}{'ours, ms':>10}{'torch, ms':>11}{'ratio':>8}   losses")
    for case in cases:
        size, side, patch, batch = case.split(",")
        config = vit.ViT(size, int(side), int(patch), CLASSES)
        rng = np.random.default_rng(0)
        image = rng.uniform(-1, 1, (int(batch), int(side), int(side), 3)).astype(np.float32)
        label = rng.integers(0, CLASSES, int(batch)).astype(np.int32)
        steps = {"ours": our_step(config, image, label)}
        if torch:
            steps["torch"] = torch_step(config, image, label)
        losses = {name: [step() for _ in range(3)][-1] for name, step in steps.items()}
        ms = {name: 1e3 * seconds for name, seconds in time_in_turns(steps).items()}
        beside = f"{ms['torch']:11.1f}{ms['ours'] / ms['torch']:8.2f}" if torch else f"{'':19}"
        after = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        print(f"{case:28}{ms['ours']:10.1f}{beside}   after 2 steps: {after}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or CASES)
