"""The compiled CPU kernels."""

NAME = "cpu"
DEVICE_TYPE = "cpu"


def unavailable_reason() -> str | None:
    return "not built"
