"""Tests that need a GPU: collected where there is one, or in the dry run of ``make gpu-check``.

A package, so that its file names may be those of other test files.
"""
