"""Loads the compiled extension, if there is one, and says what it was compiled from."""

from __future__ import annotations

import importlib
import logging
import platform

import torch  # loads the libraries that the extension links to

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _load():
    try:
        module = importlib.import_module("flashode._C")
    except ImportError as error:
        return None, f"the compiled extension is not available ({error})"
    built, running = (".".join(v.split(".")[:2]) for v in (module.torch_version, torch.__version__))
    if built != running:
        return (
            None,
            f"the extension was compiled for torch {built}, this is torch {running}; rebuild with `{_REBUILD}`",
        )
    return module, None


C, missing = _load()

if C is None:
    logging.getLogger("flashode").warning(
        "flashode: %s; using the reference engine, which is slower.", missing
    )


def build_config() -> dict:
    """What was compiled, with what, for which devices, and which of them can be used.

    Keys: ``extension`` (bool), ``why_not`` (text, empty if all is well), ``python``, ``torch``,
    and for a loaded extension ``compiler``, ``cuda`` (bool), ``cuda_architectures``,
    ``cuda_runtime`` and ``cuda_driver`` (versions as CUDA numbers them, 13000 for 13.0),
    ``devices`` (the usable ones) and ``cuda_error``.
    """
    config = {
        "extension": C is not None,
        "why_not": missing or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": ["cpu"],
    }
    if C is None:
        return config
    compiled = C.build_config()
    config |= {
        key: compiled[key]
        for key in ("compiler", "cuda", "cuda_architectures", "cuda_runtime", "cuda_driver")
    }
    if not compiled["cuda"]:
        config["why_not"] = "compiled without CUDA: no nvcc was found, or FLASHODE_CUDA=OFF"
    elif compiled["cuda_devices"] == 0:
        config["why_not"] = (
            f"CUDA kernels were compiled, but there is no usable GPU ({compiled['cuda_error']})"
        )
    elif not torch.cuda.is_available():
        config["why_not"] = "CUDA kernels were compiled and a GPU is there, but this torch is a CPU build"
    else:
        config["devices"] += [
            f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
        ]
    return config
