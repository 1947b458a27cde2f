"""One work's tensors, and the float64 reference's results for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normnorm import reference
from normnorm.noise import draw_seed, standard_normals
from normnorm.statistics import statistics_dtype
from speed.work import EPS, LAYERS, Work

# Elements that the float64 reference works on at a time: it keeps some forty numbers for each.
_CHUNK = 1 << 22


@dataclass
class Runner:
    """A provider made ready for one case."""

    forward: Callable[[Tensor], Tensor]  # the layer; draws its own seed
    weight: Tensor
    bias: Tensor

    def gradients(self, output: Tensor, input: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Of input, weight and bias; the graph stays, so that this can be asked again."""
        leaves = (input, self.weight, self.bias)
        return torch.autograd.grad(output, leaves, grad, retain_graph=True)

    def full(self, input: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward, as a training step does them."""
        return torch.autograd.grad(self.forward(input), (input, self.weight, self.bias), grad)


@dataclass
class Case:
    """A work with its tensors: skewed random inputs, never zeros, the same for every provider."""

    work: Work
    device: torch.device
    copies: int  # of the inputs; each with values of its own
    seed: int  # of the random values
    inputs: list[Tensor] = field(init=False)  # leaves that require gradients, one a copy
    grads: list[Tensor] = field(init=False)  # gradients of the output, one a copy
    weight: Tensor = field(init=False)  # this and the bias: values of every provider's parameters
    bias: Tensor = field(init=False)
    # Mean, variance and lambda of evaluation, (3, C); None for layers that keep none.
    running: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        work = self.work
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        def laid_out(values: Tensor) -> Tensor:
            dense = values.to(work.torch_dtype)
            return dense.contiguous(memory_format=work.torch_memory_format)

        self.inputs, self.grads = [], []
        for _ in range(self.copies):
            values = normal(*work.shape)
            values += 0.1 * values.square()  # lambda 0.69; in trained networks mostly 0.2 to 1.5
            self.inputs.append(laid_out(values).requires_grad_())
            self.grads.append(laid_out(normal(*work.shape)))
        n, dtype = work.parameters, self.parameter_dtype
        self.weight = (1 + 0.2 * normal(n)).to(dtype)
        self.bias = (0.2 * normal(n)).to(dtype)
        if work.kind == "batch":
            spread = 1.2 + 0.3 * normal(n).abs()
            self.running = torch.stack([0.3 + 0.1 * normal(n), spread, 1 - 0.2 * normal(n).abs()])

    @property
    def parameter_dtype(self) -> torch.dtype:
        """float32, as in mixed-precision training; but torch's layer and group norm ask for the
        input's own on a GPU."""
        own = self.device.type == "cuda" and self.work.kind in ("layer", "group")
        return self.work.torch_dtype if own else torch.float32

    def module(self, ours: bool) -> Any:
        """The layer, ours or torch's, with this case's parameters, in this case's mode."""
        work = self.work
        layer = LAYERS[work.layer]
        sizes, keywords = work.constructor()
        factory = {"device": self.device, "dtype": self.parameter_dtype}
        made: Any = (layer.ours if ours else layer.torchs)(*sizes, **keywords, **factory)
        made.train(work.mode != "eval")
        if ours and work.mode == "quiet":
            made.noise_train = 0.0
        with torch.no_grad():
            made.weight.copy_(self.weight)
            made.bias.copy_(self.bias)
            if self.running is not None:
                for name, value in zip(("mean", "var", "lmbda"), self.running, strict=True):
                    if name != "lmbda" or ours:
                        getattr(made, f"running_{name}").copy_(value)
        return made

    def result(self, runner: Runner, seed: int) -> dict[str, Tensor]:
        """A provider's results for the first copy, with the random state set to ``seed``."""
        torch.manual_seed(seed)
        if self.work.mode == "eval":
            with torch.no_grad():
                return {"output": runner.forward(self.inputs[0])}
        output = runner.forward(self.inputs[0])
        gradients = runner.gradients(output, self.inputs[0], self.grads[0])
        names = ("grad_input", "grad_weight", "grad_bias")
        return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}

    def expected(self, transform: bool, seed: int) -> dict[str, Tensor]:
        """The reference's results for the first copy in float64, chunk by chunk.

        Args:
            transform: whether for a normality layer; else for torch's (alpha 0, no noise).
            seed: the random state that the provider's noise is drawn from.
        """
        work, noise, z = self.work, 0.0, None
        if transform and work.mode == "noise":
            noise = self.module(ours=True).noise_train
            torch.manual_seed(seed)
            drawn = draw_seed(self.device)
            z = standard_normals(work.shape, drawn, 0, work.memory_format == "channels_last")
        return _reference(self, 1.0 if transform else 0.0, noise, z)


def _reference(case: Case, alpha: float, noise: float, z: Tensor | None) -> dict[str, Tensor]:
    """The definition over one case in float64, a few groups at a time."""
    work, batch = case.work, case.work.kind == "batch"
    dim = 1 if batch else 0  # along which groups lie apart
    each = max(1, _CHUNK * work.shape[dim] // work.elements)
    found: dict[str, list[Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for start in range(0, work.shape[dim], each):

        def part(values: Tensor, start: int = start) -> Tensor:
            return values.narrow(dim, start, min(each, values.size(dim) - start)).double()

        def row(values: Tensor, start: int = start) -> Tensor:
            return (values[start : start + each] if batch else values).double()

        input = part(case.inputs[0].detach()).requires_grad_()
        weight, bias = row(case.weight).requires_grad_(), row(case.bias).requires_grad_()
        frozen = None
        if work.mode == "eval" and case.running is not None:
            mean, var, lmbda = (row(values) for values in case.running)
            lmbda = lmbda if alpha else torch.ones_like(lmbda)
            frozen = reference.pack_running(mean, var, lmbda, EPS, torch.float64)
        output, _ = reference.normal_norm(
            input, weight, bias, kind=work.kind, num_groups=work.groups,
            normalized_ndim=1 if work.kind == "layer" else 0, eps=EPS, noise_train=noise,
            alpha=alpha, z=None if z is None else part(z), frozen=frozen,
        )  # fmt: skip
        chunk = {"output": output.detach()}
        if work.mode != "eval":
            leaves = {"grad_input": input, "grad_weight": weight, "grad_bias": bias}
            gradients = torch.autograd.grad(output, tuple(leaves.values()), part(case.grads[0]))
            chunk |= dict(zip(leaves, gradients, strict=True))
        for name, values in chunk.items():
            found.setdefault(name, []).append(values)
    for name, parts in found.items():
        if name in ("output", "grad_input"):
            whole[name] = torch.cat(parts, dim)
        else:  # a channel's parameters belong to its chunk; other layers share theirs among all
            whole[name] = torch.cat(parts) if batch else torch.stack(parts).sum(0)
    return whole


def bound(work: Work) -> float:
    """The largest error, relative to the largest value of a result, that rounding explains.

    Two roundings to the dtype of storage; sixteen of the arithmetic's (a logarithm, a power, the
    Newton step's division); and for sums over n elements the root of n of them, which is what
    plain accumulation does to random summands.
    """
    unit = torch.finfo(statistics_dtype(work.torch_dtype)).eps
    return 2 * torch.finfo(work.torch_dtype).eps + (16 + _longest_sum(work) ** 0.5) * unit


def sums_in_storage(work: Work) -> float:
    """What is allowed beyond :func:`bound` where long sums are kept in the dtype of storage."""
    return _longest_sum(work) ** 0.5 * torch.finfo(work.torch_dtype).eps


def _longest_sum(work: Work) -> int:
    return max(work.group_size, work.elements // work.parameters)


def worst_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """The result that is furthest off, and its largest difference relative to its largest value;
    NaN counts as infinitely far."""
    errors = {}
    for name, value in expected.items():
        error = ((got[name].double() - value).abs().max() / value.abs().max()).item()
        errors[name] = error if error == error else float("inf")
    return max(errors.items(), key=lambda item: item[1])
