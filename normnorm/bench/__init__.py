"""The benchmark: what normality normalization costs beside what one would use instead.

* :mod:`normnorm.bench.results`: the result file and its schema;
* :mod:`normnorm.bench.timing`: medians of calls in alternation, on a CPU or a GPU.
"""
