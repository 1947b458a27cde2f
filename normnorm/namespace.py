"""The namespace of this copy's ops.

The package imports relatively, so that a copy can be part of another package or be loaded under
another name. The copy named ``normnorm`` has the ops ``torch.ops.normnorm`` and the compiled
kernels, whose library registers its ops under fixed names. Another copy has a namespace of its own,
its package's name with ``_`` for ``.``, and the backends that are written in Python.
"""

import re

import torch

PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = re.sub(r"\W", "_", PACKAGE)
OWNS_COMPILED = PACKAGE == "normnorm"
OPS = getattr(torch.ops, NAMESPACE)


def compiled_namespace(backend: str) -> str:
    """The namespace of the ops that the library implements for a compiled backend."""
    return f"{NAMESPACE}_{backend}"
