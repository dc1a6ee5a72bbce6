"""What a result was computed with: versions, device, threads; no times, no machine's name."""

import platform
from importlib import metadata

import torch

from rag2 import __version__


def environment() -> dict[str, str | int]:
    """The environment block of results.json."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: metadata.version(name) for name in ("transformers", "numpy", "bm25s")}
    return {
        "rag2": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        **versions,
        "device": device,
        "threads": torch.get_num_threads(),
    }
