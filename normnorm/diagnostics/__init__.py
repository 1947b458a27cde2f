"""How Gaussian, how independent and how sparse a model's representations are."""
