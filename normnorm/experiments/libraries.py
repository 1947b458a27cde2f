"""torchvision, or a sentence that says how to get it."""

from __future__ import annotations

from typing import Any

import torch

from normnorm.commands import CommandError

__all__ = ["ExperimentError", "torchvision_datasets", "torchvision_models"]


class ExperimentError(CommandError):
    """A sentence for the user: why an experiment cannot run."""


def _torchvision(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"torchvision.{module}")
    except ImportError:
        raise ExperimentError(
            f"torchvision.{module} is needed and torchvision is not installed: "
            "pip install torchvision"
        ) from None
    except RuntimeError as error:  # built for another torch
        raise ExperimentError(
            f"the installed torchvision does not work with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}); pip install --upgrade torchvision fetches one that "
            "may"
        ) from None


def torchvision_datasets() -> Any:
    """``torchvision.datasets``.

    Raises:
        ExperimentError: it is missing, or does not work with this torch.
    """
    return _torchvision("datasets")


def torchvision_models() -> Any:
    """``torchvision.models``.

    Raises:
        ExperimentError: it is missing, or does not work with this torch.
    """
    return _torchvision("models")
