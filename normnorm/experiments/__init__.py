"""The paper's experiments: networks trained with a choice of normalization layer.

``normnorm train`` is the way in. Needs the extra ``experiments``.
"""

from normnorm.experiments.main import add_arguments, run

__all__ = ["add_arguments", "run"]
