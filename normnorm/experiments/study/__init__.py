"""Does it help? Every norm with and without noise and transform, on data that everyone has.

``normnorm study`` trains, measures and writes the page.
"""

from normnorm.experiments.study.main import add_arguments, run

__all__ = ["add_arguments", "run"]
