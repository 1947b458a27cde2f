"""Normality, independence, sparsity and noise robustness of a model's representations.

Needs the extra ``diagnostics``: SciPy and scikit-learn, and matplotlib for the plots.
"""

from ..quantiles import normal_quantiles, normal_r_squared, qq_r_squared
from .diagnose import diagnose, noise_robustness
from .result import Diagnosis, LayerDiagnosis

__all__ = [
    "Diagnosis",
    "LayerDiagnosis",
    "diagnose",
    "noise_robustness",
    "normal_quantiles",
    "normal_r_squared",
    "qq_r_squared",
]
