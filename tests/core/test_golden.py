"""The authors' released layers, in float64, as recorded vectors.

``data/official_float64.npz`` has inputs, upstream gradients, outputs, gradients and running
statistics of their layers for six input distributions, without noise. Their transform shifts its
exponent by sqrt(eps), which is ``transform_eps=math.sqrt(eps)`` here.
"""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import normnorm

PATH = Path(__file__).parents[1] / "data" / "official_float64.npz"
RUNNING = ("running_mean", "running_var", "running_lmbda")

with np.load(PATH) as stored:
    VECTORS: dict[str, np.ndarray] = dict(stored)
CASES = {case["name"]: case for case in json.loads(bytes(VECTORS["index"]))}
TRACKED = [name for name in CASES if f"{name}/running_lmbda" in VECTORS]
IMAGES = [name for name, case in CASES.items() if len(case["shape"]) == 4]


class Recorded:
    """One case: its arrays as tensors, and the normnorm layer with its parameters."""

    def __init__(self, name: str, device: str, memory_format=torch.preserve_format) -> None:
        self.name, self.device, self.memory_format = name, device, memory_format
        self.case = CASES[name]

    def __contains__(self, key: str) -> bool:
        return f"{self.name}/{key}" in VECTORS

    def __getitem__(self, key: str) -> torch.Tensor:
        array = torch.from_numpy(VECTORS[f"{self.name}/{key}"].copy())
        memory_format = self.memory_format if array.dim() == 4 else torch.preserve_format
        return array.to(self.device, memory_format=memory_format)

    def layer(self) -> torch.nn.Module:
        kwargs = dict(self.case["kwargs"])
        if self.case["cls"].startswith("Instance"):
            kwargs.setdefault("affine", True)  # the authors' default; torch's is False
        kwargs["transform_eps"] = math.sqrt(kwargs.get("eps", 1e-5))
        layer = getattr(normnorm, self.case["cls"])(
            **kwargs, device=self.device, dtype=torch.float64
        )
        with torch.no_grad():
            for parameter in ("weight", "bias"):
                assert (parameter in self) == (getattr(layer, parameter) is not None)
                if parameter in self:
                    getattr(layer, parameter).copy_(self[parameter])
        return layer


def _agree(got: dict[str, torch.Tensor], recorded: Recorded) -> None:
    """With the arrays of the same names; an error names the array."""
    want = {name: recorded[name] for name in got}
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def _step(recorded: Recorded, layer: torch.nn.Module, suffix: str) -> dict[str, torch.Tensor]:
    """One forward and backward pass: the output and every gradient by its recorded name."""
    x = recorded[f"x{suffix}"].requires_grad_()
    parameters = [p for p in (layer.weight, layer.bias) if p is not None]
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *parameters), recorded[f"g{suffix}"])
    names = (f"{name}{suffix}" for name in ("y", "dx", "dweight", "dbias"))
    return dict(zip(names, (y.detach(), *gradients), strict=False))


def _check_evaluation(recorded: Recorded, layer: torch.nn.Module) -> None:
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.eval()
    result = _step(recorded, layer, "_eval")
    _agree({name: result[name] for name in ("y_eval", "dx_eval")}, recorded)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), f"evaluation changed {name}"


def _check_case(recorded: Recorded) -> None:
    layer = recorded.layer()
    for step in range(recorded.case["steps"]):
        _agree(_step(recorded, layer, str(step)), recorded)
    assert all((name in recorded) == (getattr(layer, name, None) is not None) for name in RUNNING)
    if "running_mean" in recorded:
        _agree({name: getattr(layer, name) for name in RUNNING}, recorded)
        assert layer.num_batches_tracked.item() == recorded.case["steps"]
    _check_evaluation(recorded, layer)


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [*product(CASES, [torch.preserve_format]), *product(IMAGES, [torch.channels_last])],
)
def test_outputs_gradients_and_running_statistics_are_the_authors(
    name, memory_format, backend, device
):
    _check_case(Recorded(name, device, memory_format))


@pytest.mark.parametrize("name", TRACKED)
def test_an_authors_checkpoint_loads_strictly_and_gives_their_outputs(name, backend, device):
    recorded = Recorded(name, device)
    keys = (*RUNNING, "running_norm", "weight", "bias")
    checkpoint = {key: recorded[key] for key in keys if key in recorded}
    assert "running_norm" in checkpoint
    assert "num_batches_tracked" not in checkpoint
    layer = recorded.layer()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    layer.load_state_dict(checkpoint, strict=True)
    assert set(checkpoint) >= set(RUNNING), "loading emptied the caller's state_dict"
    _check_evaluation(recorded, layer)
