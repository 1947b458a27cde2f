"""The benchmark: what normality normalization costs beside what one would use instead.

* ``options``: the command line and what it asks for; ``main``: what the scripts do.
* ``work``: what is measured; ``providers``: implementations to benchmark.
* ``case``: inputs, and the float64 reference that each provider must match.
* ``timing``: medians of interleaved calls on a CPU or a GPU; bytes kept and peak.
* ``measure``, ``networks``: one work, one network, a run; ``counts``: instructions an element.
* ``results``, ``environment``: the result file and its schema.
* ``tables``: text, Markdown, CSV, comparison; ``plots``: PNG.
"""
