"""The change of a model's output under noise on a layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normnorm.checks import check_integer, check_number
from normnorm.diagnostics import capture


def noise_robustness(
    model: nn.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    scales: Sequence[float] = (0.1, 0.2, 0.5, 1.0),
    batches: int | None = None,
    seed: int = 0,
) -> dict[str, dict[float, float]]:
    """Measures the relative change of the model's output under noise on one layer's output at a
    time.

    For every layer and scale, adds Gaussian noise with ``scale`` times the standard deviation of
    the layer's output (over the batch) to that output, and measures the change of the model's
    output: ``||f_noisy - f|| / ||f||``, Euclidean norms over the batch, averaged over the batches.
    Eftekhari and Papyan (ICML 2025) report such changes as robustness; noise and average are
    defined here.

    Args:
        model, loader, layers, batches: as for :func:`diagnose`.
        scales: of the noise, in standard deviations of the layer's output.
        seed: of the noise, the same for every layer and scale.

    Returns:
        the relative change by layer and scale; 0 for a scale of 0.

    Raises:
        ValueError, TypeError: as :func:`diagnose`; also for a scale that is negative or not finite,
            and a model whose output is not one tensor.
    """
    for scale in scales:
        check_number("scales", scale)
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scales must be finite and not negative; got {scale}")
    check_integer("seed", seed)
    if batches is not None:
        check_integer("batches", batches)
    chosen = capture.choose_layers(model, layers)
    changes: dict[str, dict[float, list[float]]] = {
        name: {scale: [] for scale in scales} for name in chosen
    }
    noisy: str | None = None
    scale = 0.0
    generator = torch.Generator()

    def disturb(name: str, output: Tensor) -> Tensor | None:
        if name != noisy:
            return None
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32)
        return output + noise.to(output) * (scale * output.std())

    def run(inputs: Tensor) -> Tensor:
        output = model(inputs)
        if not isinstance(output, Tensor):
            raise TypeError(f"the model must give one tensor; got {type(output).__name__}")
        return output.double()

    with capture.watching(model, chosen, disturb, "normnorm.diagnostics.noise_robustness"):
        for number, (inputs, _) in enumerate(capture.batches(loader, model, batches)):
            noisy = None
            clean = run(inputs)
            for noisy in chosen:
                for scale in scales:
                    generator.manual_seed(seed + number)
                    change = (run(inputs) - clean).norm() / clean.norm()
                    changes[noisy][scale].append(float(change))
    return {
        name: {scale: sum(values) / len(values) for scale, values in by_scale.items()}
        for name, by_scale in changes.items()
    }
