"""Tests that want a GPU: collected where there is one, or in the dry run of ``make gpu-check``.

A package, so that its conftest and test files may have what names they like.
"""
