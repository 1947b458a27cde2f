"""Whether there is a GPU for the rest of this folder, and which backends serve it."""

import pytest
import torch

from .conftest import HAS_RIG
from .rig import BACKENDS

NO_GPU = "no GPU; `make gpu-check DRY=1` runs these tests on the CPU"


@pytest.mark.parametrize("name", BACKENDS)
def test_the_backend_serves_the_device(request, name):
    if not HAS_RIG:
        pytest.skip(NO_GPU)
    rig = request.getfixturevalue("rig")
    x = torch.arange(1000.0, device=rig.device)
    assert x.sum().item() == 499500
    reason = rig.reasons()[name]
    if reason is not None and name != "cuda":
        pytest.skip(f"backend '{name}': {reason}")
    assert reason is None, reason
