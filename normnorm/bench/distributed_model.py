"""A model, not a measurement: a ResNet-50 training step on several GPUs of one node.

The time of a message of b bytes over p ranks is ``alpha(p) + b beta(p)``. A step is

    computation + gradients that hide behind no computation
    [+ the layers' small messages + what they read again]

where the bracket belongs to synchronised statistics alone. What such a layer sends is
:mod:`normnorm.ranks`'s: in the forward pass, for every channel, 3 numbers and a count gathered
from all ranks, then sums of 4 numbers, and with noise of 1 and of 1; in the backward pass of 5;
all in float64. Each message waits for the one before, so none of them hides behind computation,
and the values of a group cannot stay on the chip meanwhile: every round reads the input again.

Every parameter carries its source (:data:`PARAMETERS`). What has none, is not modelled: loading
the data, ranks that wait for the slowest, more than one node. Nor is what the layer's passes
between the messages, PyTorch operations today, take beyond one read a round.
:mod:`normnorm.bench.gloo` checks the form of the model (that a step's messages cost the sum of
``alpha + b beta``) against processes of this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = [
    "GPUS",
    "PARAMETERS",
    "Message",
    "Network",
    "Parameter",
    "Span",
    "StepTime",
    "alpha_us",
    "gradient_messages",
    "resnet",
    "statistics_messages",
    "step_time",
]

GPUS = tuple(range(1, 9))  # one node, which is as far as the parameters reach

_NUMBER_BYTES = 8  # synchronised layers send float64
# Numbers a channel that a synchronised layer sums over the ranks, in the order of a step; before
# them it gathers _GATHERED numbers a channel and one more.
_GATHERED = 3
_FORWARD_SUMS = {True: (4, 1, 1), False: (4,)}  # with noise, without
_BACKWARD_SUMS = (5,)
# How often a layer reads activations in its forward and its backward pass: a plain one with its
# values on the chip and one without; a synchronised one, once a round and once more to write.
_PLAIN_READS = (1 + 2, 2 + 4)
_SYNCHRONISED_READS = {True: 5 + 4, False: 3 + 4}
# Of a step's computation: each layer's backward pass does two products where the forward does one.
_BACKWARD_SHARE = 2 / 3
# torch.nn.parallel.DistributedDataParallel's defaults: the first bucket, then the others.
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20


@dataclass(frozen=True)
class Parameter:
    """A number that the model stands on.

    Attributes:
        value, unit: the number.
        meaning: what it is.
        source: where it was read or how it was found.
    """

    value: float
    unit: str
    meaning: str
    source: str


_EXAMPLES = (
    "NVIDIA DeepLearningExamples, ResNet50 v1.5 for PyTorch, README, training performance of a "
    "DGX A100 (8x A100 80GB), mixed precision, NHWC, NGC 21.03"
)
_TUNING = "NVIDIA NCCL, src/graph/tuning.cc, commit 01afd20 (the cost model NCCL itself chooses by)"

PARAMETERS = {
    "images_per_s": Parameter(2470, "images/s", "training rate of one GPU", _EXAMPLES),
    "batch": Parameter(
        256, "images", "batch of one GPU", "the same repository, ConvNets/configs.yml, DGXA100 AMP"
    ),
    "images_per_s_8": Parameter(
        16621, "images/s", "training rate of eight GPUs; not used, but compared with", _EXAMPLES
    ),
    "bus_gb_per_s": Parameter(
        235, "GB/s", "bus bandwidth of a large all-reduce on A100s of one node", _TUNING
    ),
    "ring_base_us": Parameter(3.6, "us", "ring, LL protocol: a message's start", _TUNING),
    "ring_step_us": Parameter(
        0.47, "us", "ring, LL protocol, NVLink: a step; an all-reduce has 2(p-1), a gather p-1",
        _TUNING,
    ),
    "tree_base_us": Parameter(4.4, "us", "tree, LL protocol: an all-reduce's start", _TUNING),
    "tree_step_us": Parameter(0.52, "us", "tree, LL protocol, NVLink: a step of 2(p-1)", _TUNING),
    "ll_share": Parameter(
        0.25, "", "of the bus bandwidth that the LL protocol reaches on a ring", _TUNING
    ),
    "slow_alpha_us": Parameter(
        46.3, "us", "the pessimist's alpha: a small all-reduce over 16 GPUs of two nodes, measured",
        "github.com/NVIDIA/nccl, issue 1244: all_reduce_perf, 16 to 64 bytes",
    ),
    "memory_gb_per_s": Parameter(
        2039, "GB/s", "device memory of an A100 80GB SXM; no kernel reaches it wholly",
        "NVIDIA A100 data sheet",
    ),
    "activation_bytes": Parameter(
        2, "bytes", "of one activation under mixed precision", "the dtype, float16 or bfloat16"
    ),
    "gradient_bytes": Parameter(
        4, "bytes", "of one gradient under mixed precision: parameters are kept in float32",
        "torch.amp, DistributedDataParallel's default",
    ),
}  # fmt: skip


def _value(name: str) -> float:
    return PARAMETERS[name].value


class Network(NamedTuple):
    """What the model needs to know of a convolutional network.

    Attributes:
        name: what it is called.
        channels: of each batch layer, in the order of the forward pass.
        elements: that each batch layer normalizes of one image.
        parameters: learned numbers.
    """

    name: str
    channels: tuple[int, ...]
    elements: tuple[int, ...]
    parameters: int


# Blocks a stage, and whether they are bottlenecks, as He et al. (2016), table 1.
_RESNETS = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}


def resnet(depth: int = 50, image: int = 224, classes: int = 1000) -> Network:
    """The batch layers of a ResNet-18 or -50 whose 3x3 convolutions have the strides (v1.5).

    Raises:
        ValueError: another depth.
    """
    if depth not in _RESNETS:
        raise ValueError(f"depth must be one of {tuple(_RESNETS)}, got {depth}")
    blocks, bottleneck = _RESNETS[depth]
    size = image // 2
    channels, elements, parameters = [64], [64 * size**2], 3 * 64 * 49
    size //= 2
    width_in = 64

    def convolution(inputs: int, outputs: int, kernel: int, at: int) -> None:
        nonlocal parameters
        channels.append(outputs)
        elements.append(outputs * at**2)
        parameters += inputs * outputs * kernel**2

    for stage, count in enumerate(blocks):
        width = 64 << stage
        width_out = 4 * width if bottleneck else width
        for block in range(count):
            before = size
            if stage and not block:
                size //= 2
            if bottleneck:
                convolution(width_in, width, 1, before)
                convolution(width, width, 3, size)
                convolution(width, width_out, 1, size)
            else:
                convolution(width_in, width, 3, size)
                convolution(width, width, 3, size)
            if width_in != width_out or before != size:
                convolution(width_in, width_out, 1, size)
            width_in = width_out
    parameters += 2 * sum(channels) + (width_in + 1) * classes
    return Network(f"ResNet-{depth}", tuple(channels), tuple(elements), parameters)


class Message(NamedTuple):
    """One collective operation.

    Attributes:
        kind: the operation of torch.distributed.
        bytes: that each rank puts in.
    """

    kind: Literal["all_reduce", "all_gather"]
    bytes: int


def statistics_messages(network: Network, noise: bool = True) -> tuple[Message, ...]:
    """The messages of a step's synchronised statistics, in their order."""
    messages = []
    for channels in network.channels:
        messages.append(Message("all_gather", (_GATHERED * channels + 1) * _NUMBER_BYTES))
        for numbers in _FORWARD_SUMS[noise]:
            messages.append(Message("all_reduce", numbers * channels * _NUMBER_BYTES))
    for channels in reversed(network.channels):
        for numbers in _BACKWARD_SUMS:
            messages.append(Message("all_reduce", numbers * channels * _NUMBER_BYTES))
    return tuple(messages)


def gradient_messages(network: Network) -> tuple[Message, ...]:
    """The all-reduces of a step's gradients, in the order in which they become ready.

    By DistributedDataParallel's sizes; buckets are cut exactly, where torch cuts at parameters.
    """
    left = int(network.parameters * _value("gradient_bytes"))
    buckets = [min(left, _FIRST_BUCKET)]
    left -= buckets[0]
    while left > 0:
        buckets.append(min(left, _BUCKET))
        left -= buckets[-1]
    return tuple(Message("all_reduce", size) for size in buckets)


class Span(NamedTuple):
    """Seconds between an optimist's and a pessimist's parameters."""

    low: float
    high: float

    def __add__(self, other: object) -> Span:
        if not isinstance(other, Span):
            return NotImplemented
        return Span(self.low + other.low, self.high + other.high)


def alpha_us(gpus: int, kind: str = "all_reduce") -> Span:
    """Microseconds that a message of nothing takes: by NCCL's table, and the pessimist's."""
    steps = gpus - 1
    if kind == "all_gather":
        low = _value("ring_base_us") + steps * _value("ring_step_us")
    else:
        ring = _value("ring_base_us") + 2 * steps * _value("ring_step_us")
        tree = _value("tree_base_us") + 2 * steps * _value("tree_step_us")
        low = min(ring, tree)
    return Span(low, _value("slow_alpha_us"))


def _messages(messages: tuple[Message, ...], gpus: int, share: float = 1.0) -> Span:
    """One after the other, at a share of the bus bandwidth."""
    if gpus == 1:
        return Span(0.0, 0.0)
    bus = share * _value("bus_gb_per_s") * 1e9
    total = Span(0.0, 0.0)
    for message in messages:
        # Over the bus, for a byte of each rank: both ways of a ring, or what the others have.
        travels = gpus - 1 if message.kind == "all_gather" else 2 * (gpus - 1) / gpus
        seconds = message.bytes * travels / bus
        low, high = alpha_us(gpus, message.kind)
        total += Span(low * 1e-6 + seconds, high * 1e-6 + seconds)
    return total


class StepTime(NamedTuple):
    """Seconds of one step by where they go, each between two bounds.

    Attributes:
        computation: what one GPU takes alone, plain batch norm included.
        gradients: their all-reduces, as far as they hide behind no computation.
        statistics: the layers' small messages.
        rereading: the reads of activations that synchronised layers add.
    """

    computation: Span
    gradients: Span
    statistics: Span
    rereading: Span

    @property
    def total(self) -> Span:
        return self.computation + self.gradients + self.statistics + self.rereading


def _exposed_gradients(network: Network, gpus: int, computation: float) -> Span:
    """At best all buckets but the last hide behind the backward pass; at worst none does."""
    buckets = gradient_messages(network)
    everything = _messages(buckets, gpus)
    too_much = max(0.0, everything.low - _BACKWARD_SHARE * computation)
    return Span(max(_messages(buckets[-1:], gpus).low, too_much), everything.high)


def step_time(gpus: int, *, synchronised: bool, noise: bool = True) -> StepTime:
    """The model's time of one training step, 256 images a GPU, on A100s joined by NVLink.

    Args:
        gpus: 1 to 8.
        synchronised: statistics over the whole batch instead of each GPU's share. On one GPU
            there is nobody to synchronise with, and both are the same.
        noise: whether the layers train with noise, which takes two of their messages.

    Raises:
        ValueError: more GPUs than the parameters reach, or fewer than one.
    """
    if gpus not in GPUS:
        raise ValueError(f"the model reaches from 1 to {GPUS[-1]} GPUs, got {gpus}")
    network = resnet()
    computation = _value("batch") / _value("images_per_s")
    statistics = rereading = Span(0.0, 0.0)
    if synchronised and gpus > 1:
        statistics = _messages(statistics_messages(network, noise), gpus, _value("ll_share"))
        once = sum(network.elements) * _value("batch") * _value("activation_bytes")
        seconds = once / (_value("memory_gb_per_s") * 1e9)
        high, low = ((_SYNCHRONISED_READS[noise] - reads) * seconds for reads in _PLAIN_READS)
        rereading = Span(low, high)
    return StepTime(
        Span(computation, computation),
        _exposed_gradients(network, gpus, computation),
        statistics,
        rereading,
    )
