"""transformers: loading of models with normnorm layers, and counterparts of its own LayerNorms.

::

    from normnorm.integrations import transformers as normnorm_transformers

    model = transformers.ResNetForImageClassification.from_pretrained("microsoft/resnet-50")
    normnorm.replace_norms(model, noise_train=0.1)
    ...  # training
    model.save_pretrained("mine")
    model = normnorm_transformers.from_pretrained(
        transformers.ResNetForImageClassification, "mine", noise_train=0.1
    )

The channel LayerNorms of its vision models are recognized by their attributes, since each model
file has its own copy. Its other models use torch's layers, or their own norms, which are left
unless registered by :func:`normnorm.register_norm`.
"""

import functools
from typing import Any

import torch
from torch import nn

from ..conversion import Where, replace_norms
from ..modules import LayerNormalNorm, LayerNormalNorm2d

# Copies for one layout only, (N, C, H, W).
_CHANNELS_FIRST = ("EomtLayerNorm2d", "EomtDinov3LayerNorm2d", "VideomtLayerNorm2d")


def counterpart(module: nn.Module) -> type[nn.Module] | None:
    """The normnorm class for a transformers module's class, or None."""
    cls = type(module)
    if cls.__bases__ != (nn.LayerNorm,):
        return None
    if cls.__name__ in _CHANNELS_FIRST:
        return LayerNormalNorm2d
    if cls.__name__.endswith("LayerNorm") and hasattr(module, "data_format"):
        return {"channels_first": LayerNormalNorm2d, "channels_last": LayerNormalNorm}.get(
            str(module.data_format)
        )
    return None


def from_pretrained(
    cls: Any,
    path: Any,
    *arguments: Any,
    where: Where = None,
    noise_train: float | None = None,
    alpha: float | None = None,
    order: int | None = None,
    transform_eps: float | None = None,
    **keywords: Any,
) -> Any:
    """``cls.from_pretrained(path, ...)``, replacing the model's norms before weights are loaded.

    transformers' own loading (shards, safetensors and older files, renamed keys, the hub) restores
    a saved lambda. If the checkpoint has none, lambda is 1. Checkpoints have no settings: pass the
    ``where``, ``noise_train``, ... of the original :func:`normnorm.replace_norms`.

    Args:
        cls: a transformers model class, or one of its Auto classes.
        path: a folder, or a model's name on the hub.
        arguments, keywords: for ``cls.from_pretrained``.
        where, noise_train, alpha, order, transform_eps: see :func:`normnorm.replace_norms`.

    Returns:
        The model, of transformers' class, as ``cls.from_pretrained`` returns it.

    Raises:
        TypeError: ``cls`` is neither.
        TypeError, ValueError: as :func:`normnorm.replace_norms`, before weights are loaded.
        OSError: from transformers, where there is no such folder or model.
    """
    concrete = _concrete(cls, path, keywords)
    settings: Any = {
        "noise_train": noise_train, "alpha": alpha, "order": order, "transform_eps": transform_eps,
    }  # fmt: skip

    @functools.wraps(concrete.__init__)
    def __init__(self: Any, *given: Any, **named: Any) -> None:
        concrete.__init__(self, *given, **named)
        replace_norms(self, where, **settings)

    # The same name, by which transformers finds what belongs to a class.
    names = {name: getattr(concrete, name) for name in ("__module__", "__qualname__", "__doc__")}
    replaced: Any = type(concrete.__name__, (concrete,), {**names, "__init__": __init__})
    loaded = replaced.from_pretrained(path, *arguments, **keywords)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = concrete
    return loaded


# Keywords of from_pretrained that say where a model is and whether its code may run.
_OF_THE_HUB = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def _concrete(cls: Any, path: Any, keywords: dict[str, Any]) -> Any:
    """The model class that ``cls`` loads; an Auto class looks it up in the configuration."""
    import transformers

    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    if not (hasattr(cls, "from_pretrained") and hasattr(cls, "from_config")):
        raise TypeError(
            "cls must be a class of transformers' models, such as ResNetModel or AutoModel; "
            f"got {cls!r}"
        )
    hub = {name: keywords[name] for name in _OF_THE_HUB if name in keywords}
    config = keywords.get("config")
    if not isinstance(config, transformers.PretrainedConfig):
        config = transformers.AutoConfig.from_pretrained(path if config is None else config, **hub)
    trust = {name: value for name, value in hub.items() if name == "trust_remote_code"}
    with torch.device("meta"):
        return type(cls.from_config(config, **trust))
