"""A residual, an activation and the residual stream's sum in the norm's own pass: the results are
those of the same backend in separate steps, with every kind of derivative."""

import copy
import itertools
import math
import pickle

import oracle
import pytest
import raw_ops
import torch
from oracle import Case, draw_parameters
from torch import Tensor, nn
from torch.nn import functional as torch_functional
from torch.testing import assert_close

import normnorm
from normnorm import functional as F

BATCH, ROWS = Case("batch", (3, 4, 5, 6)), Case("layer", (9, 40), normalized_ndim=1)
IMAGES = (
    BATCH, Case("layer", (2, 3, 4, 5), normalized_ndim=3),
    Case("group", (2, 8, 5, 5), num_groups=4), Case("instance", (2, 3, 5, 6)),
)  # fmt: skip
FLAT = (Case("batch", (7, 5)), ROWS, Case("group", (5, 12), num_groups=3))
# More than one block or chunk a group, and groups that no scratch memory holds.
LARGE = (
    Case("layer", (3, 40_000), normalized_ndim=1), Case("batch", (3000, 5)),
    Case("batch", (4, 2, 90, 91)), Case("group", (2, 6, 50, 51), num_groups=2),
)  # fmt: skip
DTYPES = (torch.float64, torch.bfloat16)


def draw(case: Case, dtype: torch.dtype, device: str, count: int) -> list[Tensor]:
    """Skewed tensors of the case's shape."""
    return [oracle.draw(case, "exponential", seed, dtype, device) - 0.5 for seed in range(count)]


def leaves(case: Case, device: str) -> tuple[Tensor, ...]:
    """Float64 (input, residual, weight, bias) that require grad."""
    parameters = draw_parameters(case, 0, torch.float64, device)
    return tuple(t.requires_grad_() for t in (*draw(case, torch.float64, device, 2), *parameters))


# The ops


@pytest.mark.parametrize(
    ("case", "layout", "dtype"),
    [
        *itertools.product(LARGE, ("contiguous",), (torch.float32,)),
        *itertools.product(FLAT, ("contiguous", "strided"), DTYPES),
        *itertools.product(IMAGES, ("contiguous", "channels_last", "strided"), DTYPES),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "fused",
    [("residual",), ("relu",), ("residual", "relu"), ("sum",), ("sum", "relu")],
    ids="+".join,
)
def test_fused_passes_are_within_bounds(backend, device, case, layout, dtype, fused):
    t = raw_ops.operands(case, dtype, layout == "channels_last", device=device)
    if layout == "strided":
        t.update({name: torch.stack([a, a], -1)[..., 0] for name, a in t.items() if a.dim() > 1})
    t["residual"] = t["residual"].contiguous()  # whatever the input's layout is
    last = layout == "channels_last"
    unit = raw_ops.GPU_UNIT if device == "cuda" else raw_ops.CPU_UNIT
    options = {"noise_train": 0.4}
    y, _, *gradients = raw_ops.check(backend, case, t, fused, last, unit=unit, **options)
    assert y.stride() == gradients[0].stride() == torch.empty_like(t["x"]).stride()

    saved = raw_ops.forward_pass(backend, case, t, fused, last, **options)
    if "sum" in fused:
        assert torch.equal(saved[2], t["x"] + t["residual"])
        assert saved[2].stride() == y.stride()
    for needs in ((True, False, False), (False, True, False)):
        found = raw_ops.backward_pass(backend, case, t, saved, fused, last, needs=needs, **options)
        for mine, whole, needed in zip(found, gradients, needs, strict=True):
            if needed:
                assert_close(mine, whole)
    if "sum" not in fused:  # without statistics
        with torch.no_grad():
            residual = t["residual"] if "residual" in fused else None
            activation = "relu" if "relu" in fused else None
            alone = case.apply(
                t["x"], t["weight"], t["bias"], residual=residual, activation=activation, seed=77,
                **options,
            )  # fmt: skip
        assert torch.equal(alone, y)


def test_running_statistics_take_an_activation_too(backend, device):
    running = [torch.full((4,), value, device=device).double() for value in (0.1, 1.5, 0.8)]
    fused, steps = leaves(BATCH, device), leaves(BATCH, device)
    x, residual, *affine = fused
    found = F.batch_normal_norm(x, *running, *affine, residual=residual, activation="relu")
    x, residual, *affine = steps
    expected = torch.relu(F.batch_normal_norm(x, *running, *affine) + residual)
    assert_close(found, expected)
    (found + expected).cos().sum().backward()
    for mine, theirs in zip(fused, steps, strict=True):
        assert_close(mine.grad, theirs.grad)


def test_a_nan_stays_and_its_gradient_passes(backend, device):
    case = Case("batch", (6, 3))
    x, g = draw(case, torch.float32, device, 2)
    x[2, 1] = math.nan
    bias = torch.zeros(3, device=device, requires_grad=True)
    output = case.apply(x, bias=bias, noise_train=0.0, activation="relu")
    assert output[:, 1].isnan().all()
    assert (output[:, [0, 2]] >= 0).all()
    (grad_bias,) = torch.autograd.grad(output, bias, g)
    assert_close(grad_bias[1], g[:, 1].sum())


def test_empty_tensors_stay_empty(backend, device):
    case = Case("layer", (0, 4), normalized_ndim=1)
    t = dict.fromkeys(("x", "residual", "g", "grad_sum"), torch.ones(case.shape, device=device))
    y, _, du, _, _ = raw_ops.both_passes(backend, case, t, ("sum", "relu"))
    assert y.shape == du.shape == (0, 4)


# Derivatives

EPILOGUES = {
    "residual": lambda case, x, r, w, b: case.apply(x, w, b, noise_train=0.0, residual=r),
    "relu": lambda case, x, r, w, b: case.apply(x, w, b, noise_train=0.0, activation="relu"),
    "both": lambda case, x, r, w, b: case.apply(
        x, w, b, noise_train=0.0, residual=r, activation="relu"
    ),
    "sum": lambda case, x, r, w, b: F.add_layer_normal_norm(
        x, r, case.parameter_shape, w, b, noise_train=0.0
    ),
}
# Finite differences take a pass an element, and second ones its square.
SMALL_ROWS = Case("layer", (2, 6), normalized_ndim=1)
SMALL = (
    Case("batch", (3, 2, 2)), SMALL_ROWS, Case("group", (2, 4, 2), num_groups=2),
    Case("instance", (2, 2, 4)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "name"),
    [*((case, "both") for case in SMALL), *((SMALL_ROWS, n) for n in ("residual", "relu", "sum"))],
    ids=str,
)
def test_derivatives_agree_with_finite_differences(backend, device, case, name):
    def function(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return EPILOGUES[name](case, *tensors)

    assert torch.autograd.gradcheck(function, leaves(case, device))
    assert torch.autograd.gradgradcheck(function, leaves(case, device))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3), (0, 1), (1, 2, 3)])
def test_gradients_that_are_not_wanted_are_left_out(backend, device, frozen):
    mine, theirs = leaves(ROWS, device), leaves(ROWS, device)
    for index in frozen:
        mine[index].requires_grad_(False)
    options = {"noise_train": 0.7, "seed": 4}
    x, r, w, b = mine
    output, total = F.add_layer_normal_norm(x, r, (40,), w, b, training=True, **options)
    fused = ROWS.apply(x, w, b, residual=r, activation="relu", **options)
    (output.sin() + total.cos() + fused.square()).sum().backward()
    x, r, w, b = theirs
    steps = ROWS.apply(x + r, w, b, **options)
    fused = torch.relu(ROWS.apply(x, w, b, **options) + r)
    (steps.sin() + (x + r).cos() + fused.square()).sum().backward()
    for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        if index in frozen:
            assert one.grad is None
        else:
            assert_close(one.grad, other.grad)


@pytest.mark.parametrize("used", ["output", "sum"])
def test_either_of_the_two_outputs_may_be_the_only_one_used(backend, device, used):
    x, r, _, _ = leaves(ROWS, device)
    pair = F.add_layer_normal_norm(x, r, (40,), noise_train=0.0)
    steps = (ROWS.apply(x + r, noise_train=0.0), x + r)
    place = ("output", "sum").index(used)
    found = torch.autograd.grad(pair[place].sin().sum(), (x, r))
    expected = torch.autograd.grad(steps[place].sin().sum(), (x, r))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_transforms_of_torch_func_go_through(backend, device):
    case = Case("batch", (5, 3, 4))
    x, residual = draw(case, torch.float64, device, 2)

    def loss(x: Tensor, r: Tensor) -> Tensor:
        return EPILOGUES["both"](case, x, r, None, None).square().sum()

    def steps(x: Tensor, r: Tensor) -> Tensor:
        return torch.relu(case.apply(x, noise_train=0.0) + r).square().sum()

    def total(x: Tensor, r: Tensor) -> Tensor:
        output, added = F.add_layer_normal_norm(x, r, (4,), noise_train=0.0)
        return (output * added).sum()

    def total_in_steps(x: Tensor, r: Tensor) -> Tensor:
        return (F.layer_normal_norm(x + r, (4,), noise_train=0.0) * (x + r)).sum()

    for mine, theirs in ((loss, steps), (total, total_in_steps)):
        for transform in (
            lambda f: torch.func.grad(f, (0, 1)),
            lambda f: lambda x, r: torch.func.jvp(f, (x, r), (r, x)),
            lambda f: lambda x, r: torch.func.vmap(f)(torch.stack([x, r]), torch.stack([r, x])),
            lambda f: torch.func.hessian(f),
        ):
            found, expected = transform(mine)(x, residual), transform(theirs)(x, residual)
            for one, other in zip(found, expected, strict=True):
                assert_close(one, other)


# Compilers


class Block(nn.Module):
    """Both fused layers, as networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = normnorm.BatchNormalNormAct2d(4)
        self.add = normnorm.AddLayerNormalNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x), torch.cat([x, x[:, :1]], 1))
        output, stream = self.add(y.bfloat16(), y.flip(0))  # promoted
        return output + stream


@pytest.mark.parametrize("training", [True, False])
def test_compiled_layers_give_what_they_give_eagerly(cpu_backend, training):
    block = Block().train(training)
    for module in (block.norm, block.add):
        module.noise_train = 0.0
    x = torch.randn(2, 3, 5, 6, requires_grad=True)
    other = copy.deepcopy(block)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    results = []
    for run in (block, compiled):
        output = run(x)
        (grad,) = torch.autograd.grad(output.sin().sum(), x)
        results.append((output, grad))
    for one, theirs in zip(*results, strict=True):
        assert_close(one, theirs)


def test_exported_and_decomposed_layers_give_the_same():
    block, x = Block().eval(), torch.randn(2, 3, 5, 6)
    program = torch.export.export(block, (x,))
    assert_close(program.module()(x), block(x))
    plain = program.run_decompositions(normnorm.decompositions())
    assert "normnorm" not in str(plain.graph)
    assert_close(plain.module()(x), block(x))


# The layers


def twins(**options: object) -> tuple[nn.Module, nn.Module]:
    """The fused layer and the plain one with the same state."""
    fused = normnorm.BatchNormalNormAct2d(4, **options)
    plain = normnorm.BatchNormalNorm2d(4)
    with torch.no_grad():
        fused.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 1.0]))
        fused.bias.copy_(torch.tensor([0.1, 0.0, -0.3, 0.2]))
    plain.load_state_dict(fused.state_dict())
    return fused, plain


class Shifted(nn.ReLU):
    """A class derived from that of the fused activation, which may do anything."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - 1.0)


@pytest.mark.parametrize(
    ("options", "function"),
    [
        ({}, torch.relu),
        ({"apply_act": False}, lambda t: t),
        ({"act_layer": None}, lambda t: t),
        ({"act_layer": nn.GELU}, torch_functional.gelu),
        ({"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.2}},
         lambda t: torch_functional.leaky_relu(t, 0.2)),
        ({"act_layer": nn.SiLU, "inplace": False}, torch_functional.silu),
        ({"act_layer": Shifted, "inplace": False}, lambda t: torch.relu(t - 1.0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_layer_is_norm_residual_and_activation(cpu_backend, options, function, with_residual):
    fused, plain = twins(**options)
    generator = torch.Generator().manual_seed(0)
    for training in (True, False):
        fused.train(training), plain.train(training)
        x, residual = (torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2))
        given = residual if with_residual else None
        torch.manual_seed(7)
        found = fused(x, given)
        torch.manual_seed(7)
        steps = plain(x)
        assert_close(found, function(steps + residual if with_residual else steps))
        for name, buffer in plain.named_buffers():
            assert_close(fused.get_buffer(name), buffer)


def test_hooks_on_the_activation_still_see_it(cpu_backend):
    fused, _ = twins()
    seen = []
    handle = fused.act.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(3, 4, 5, 6)
    torch.manual_seed(7)
    found = fused(x)
    assert len(seen) == 1
    assert seen[0] is found
    handle.remove()
    torch.manual_seed(7)
    assert_close(fused(x), found)
    assert len(seen) == 1


def test_backward_keeps_input_and_output_and_nothing_else_as_large():
    x, residual = torch.randn(3, 4, 5, 6, requires_grad=True), torch.randn(3, 4, 5, 6)

    def kept(function):
        """The function's results, and the memory of large tensors that are saved for backward."""
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
        )
        with hooks:
            results = function(x, residual)
        return results, {t.data_ptr() for t in saved if t.numel() == x.numel()}

    output, large = kept(normnorm.BatchNormalNormAct2d(4))
    assert large == {x.data_ptr(), output.data_ptr()}
    (_, total), large = kept(normnorm.AddLayerNormalNorm(6))
    assert large == {total.data_ptr()}


def test_layers_are_copied_pickled_and_load_checkpoints_of_the_plain_layers():
    for layer, plain, arguments in (
        (normnorm.BatchNormalNormAct2d(4), nn.BatchNorm2d(4), (torch.randn(3, 4, 5, 6),)),
        (normnorm.AddLayerNormalNorm(6), nn.LayerNorm(6), (torch.randn(3, 6), torch.randn(3, 6))),
    ):
        layer.eval().load_state_dict(plain.state_dict(), strict=True)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_close(other(*arguments), layer(*arguments))


# Input and residual of two dtypes

each_pair = pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16), (torch.float32, torch.float64),
    ],
    ids=str,
)  # fmt: skip


def mixed(x: Tensor, residual: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    return [
        tensor.detach().to(dtype).requires_grad_()
        for tensor, dtype in zip((x, residual), dtypes, strict=True)
    ]


@each_pair
def test_a_residual_of_another_dtype_is_promoted_as_torch_does(backend, device, dtypes):
    for case in IMAGES:
        x, residual, g = draw(case, torch.float64, device, 3)
        dtype = torch.promote_types(*dtypes)
        # Parameters that suit the narrow input, as a layer in half precision has them.
        narrow = draw_parameters(case, 0, dtypes[0], device)
        found, gradients = [], []
        for cast in (False, True):
            given = [*mixed(x, residual, dtypes), *(p.clone().requires_grad_() for p in narrow)]
            one, other, weight, bias = [t.to(dtype) for t in given] if cast else given
            output = case.apply(one, weight, bias, residual=other, seed=3, activation="relu")
            assert output.dtype == dtype
            gradients.append(torch.autograd.grad(output, given, g.to(dtype)))
            found.append(output)
        assert_close(found[0], found[1], rtol=0, atol=0)
        for mine, theirs, leaf in zip(*gradients, given, strict=True):
            assert mine.dtype == leaf.dtype
            assert_close(mine, theirs)


@each_pair
def test_a_stream_of_another_dtype_is_promoted_as_torch_does(backend, device, dtypes):
    x, stream, g, grad_sum = draw(ROWS, torch.float64, device, 4)
    one, other = mixed(x, stream, dtypes)
    dtype = torch.promote_types(*dtypes)
    output, total = F.add_layer_normal_norm(one, other, (40,), training=True, seed=3)
    assert output.dtype == total.dtype == dtype
    assert torch.equal(total, one.to(dtype) + other.to(dtype))
    assert torch.equal(output, F.layer_normal_norm(total, (40,), training=True, seed=3))
    back = torch.autograd.grad((output, total), (one, other), (g.to(dtype), grad_sum.to(dtype)))
    steps = one.to(dtype) + other.to(dtype)
    again = F.layer_normal_norm(steps, (40,), training=True, seed=3)
    expected = torch.autograd.grad((again, steps), (one, other), (g.to(dtype), grad_sum.to(dtype)))
    for mine, theirs, leaf in zip(back, expected, (one, other), strict=True):
        assert mine.dtype == leaf.dtype
        assert_close(mine, theirs)


def test_the_monitor_looks_at_the_sum():
    add, plain = (
        cls(64, noise_train=0.0) for cls in (normnorm.AddLayerNormalNorm, normnorm.LayerNormalNorm)
    )
    x = torch.randn(50, 64)
    with normnorm.monitor(add) as watch, normnorm.monitor(plain) as expected:
        add(x, x.square()), plain(x + x.square())
    assert watch.scalars() == pytest.approx(expected.scalars())


# Bad input


def test_wrong_activations_and_dropouts_are_refused():
    x = torch.randn(3, 4, 5, 6)
    with pytest.raises(ValueError, match=r"activation must be 'relu'.*got 'gelu'"):
        torch.func.vmap(lambda t: F.layer_normal_norm(t, (6,), activation="gelu"))(x)
    with pytest.raises(TypeError, match=r"act_layer must be a class .*got 'relu'"):
        normnorm.BatchNormalNormAct2d(4, act_layer="relu")
    layer = normnorm.BatchNormalNormAct2d(4, drop_layer=nn.Dropout)
    assert layer(x).shape == x.shape
    with pytest.raises(ValueError, match="a residual behind a dropout"):
        layer(x, x)
