"""Several processes: the messages of the synchronised batch layers (``statistics``; the layers are
in :mod:`normnorm.sync`) and ``DTensor`` inputs (``sharding``)."""
