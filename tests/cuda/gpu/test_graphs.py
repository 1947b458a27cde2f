"""CUDA graphs: each replay draws new noise and updates the buffers."""

import pytest
import torch
from raw_ops import both_passes

import normnorm
from normnorm.noise import draw_seed

from .cases import CASES, assert_same, make

LAYERS = {
    "batch": lambda d: (normnorm.BatchNormalNorm2d(16, device=d), (8, 16, 14, 14)),
    "layer": lambda d: (normnorm.LayerNormalNorm(320, device=d), (64, 320)),
    "group": lambda d: (normnorm.GroupNormalNorm(4, 16, device=d), (8, 16, 9, 9)),
    "instance": lambda d: (
        normnorm.InstanceNormalNorm1d(4, affine=True, track_running_stats=True, device=d),
        (8, 4, 500),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_each_replay_of_a_training_step_draws_fresh_noise(rig, backend, kind):
    layer, shape = LAYERS[kind](rig.device)
    x = torch.randn(shape, device=rig.device, requires_grad=True)
    g = torch.randn(shape, device=rig.device)
    parameters = [x, layer.weight, layer.bias]

    def step():
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, parameters, g))

    replay = rig.capture(step)
    tracked = getattr(layer, "num_batches_tracked", None)
    before = None if tracked is None else int(tracked)
    found = []
    for _ in range(4):
        results = replay()
        rig.synchronize()
        found.append([t.clone() for t in results])
    outputs = [results[0] for results in found]
    assert all(y.isfinite().all() for y in outputs)
    for i, y in enumerate(outputs):
        assert not any(torch.equal(y, other) for other in outputs[:i]), "noise was repeated"
        # the gradients of input and bias do not depend on the noise
        assert torch.equal(found[i][1], found[0][1])
        assert torch.equal(found[i][3], found[0][3])
    if before is not None:
        assert int(tracked) == before + 4


@pytest.mark.parametrize("name", ["batch-2d", "layer", "layer-long"])
def test_a_replay_equals_eager_mode(rig, backend, name):
    case = rig.pick(*CASES[name])
    t = make(rig, case, torch.bfloat16)
    x = t["x"].clone()

    def step():
        return both_passes(backend, case, t, noise_train=0.7)

    replay = rig.capture(step)
    for turn in range(3):
        t["x"].copy_(x * (1 + turn))
        t["seed"].fill_(turn)
        graph = tuple(result.clone() for result in replay())
        assert_same(graph, step(), f"replay {turn + 1} and eager mode")


def test_seeds_drawn_in_a_graph_differ(rig):
    replay = rig.capture(lambda: draw_seed(rig.device))
    seeds = [int(replay()) for _ in range(8)]
    assert len(set(seeds)) == 8
