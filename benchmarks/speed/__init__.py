"""The benchmark: what normality normalization costs beside what one would use instead.

* ``options``: the command line of ``bench.py``; ``plan``: what it asks for; ``main``: the run.
* ``work``: what is measured; ``providers``: implementations to benchmark.
* ``case``: inputs, and the float64 reference that each provider must match.
* ``timing``, ``memory``: medians of interleaved calls on a CPU or a GPU; bytes kept and peak.
* ``measure``, ``networks``: one work, one network.
* ``results``: the result file and its schema.
* ``tables``, ``compare``: text; ``plots``, ``figures``: PNG; ``report``: both from stored results.
"""
