"""Where the base model's layers lie: one GPU, or several where it is too large for one. Without a GPU: the CPU.

Spread over several, accelerate moves what passes from layer to layer. So a hook on a whole layer may still see its
input on the device of the layer before; what lies inside a layer sees its own.
"""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from pipeline.errors import UnsupportedModel

SHARE_FOR_WEIGHTS = 0.8  # of each GPU; the rest is for activations, side memories and the keys and values of answers


def placement(wanted: Literal["auto", "one", "spread"]) -> dict[str, Any]:
    """Arguments of `from_pretrained`. A process sees the GPUs that Ray or CUDA_VISIBLE_DEVICES gave it.

    `auto` fills the first GPU before it takes the next, `spread` fills all of them evenly, `one` takes the first.
    Raises UnsupportedModel when the model is to be spread and accelerate is not installed.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    spreading = find_spec("accelerate") is not None
    if wanted == "spread" and not spreading:
        raise UnsupportedModel('model.placement spread needs accelerate; run: pip install "wiseline[multi-gpu]".')
    if gpus == 0:
        return {}
    if wanted == "one" or (wanted == "auto" and (gpus == 1 or not spreading)):
        return {"device_map": {"": 0}} if spreading else {}
    room = {gpu: int(SHARE_FOR_WEIGHTS * torch.cuda.mem_get_info(gpu)[0]) for gpu in range(gpus)}
    return {"device_map": "balanced" if wanted == "spread" else "sequential", "max_memory": room}


def execution_device(module: nn.Module) -> torch.device:
    """Where the module computes. Its weights may lie elsewhere until then, where accelerate keeps them on the host."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next(module.parameters()).device
