"""Whole training steps: networks built once with torch's norm layers and once with ours."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accuracy.nets import Block, ConvNet, Norm, Transformer
from speed.providers import PROVIDERS
from speed.results import MemoryFormat, NetworkMeasurement, Status, with_ratios
from speed.timing import Settings, Timing, interleaved, peak_bytes, sentence
from speed.work import DTYPES, LAYERS, Preset

# Providers of a network's norm layers; "torch" may use cuDNN here.
NETWORK_PROVIDERS = tuple(n for n in PROVIDERS if n == "torch" or n.startswith("normnorm-"))
_WARM_UP_STEPS = 3


class Encoder(nn.Module):
    """A small masked language model: embedded tokens, transformer blocks, a score for each word."""

    def __init__(self, norm: Norm, words: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.blocks = nn.Sequential(*(Block(norm, width, width // 64) for _ in range(depth)))
        self.last_norm = norm(width)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.last_norm(self.blocks(self.embed(tokens) + self.position)))


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network to train for a few steps; a :class:`speed.results.NetworkMeasurement` explains the
    fields that it has too."""

    name: str
    source: Literal["torchvision", "timm", "normnorm"]
    layer: str  # the normality layer that takes the place of its norm layers
    build: Callable[[Norm], nn.Module]
    batch: int
    sample_shape: tuple[int, ...]
    classes: int  # what its targets are drawn from
    unit: Literal["images", "tokens"] = "images"
    dtype: str = "float32"
    memory_format: MemoryFormat = "contiguous"

    @property
    def units(self) -> int:
        return self.batch * (self.sample_shape[0] if self.unit == "tokens" else 1)

    def __str__(self) -> str:
        words = [self.name, f"batch {self.batch}", self.dtype]
        if self.memory_format != "contiguous":
            words.append(self.memory_format)
        return " ".join(words)


_CONV = Network(
    name="conv_net", source="normnorm", layer="BatchNormalNorm2d", batch=64,
    build=lambda norm: ConvNet(norm, (3, 32, 32), 10, (32, 64, 128)),
    sample_shape=(3, 32, 32), classes=10,
)  # fmt: skip
_VIT = Network(
    name="small_vit", source="normnorm", layer="LayerNormalNorm", batch=64,
    build=lambda norm: Transformer(norm, (3, 32, 32), 10, (4, 4), 128, 4),
    sample_shape=(3, 32, 32), classes=10,
)  # fmt: skip
_ENCODER = Network(
    name="small_encoder", source="normnorm", layer="LayerNormalNorm", batch=8, unit="tokens",
    build=lambda norm: Encoder(norm, 1000, 128, 256, 4), sample_shape=(128,), classes=1000,
)  # fmt: skip


def _resnet(name: str, batch: int, size: int) -> Network:
    return Network(
        name=name, source="torchvision", layer="BatchNormalNorm2d", batch=batch,
        build=lambda norm: getattr(import_module("torchvision.models"), name)(norm_layer=norm),
        sample_shape=(3, size, size), classes=1000,
    )  # fmt: skip


def _vit_small(batch: int) -> Network:
    name = "vit_small_patch16_224"
    return Network(
        name=name, source="timm", layer="LayerNormalNorm", batch=batch,
        build=lambda norm: import_module("timm").create_model(name, norm_layer=norm),
        sample_shape=(3, 224, 224), classes=1000,
    )  # fmt: skip


def networks(preset: Preset, device: str) -> list[Network]:
    """The networks of a preset; some need libraries that may not be installed."""
    if preset == "quick":
        return [replace(_CONV, batch=16), replace(_ENCODER, batch=2)]
    if device == "cpu":
        sizes = (8, 128) if preset == "default" else (16, 224)
        real = [_resnet("resnet18", *sizes), _vit_small(sizes[0] // 4)]
        if preset == "full":
            real.append(_resnet("resnet50", *sizes))
        return [_CONV, _VIT, _ENCODER, *real]
    found = []
    for net in (_resnet("resnet18", 256, 224), _resnet("resnet50", 256, 224)):
        amp = replace(net, dtype="bfloat16", memory_format="channels_last")
        found += [amp] if preset == "default" else [net, amp]
    wide = replace(
        _ENCODER, name="encoder", build=lambda norm: Encoder(norm, 32000, 1024, 768, 12),
        sample_shape=(1024,), classes=32000, dtype="bfloat16",
    )  # fmt: skip
    return [_CONV, *found, replace(_vit_small(256), dtype="bfloat16"), wide]


def _layer(network: Network, provider: str) -> type[nn.Module]:
    about = LAYERS[network.layer]
    return about.torchs if provider == "torch" else about.ours


class _Training:
    """A network in training: each call is one step on the same random batch."""

    def __init__(self, network: Network, provider: str, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.device, self.dtype = device, DTYPES[network.dtype]
        channels_last = network.memory_format == "channels_last"
        layout = torch.channels_last if channels_last else torch.contiguous_format
        norm = _layer(network, provider)
        net: Any = network.build(partial(norm, **dict(LAYERS[network.layer].keywords))).to(device)
        self.net = net.to(memory_format=layout).train()
        self.norm_layers = sum(type(module) is norm for module in self.net.modules())
        self.peak_bytes: int | None = None
        # Momentum 0.9 and a rate at which nothing diverges in however many steps are timed.
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        shape = (network.batch, *network.sample_shape)
        if network.unit == "tokens":
            self.input = torch.randint(network.classes, shape, generator=generator).to(device)
            targets = shape
        else:
            images = torch.randn(shape, generator=generator)
            self.input = images.to(device).contiguous(memory_format=layout)
            targets = shape[:1]
        self.target = torch.randint(network.classes, targets, generator=generator).to(device)
        self.loss = torch.full((), math.nan)

    def __call__(self, copy: int = 0) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            scores = self.net(self.input)
            loss = nn.functional.cross_entropy(scores.flatten(0, -2), self.target.flatten())
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()


def measure_network(
    network: Network, providers: Sequence[str], device: torch.device, settings: Settings
) -> list[NetworkMeasurement]:
    """A row for each provider: "unavailable" where the network's library is missing.

    Args:
        providers: names among :data:`NETWORK_PROVIDERS`.
    """
    try:
        import_module(network.source)
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch, say
        why = f"{network.source} does not import: {sentence(error)}"
        return [_row(network, name, None, None, ("unavailable", why)) for name in providers]
    trainings: dict[str, _Training] = {}
    failures: dict[str, tuple[Status, str]] = {}
    # torch chooses cuDNN itself here, as for a user.
    within = {n: nullcontext if n == "torch" else PROVIDERS[n].within for n in providers}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for name in providers:
            try:
                with within[name]():
                    training = _Training(network, name, device, settings.seed)
                    for _ in range(_WARM_UP_STEPS):
                        training()
                    loss = training.loss.item()
                    if not math.isfinite(loss):
                        failures[name] = "wrong", f"the loss is {loss} after {_WARM_UP_STEPS} steps"
                        continue
                    training.peak_bytes = peak_bytes(training, device)
                    trainings[name] = training
            except Exception as error:  # whatever a provider raises is its result
                failures[name] = "failed", sentence(error)
        found = interleaved(
            trainings, device, method="wall" if device.type == "cpu" else "stream", within=within,
            budget_s=settings.budget_s * 2, min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
        )  # fmt: skip
    timings = {name: t for name, t in found.items() if isinstance(t, Timing)}
    for name, timing in found.items():
        if isinstance(timing, Exception):
            failures[name] = "failed", sentence(timing)
    return with_ratios(
        _row(network, name, trainings.get(name), timings.get(name), failures.get(name))
        for name in providers
    )


def _row(
    network: Network,
    provider: str,
    training: _Training | None,
    timing: Timing | None,
    failure: tuple[Status, str] | None,
) -> NetworkMeasurement:
    status, message = failure or ("ok", None)
    same = ("source", "batch", "sample_shape", "unit", "units", "dtype", "memory_format")
    return NetworkMeasurement(
        network=network.name, norm=_layer(network, provider).__name__, provider=provider,
        norm_layers=training.norm_layers if training else 0,
        status=status, message=message, peak_bytes=training.peak_bytes if training else None,
        **(timing._asdict() if timing else {}), **{name: getattr(network, name) for name in same},
    )  # fmt: skip
