"""normnorm: normality normalization for PyTorch.

Layers that standardize, Gaussianize by a Yeo-Johnson transform with an estimated exponent, and
add scaled noise in training: Eftekhari and Papyan, "On the Importance of Gaussianizing
Representations", ICML 2025 (arXiv 2505.00685).
"""

from . import functional
from .backends import available_backends, use_backend
from .conversion import Replacement, replace_norms, restore_norms
from .doctor import show_config
from .export import decompositions
from .functional import estimate_lmbda, yeo_johnson
from .fused import AddLayerNormalNorm, BatchNormalNormAct2d
from .lazy import (
    LazyBatchNormalNorm1d,
    LazyBatchNormalNorm2d,
    LazyBatchNormalNorm3d,
    LazyInstanceNormalNorm1d,
    LazyInstanceNormalNorm2d,
    LazyInstanceNormalNorm3d,
)
from .modules import (
    BatchNormalNorm1d,
    BatchNormalNorm2d,
    BatchNormalNorm3d,
    GroupNormalNorm,
    InstanceNormalNorm1d,
    InstanceNormalNorm2d,
    InstanceNormalNorm3d,
    LayerNormalNorm,
    LayerNormalNorm2d,
)
from .monitoring import Monitor, monitor
from .norm_map import register_norm
from .per import PER, per_loss
from .running import freeze_statistics, unfreeze_statistics, update_stats
from .sync import SyncBatchNormalNorm, convert_sync

__version__ = "0.1.0"

__all__ = [
    "PER",
    "AddLayerNormalNorm",
    "BatchNormalNorm1d",
    "BatchNormalNorm2d",
    "BatchNormalNorm3d",
    "BatchNormalNormAct2d",
    "GroupNormalNorm",
    "InstanceNormalNorm1d",
    "InstanceNormalNorm2d",
    "InstanceNormalNorm3d",
    "LayerNormalNorm",
    "LayerNormalNorm2d",
    "LazyBatchNormalNorm1d",
    "LazyBatchNormalNorm2d",
    "LazyBatchNormalNorm3d",
    "LazyInstanceNormalNorm1d",
    "LazyInstanceNormalNorm2d",
    "LazyInstanceNormalNorm3d",
    "Monitor",
    "Replacement",
    "SyncBatchNormalNorm",
    "__version__",
    "available_backends",
    "convert_sync",
    "decompositions",
    "estimate_lmbda",
    "freeze_statistics",
    "functional",
    "monitor",
    "per_loss",
    "register_norm",
    "replace_norms",
    "restore_norms",
    "show_config",
    "unfreeze_statistics",
    "update_stats",
    "use_backend",
    "yeo_johnson",
]
