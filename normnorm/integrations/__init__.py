"""Support for other libraries, one module per library.

Each module is named after its library and imports it. ``normnorm`` imports one only for a model of
that library.
"""
