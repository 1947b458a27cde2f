"""A pytest plugin: SciPy's Yeo-Johnson transform is ours while other projects' tests run.

``pytest -p foreign_plugin --pyargs scipy.stats.tests.test_morestats``. Prints how often ours was
called at the end, for the caller to see that it was.
"""

from __future__ import annotations

import numpy as np
import scipy.stats._morestats as morestats
import torch

from normnorm import yeo_johnson

calls = 0


def _transform(x, lmbda, xp=None):
    global calls
    calls += 1
    values = torch.from_numpy(np.array(x, np.float64))
    result = yeo_johnson(values, float(lmbda)).numpy()
    dtype = x.dtype if np.issubdtype(x.dtype, np.floating) else np.float64
    return result.astype(dtype)


def pytest_configure(config) -> None:
    morestats._yeojohnson_transform = _transform


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(f"our transform was called {calls} times")
