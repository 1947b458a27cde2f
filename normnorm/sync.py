"""Synchronised batch layers by their public import path."""

from normnorm.distributed.sync import (
    SYNCHRONISED,
    SyncBatchNormalNorm,
    SyncBatchNormalNormAct2d,
    convert_sync,
    revert_sync,
    sync_batch_normal_norm,
)

__all__ = [
    "SYNCHRONISED",
    "SyncBatchNormalNorm",
    "SyncBatchNormalNormAct2d",
    "convert_sync",
    "revert_sync",
    "sync_batch_normal_norm",
]
