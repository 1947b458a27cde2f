"""The projected error function loss: its values, its gradients, its memory, its hooks."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import normnorm
from normnorm import backends, per
from normnorm.backends import cpu


def _directions(num_slices: int, features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    slices = torch.randn(num_slices, features, dtype=dtype, generator=_generator())
    return slices / slices.norm(dim=1, keepdim=True)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_integrand_is_the_mean_distance_to_a_normal() -> None:
    # t erf(t / sqrt 2) + sqrt(2 / pi) exp(-t^2 / 2) = E |t - z|, z from N(0, 1).
    for t in (-2.5, 0.0, 0.3, 4.0):
        expected, _ = scipy.integrate.quad(
            lambda z, t=t: abs(t - z) * scipy.stats.norm.pdf(z), -12, 12, points=[t]
        )
        found = normnorm.per_loss(torch.full((1, 1), t, dtype=torch.float64), 1, _generator())
        assert found.item() == pytest.approx(expected, abs=1e-9)


# Of a leaf of shape (3000, 8), which 100 directions divide into three blocks.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "three blocks": lambda h: h,
    "one number": lambda h: h[:1, :1],
    "a vector": lambda h: h[0],
    "sequences": lambda h: h.reshape(30, 100, 8),
    "transposed": lambda h: h[:40].T,
    "expanded": lambda h: h[:1].expand(50, -1),
    "movedim": lambda h: h.reshape(4, -1, 8).movedim(1, -1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_blocks_give_the_formula_and_its_gradient(name: str, cpu_backend: str) -> None:
    leaf = (2 * torch.randn(3000, 8, dtype=torch.float64)).requires_grad_()
    activations = ACTIVATIONS[name](leaf)
    features = activations.shape[-1]
    expected = per._definition(activations.reshape(-1, features), _directions(100, features))
    found = normnorm.per_loss(activations, 100, _generator())
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    gradients = (torch.autograd.grad(loss, leaf)[0] for loss in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-16)


def test_first_and_second_gradients_are_right(cpu_backend: str) -> None:
    activations = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    slices = _directions(6, 3)

    def loss(h: Tensor) -> Tensor:
        return per._Blockwise.apply(h, slices)

    assert torch.autograd.gradcheck(loss, (activations,))
    assert torch.autograd.gradgradcheck(loss, (activations,))


@pytest.mark.parametrize(
    ("dtype", "bound", "count", "scale"),
    [
        (torch.float32, 1e-6, 300, 1.0),
        (torch.bfloat16, 2**-8, 300, 1.0),
        (torch.float16, 2**-10, 300, 1.0),
        # a gradient that float16 holds only after a loss scaler's factor
        (torch.float16, 2**-10, 20_000, 2.0**15),
    ],
)
def test_lower_precisions_follow_the_same_directions(
    dtype: torch.dtype, bound: float, count: int, scale: float, cpu_backend: str
) -> None:
    activations = torch.randn(count, 20).to(dtype).requires_grad_()
    found = normnorm.per_loss(activations, 64, _generator())
    (found * scale).backward()
    exact = activations.detach().double().requires_grad_()
    expected = per._definition(exact, _directions(64, 20, torch.float32).double())
    (expected * scale).backward()
    assert found.dtype == torch.float32
    assert activations.grad.dtype == dtype
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    error = (activations.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < bound


def test_no_matrix_of_samples_by_slices_is_made(cpu_backend: str) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest] + [t.numel() for t in (out,) if isinstance(t, Tensor)])
            return out

    activations = torch.randn(20_000, 8, requires_grad=True)
    with Watch():
        normnorm.per_loss(activations, 256).backward()
    assert largest <= max(per._BLOCK, activations.numel()) < 20_000 * 256 // 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_activations_give_nonfinite_loss(value: float, cpu_backend: str) -> None:
    activations = torch.randn(700, 5)
    activations[600, 2] = value
    loss = normnorm.per_loss(activations.requires_grad_(), 200)
    assert not loss.isfinite()
    loss.backward()
    assert activations.grad.isfinite().all(1).sum() == (699 if math.isnan(value) else 700)


def test_a_generator_repeats_the_directions_and_the_default_is_torchs() -> None:
    activations = torch.randn(30, 10)
    first, again = (normnorm.per_loss(activations, 8, _generator()) for _ in range(2))
    assert first == again
    state = torch.get_rng_state()
    first, other = (normnorm.per_loss(activations, 8) for _ in range(2))
    assert first != other
    torch.set_rng_state(state)
    assert first == normnorm.per_loss(activations, 8)


def test_a_compiled_loss_is_the_same() -> None:
    activations = torch.randn(40, 6, requires_grad=True)
    compiled = torch.compile(normnorm.per_loss, backend="aot_eager", fullgraph=True)
    found = []
    for function in (compiled, normnorm.per_loss):
        torch.manual_seed(0)
        loss = function(activations, 16)
        found.append((loss, torch.autograd.grad(loss, activations)))
    torch.testing.assert_close(*found)


def _seeded(activations: Tensor) -> Tensor:
    return normnorm.per_loss(activations, 16, _generator())


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": torch.func.grad(_seeded),
    "vmap of grad": lambda x: torch.vmap(torch.func.grad(_seeded), randomness="same")(x[None])[0],
    "jacfwd": torch.func.jacfwd(_seeded, randomness="same"),
    "jacrev": torch.func.jacrev(_seeded),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_give_the_same_gradient(transform: str) -> None:
    leaf = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(_seeded(leaf), leaf)
    torch.testing.assert_close(TRANSFORMS[transform](leaf.detach()), expected)


def test_forward_mode_and_second_derivatives_give_the_same() -> None:
    x, v = torch.randn(2, 6, 7, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_seeded(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient, leaf, v)
    torch.testing.assert_close(torch.func.jvp(_seeded, (x,), (v,))[1], (gradient * v).sum())
    found = torch.func.jvp(torch.func.grad(_seeded), (x,), (v,))[1]
    torch.testing.assert_close(found, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_meta_activations_give_a_meta_scalar(dtype: torch.dtype) -> None:
    activations = torch.empty(3, 5, 7, device="meta", dtype=dtype, requires_grad=True)
    loss = normnorm.per_loss(activations, 16, _generator())
    loss.backward()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (), wanted)
    assert activations.grad.shape == activations.shape


def test_a_loss_inside_a_checkpoint_has_its_own_gradient_or_none() -> None:
    leaf = torch.randn(6, 7, requires_grad=True)
    torch.manual_seed(0)
    expected = torch.autograd.grad(normnorm.per_loss(leaf, 4), leaf)
    torch.manual_seed(0)
    loss = checkpoint(normnorm.per_loss, leaf, 4, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected[0])
    loss = checkpoint(normnorm.per_loss, leaf, 4, _generator(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="ran per_loss again with other directions"):
        loss.backward()


# Implementations of a block.


@pytest.fixture
def kernel() -> per.ProjectedError:
    """The compiled op."""
    if cpu.unavailable_reason() is not None:
        pytest.skip(str(cpu.unavailable_reason()))
    return torch.ops.normnorm_cpu.projected_error_.default


def test_the_chosen_backend_computes() -> None:
    device = torch.device("cpu")
    with normnorm.use_backend("reference"):
        assert per.projected_error_of(device) is per._plain
    if cpu.unavailable_reason() is None:
        found = per.projected_error_of(device)
        assert found is torch.ops.normnorm_cpu.projected_error_.default
    assert per.projected_error_of(torch.device("meta")) is per._plain
    assert backends.resolve(torch.device("meta")).name == "reference"


@pytest.mark.parametrize("shape", [(0, 3), (1,), (9, 15), (300, 211)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_a_block_is_added_up_and_replaced_by_its_slopes(
    shape: tuple[int, ...], dtype: torch.dtype, bound: float, cpu_backend: str
) -> None:
    projected_error_ = per.projected_error_of(torch.device("cpu"))
    t = 3 * torch.randn(shape, dtype=dtype)
    exact = t.double().numpy()
    slopes = scipy.special.erf(exact * math.sqrt(0.5))
    total = (exact * slopes + math.sqrt(2 / math.pi) * np.exp(-(exact**2) / 2)).sum()
    sums = torch.tensor([5.0, 7.0, 0.0], dtype=torch.float64)
    projected_error_(t.clone(), sums, False)
    projected_error_(t, sums, True)
    assert sums.sum().item() == pytest.approx(12 + 2 * total, rel=bound)
    torch.testing.assert_close(t.double(), torch.from_numpy(slopes), rtol=bound, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_is_bitwise_the_same_for_any_number_of_threads(
    dtype: torch.dtype, kernel: per.ProjectedError, set_threads: Callable[[int], None]
) -> None:
    for count in (1, 8191, 3 * 8192 + 5, 200_000):
        t, results = torch.randn(count, dtype=dtype), []
        for threads in (1, 2, 7):
            set_threads(threads)
            slopes, sums = t.clone(), torch.zeros(1, dtype=torch.float64)
            kernel(slopes, sums, True)
            results.append((slopes, sums))
        torch.testing.assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)


def test_slopes_are_written_only_on_request(kernel: per.ProjectedError) -> None:
    t = torch.randn(100)
    before = t.clone()
    kernel(t, torch.zeros(1, dtype=torch.float64), False)
    assert torch.equal(t, before)
    assert t._version == 0
    kernel(t[10:90], torch.zeros(1, dtype=torch.float64), True)
    assert torch.equal(t[:10], before[:10])
    assert torch.equal(t[90:], before[90:])
    assert t._version == 1


_SUM = torch.zeros(1, dtype=torch.float64)
REFUSED: dict[str, tuple[Tensor, Tensor, str]] = {
    "integers": (torch.ones(3, dtype=torch.int64), _SUM, "float32 or float64; got torch.int64"),
    "strides": (torch.ones(3, 2).T, _SUM, r"must be contiguous, .* got strides \(1, 2\)"),
    "sums of float32": (
        torch.ones(3), _SUM.float(),
        r"vector of torch.float64, not empty; got torch.float32 of shape \(1,\)",
    ),
    "no sums": (torch.ones(3), _SUM[:0], r"not empty; .* \(0,\)"),
    "a scalar": (torch.ones(3), _SUM[0], r"not empty; .* \(\)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_bad_blocks_are_refused(mistake: str, kernel: per.ProjectedError) -> None:
    t, sums, sentence = REFUSED[mistake]
    before = t.clone(), sums.clone()
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        kernel(t, sums, True)
    assert torch.equal(t, before[0])
    assert torch.equal(sums, before[1])


# The hooks.


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.ReLU())


def _regularizer(model: nn.Module, *layers: str) -> normnorm.PER:
    return normnorm.PER(model, layers, 1.0, generator=_generator())


def test_per_sums_the_layers_since_the_last_call() -> None:
    network = _network()
    inputs = torch.randn(5, 1, 6, 6)
    regularizer = normnorm.PER(network, ["0", "4"], weight=0.5, generator=_generator())
    output = network(inputs)
    found = regularizer.loss()
    generator = _generator()
    hidden = network[0](inputs)  # recorded again, discarded below
    expected = normnorm.per_loss(hidden.movedim(1, -1), generator=generator)
    expected = 0.5 * (expected + normnorm.per_loss(output, generator=generator))
    torch.testing.assert_close(found, expected)
    regularizer.loss()
    with pytest.raises(RuntimeError, match="no layer was seen"):
        regularizer.loss()
    found.backward()
    assert network[0].weight.grad.abs().sum() > 0


def test_per_leaves_evaluation_alone_and_can_be_removed() -> None:
    network = _network()
    inputs = torch.randn(2, 1, 6, 6)
    with normnorm.PER(network, lambda _, module: isinstance(module, nn.ReLU), 1.0) as regularizer:
        network.eval()(inputs)
        with torch.no_grad():
            network.train()(inputs)
        assert regularizer.loss() == 0.0
        network(inputs)
        assert regularizer.loss() > 0
    network(inputs)
    assert regularizer.loss() == 0.0
    assert not any(module._forward_hooks for module in network.modules())


def _gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    network.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def _twice() -> nn.Module:
    """Runs one layer twice."""
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Sigmoid())


def _save_everything(*_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "to the end": {"early_stop": False},
    "selective": {
        "context_fn": lambda: create_selective_checkpoint_contexts(_save_everything)
    },
    "other random numbers": {"preserve_rng_state": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_recomputed_pass_is_taken_in_once(kind: str) -> None:
    network, inputs = _twice(), torch.randn(5, 6)
    found = []
    for again in (False, True):
        with _regularizer(network, "0", "3") as regularizer:
            for _ in range(2):
                if again:
                    output = checkpoint(network, inputs, use_reentrant=False, **CHECKPOINTS[kind])
                else:
                    output = network(inputs)
                loss = regularizer.loss()
                found.append([loss.detach(), *_gradients(network, output.sum() + loss)])
    torch.testing.assert_close(found[2:], found[:2], rtol=0, atol=0)


def test_reentrant_checkpointing_is_skipped_with_a_warning() -> None:
    network, inputs = _twice(), torch.randn(5, 6, requires_grad=True)
    with _regularizer(network, "0") as regularizer:
        for _ in range(2):
            with pytest.warns(UserWarning, match="PER passes '0' over: reentrant"):
                output = checkpoint(network, inputs, use_reentrant=True)
            assert regularizer.loss() == 0.0
            output.sum().backward()
            assert not regularizer._losses["0"]


def test_a_failed_pass_is_discarded() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with _regularizer(network, "0") as regularizer:
        first = network(torch.randn(5, 3))
        handle = network[1].register_forward_hook(lambda *_: 1 / 0)
        try:
            raise OSError  # an exception already being handled is not the pass's
        except OSError:
            with pytest.raises(ZeroDivisionError):
                network(torch.randn(5, 3))
            handle.remove()
            network(torch.randn(5, 3))
        assert len(regularizer._losses["0"]) == 2
        assert first.grad_fn is not None
        assert regularizer.loss() > 0


def test_copies_of_a_regularized_model_record_nothing() -> None:
    network = _network()
    with _regularizer(network, "0", "4") as regularizer:
        copied, other = copy.deepcopy((network, regularizer))
        copied(torch.randn(5, 1, 6, 6))
        for one in (regularizer, other):
            with pytest.raises(RuntimeError, match="no layer was seen"):
                one.loss()


def test_transforms_that_ended_leave_nothing() -> None:
    network, inputs = _network(), torch.randn(5, 1, 6, 6)
    with _regularizer(network, "0") as regularizer:
        torch.func.grad(lambda x: network(x).sum())(inputs)
        assert regularizer.loss() == 0.0
        within = torch.func.grad(lambda x: network(x).sum() * 0 + regularizer.loss())(inputs)
    leaf = inputs.clone().requires_grad_()
    normnorm.per_loss(network[0](leaf).movedim(1, -1), generator=_generator()).backward()
    torch.testing.assert_close(within, leaf.grad)


def test_an_output_changed_in_place_is_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    with _regularizer(network, "0") as regularizer:
        network(torch.randn(5, 3))
        with pytest.raises(RuntimeError, match="the output of '0' was changed in place"):
            regularizer.loss()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_with_its_hooks_is_regularized(in_place: bool) -> None:
    torch.compiler.reset()
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    plain = nn.Sequential(network[0], nn.ReLU(), network[2])
    inputs, found = torch.randn(5, 6), []
    for run in (plain, network):
        with _regularizer(run, "0", "2") as regularizer:
            if run is network and in_place:
                network.compile(backend="aot_eager", fullgraph=True)
            elif run is network:
                run = torch.compile(network, backend="aot_eager", fullgraph=True)
            for step in range(3):
                with torch._dynamo.config.patch(error_on_recompile=step > 1):
                    output = run(inputs)
                found.append(_gradients(network, output.sum() * 0 + regularizer.loss()))
    torch.testing.assert_close(found[3:], found[:3])
    torch.compiler.reset()
