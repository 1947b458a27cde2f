"""Layers over the shards of a DTensor equal one process, forward and backward, eager and compiled:
the cases of dtensor_cases.py."""

import dtensor_cases
import pytest
import ranks


@pytest.mark.parametrize("name", ranks.names(dtensor_cases.__name__))
def test_on_every_rank(name, request):
    ranks.check(name, request)
