"""What the study measures of trained networks besides their accuracy; lists have one number for
each copy of the network."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accuracy.layers import DecorrelatedBatchNorm2d
from accuracy.nets import MODELS
from accuracy.norms import AffineOfCopies
from accuracy.trainer import Trainer
from normnorm.diagnostics.capture import NORM_LAYERS
from normnorm.diagnostics.statistics import clustering
from normnorm.groups import each_sample, groups_of
from normnorm.quantiles import normality

# Standard deviations of Gaussian noise: on images, in their own unit; on a norm layer's output and
# on a weight tensor, in standard deviations of these.
INPUT_NOISE, LAYER_NOISE, WEIGHT_NOISE = 0.5, 0.5, 0.2


def norm_layers(network: nn.Module) -> list[nn.Module]:
    """The norm layers of a network, those of whole copies; without layers inside another one."""
    found: list[nn.Module] = []
    kinds = (*NORM_LAYERS, DecorrelatedBatchNorm2d, AffineOfCopies)
    for module in network.children():
        found += [module] if isinstance(module, kinds) else norm_layers(module)
    return found


@contextmanager
def _outputs(
    layers: list[nn.Module], see: Callable[[Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls ``see(input, output)`` for every run of a layer; it may return another output."""
    with ExitStack() as hooks:
        for layer in layers:
            handle = layer.register_forward_hook(lambda _, inputs, output: see(inputs[0], output))
            hooks.enter_context(handle)
        yield


def robustness(trainer: Trainer) -> dict[str, list[float]]:
    """Test accuracy, percent, with noise on the images ("input_noise"), on every norm layer's
    output ("layer_noise"), and on every weight matrix ("weight_noise")."""
    network, experiment = trainer.network, trainer.experiment
    tokens, copies = MODELS[experiment.model].tokens, experiment.copies
    generator = torch.Generator().manual_seed(experiment.seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    def disturbed(_: Tensor, output: Tensor) -> Tensor:
        parts = output if tokens else output.unflatten(1, (copies, -1)).transpose(0, 1)
        scale = LAYER_NOISE * parts.flatten(1).std(1)
        parts = parts + noise(parts) * scale.view(-1, *(1,) * (parts.dim() - 1))
        return parts if tokens else parts.transpose(0, 1).reshape(output.shape)

    found = {"input_noise": trainer.evaluate(lambda x: x + INPUT_NOISE * noise(x)).accuracy}
    with _outputs(norm_layers(network), disturbed):
        found["layer_noise"] = trainer.evaluate().accuracy
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parts = parameter.view(copies, -1)
                parts += noise(parts) * WEIGHT_NOISE * parts.std(1, keepdim=True)
    found["weight_noise"] = trainer.evaluate().accuracy
    network.load_state_dict(before)
    return found


@torch.no_grad()
def normalization_groups(layer: nn.Module, input: Tensor, copies: int) -> Tensor:
    """For each copy the layer's normalization groups (:func:`normnorm.groups.groups_of`) before its
    affine map, in the layer's mode: (copies, groups, values). A decorrelating layer counts as a
    batch layer."""
    bare = copy.deepcopy(layer)
    for module in bare.modules():
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            parameter = getattr(module, name, None)
            if parameter is not None:
                parameter.fill_(value)
    norm = layer.norm if isinstance(layer, AffineOfCopies) else layer
    groups = groups_of(norm, bare(input))
    # By sample where each has its own, then copy: the copies are side by side in the channels, or
    # the first dimension of tokens.
    samples = input.size(0) if each_sample(norm) else 1
    return groups.unflatten(0, (samples, copies, -1)).transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def layer_runs(trainer: Trainer) -> tuple[list[tuple[nn.Module, Tensor, Tensor]], Tensor]:
    """Every norm layer with its input and output for the first batch of test images, and that
    batch's labels; in evaluation mode: no noise, and a batch layer's running statistics."""
    network = trainer.network.eval()
    seen: list[tuple[Tensor, Tensor]] = []
    layers = norm_layers(network)
    images, labels = next(trainer.test_batches())
    with _outputs(layers, lambda input, output: seen.append((input, output))):
        network(images)
    return [(layer, *tensors) for layer, tensors in zip(layers, seen, strict=True)], labels


def of_layers(trainer: Trainer) -> dict[str, list[float]]:
    """Means over the norm layers on the first batch of test images, in evaluation mode:

    * ``qq_r2``, ``skewness``, ``kurtosis``: of the normalization groups before the affine map: the
      R^2 of the normal quantile-quantile plot, and the absolute third and the fourth standardized
      moment, 0 and 3 for a normal;
    * ``correlation``: absolute, of two channels of the output over images and positions;
    * ``sparsity``: share of outputs that are not positive, which a ReLU sets to zero;
    * ``within_between``, ``silhouette``: clustering by class of the outputs' means over positions,
      of the last layer (:func:`normnorm.diagnostics.statistics.clustering`).
    """
    copies, tokens = trainer.experiment.copies, MODELS[trainer.experiment.model].tokens
    runs, labels = layer_runs(trainer)
    sums: dict[str, Any] = {}
    vectors = labels
    for layer, input, output in runs:
        # (copies, N, ..., C)
        rows = output if tokens else output.unflatten(1, (copies, -1)).movedim((1, 2), (0, -1))
        groups = normalization_groups(layer, input, copies)
        for name, values in (_of_groups(groups) | _of_rows(rows)).items():
            sums[name] = sums.get(name, 0.0) + values / len(runs)
        positions = tuple(range(2, rows.dim() - 1))
        vectors = rows.mean(positions) if positions else rows
    found = {name: values.tolist() for name, values in sums.items()}
    clusters = [clustering(v, labels[:, i].numpy()) or {} for i, v in enumerate(vectors.numpy())]
    for name in ("within_between", "silhouette"):
        found[name] = [cluster.get(name, float("nan")) for cluster in clusters]
    return found


def _of_groups(groups: Tensor) -> dict[str, Tensor]:
    found = normality(groups.flatten(0, 1))
    return {name: values.view(len(groups), -1).nanmean(1) for name, values in found.items()}


def _of_rows(rows: Tensor) -> dict[str, Tensor]:
    channels = rows.size(-1)
    matrices = torch.stack([part.reshape(-1, channels).T.corrcoef() for part in rows.double()])
    pairs = ~torch.eye(channels, dtype=torch.bool)
    return {
        "correlation": matrices[:, pairs].abs().nanmean(1),
        "sparsity": (rows <= 0).double().flatten(1).mean(1),
    }
