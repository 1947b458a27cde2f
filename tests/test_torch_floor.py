"""normnorm runs on torch 2.10: what it uses of torch exists there, or is used behind a guard."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch_names import Uses, package_uses, uses_of

ROOT = Path(__file__).parent.parent

# What 2.10 lacks and normnorm uses all the same, with the guard that makes it right: a name, or
# name(keyword=). A name that exists in 2.10 must be added to the list instead, by
# tests/data/make_torch_names.py.
GUARDED: dict[str, str] = {}


def torch_2_10() -> dict[str, set[str] | None]:
    """Each listed name with its parameters; None where the list does not know them."""
    names: dict[str, set[str] | None] = {}
    text = (ROOT / "tests/data/torch_2_10_names.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, parenthesis, parameters = line.removesuffix(")").partition("(")
        names[name] = {p for p in parameters.split(", ") if p} if parenthesis else None
    return names


def beyond_2_10(uses: Uses) -> set[str]:
    """The names, and the keywords as name(keyword=), that are not in the list."""
    listed = torch_2_10()
    missing = set()
    for name, keywords in uses.items():
        if name != "torch" and name not in listed:
            missing.add(name)
            continue
        known = listed.get(name) or set()
        if "**" not in known:
            missing |= {f"{name}({keyword}=)" for keyword in keywords - known}
    return missing


def test_every_name_used_exists_in_2_10_or_is_guarded():
    assert beyond_2_10(package_uses(ROOT / "normnorm")) == set(GUARDED)


def test_the_walk_sees_the_package():
    uses = package_uses(ROOT / "normnorm")
    assert len(uses) > 30
    assert {"torch.autograd.Function", "torch.nn.modules.batchnorm._NormBase"} <= set(uses)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.zeros_like(x, dtype=torch.float64)", set()),
        (
            "import torch\ntorch.thread_safe_generator()",
            {"torch.thread_safe_generator"},
        ),  # 2.13 has it
        ("import torch.nn.functional as F\nF.not_there(x)", {"torch.nn.functional.not_there"}),
        ("def f():\n    from torch.nn import not_there as g", {"torch.nn.not_there"}),
        ("from torch import nn as n\nn.LayerNorm(3, bias=False)", set()),
        ("from torch import nn\nnn.GroupNorm(1, 3, bias=False)", {"torch.nn.GroupNorm(bias=)"}),
        (
            "from torch import nn\n"
            "class A(Mixin, nn.BatchNorm2d):\n"
            "    def __init__(self):\n"
            "        super().__init__(3, bias=False)",
            {"torch.nn.BatchNorm2d(bias=)"},
        ),
        ("import torch\ntorch.ops.normnorm.anything(x, keyword=1)", set()),
        ("x.clamp_min(0)", set()),
        ("x.sinc_()", {"torch.Tensor.sinc_"}),  # in 2.10 too, but nobody has listed it
    ],
)
def test_what_the_walk_finds(source: str, expected: set[str]):
    assert beyond_2_10(uses_of([source])) == expected
