"""How providers look: one colour, marker and name each, the same in every plot and table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["GREY", "RC", "Look", "in_order", "look", "ours"]

GREY = "#5f5f5f"


class Look(NamedTuple):
    """A provider's appearance.

    Attributes:
        label: its name for readers.
        colour: told apart from the others by every common kind of colour vision (Okabe and Ito's
            palette, the yellow darkened), and by its marker without any.
        marker: matplotlib's letter.
    """

    label: str
    colour: str
    marker: str


_LOOKS = {
    "normnorm-cpu": Look("normnorm (CPU)", "#0072B2", "o"),
    "normnorm-cuda": Look("normnorm (CUDA)", "#0072B2", "o"),
    "normnorm-triton": Look("normnorm (Triton)", "#56B4E9", "D"),
    "normnorm-reference": Look("normnorm (reference)", "#7B4FA3", "p"),
    "torch": Look("torch", "#1a1a1a", "s"),
    "cudnn": Look("torch (cuDNN)", "#777777", "X"),
    "compiled-torch": Look("torch, compiled", "#E69F00", "v"),
    "compiled-reference": Look("definition, compiled", "#009E73", "^"),
    "reference": Look("definition, eager", "#CC79A7", "P"),
    "liger": Look("Liger", "#D55E00", "<"),
    "quack": Look("quack", "#8A7A00", ">"),
    "copy": Look("device copy", "#8c8c8c", "_"),
}
_OTHERS = ("#5B7083", "#A0522D", "#3B7A57", "#B03060")

RC = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.fonttype": "path",
    "svg.hashsalt": "normnorm",
}


def look(provider: str) -> Look:
    """A provider's look; one that is not known gets a colour of its own by its name."""
    if provider in _LOOKS:
        return _LOOKS[provider]
    return Look(provider, _OTHERS[sum(provider.encode()) % len(_OTHERS)], "h")


def in_order(providers: Iterable[str]) -> list[str]:
    """Each once, ours first, the copy last."""
    known = list(_LOOKS)
    return sorted(
        set(providers), key=lambda p: (known.index(p) if p in known else len(known) - 1.5, p)
    )


def ours(provider: str) -> bool:
    """Whether it is one of this project's backends."""
    return provider.startswith("normnorm-")
