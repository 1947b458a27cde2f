"""What other libraries need to know of normnorm, one module a library.

Each module is named after its library and imports it; nothing here is imported by ``normnorm``
unless a model of that library asks for it.
"""
