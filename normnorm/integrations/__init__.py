"""Support for other libraries, one module per library.

Each module is named after its library and imports it; ``normnorm`` does so only for its models.
"""
