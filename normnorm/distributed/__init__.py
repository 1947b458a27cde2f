"""Several processes: synchronised batch layers (``sync``, their messages in ``statistics``) and
``DTensor`` inputs (``sharding``)."""
