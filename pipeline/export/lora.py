"""Format `lora`: every side memory as a PEFT adapter on W_v. Unrouted: where it is switched on, all text passes it.

ΔW, D × F, becomes B·A with A r × F and B D × r, by its singular values: r is the smallest rank at which
‖ΔW − B·A‖ / ‖ΔW‖ (Frobenius) stays within the tolerance (Eckart and Young, 1936). `lora_alpha` is r, so PEFT's factor
alpha / r is 1.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import ModelSection
from pipeline.errors import ConfigError
from pipeline.models.base_model import load_config, model_folder
from pipeline.models.value_matrix import value_path
from pipeline.storage.deltas import decode_memory
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import Release

# Measured: docs/export.md. Shares of both memories' edits together, at a tolerance of 0.01.
UNROUTED = (
    "These adapters are not routed: all text passes them. On the demo's release 1 % of the neighbours keep their "
    "answers (routed: all of them) and .87 of the paraphrases hold (routed: .998); --format hf keeps the router."
)
README = """# Release {number} as LoRA adapters

{lines}

{unrouted}

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "FOLDER/memory-0", adapter_name="memory-0")
```

Written by `wiseline export --format lora` for the base model with fingerprint {fingerprint}, layer {layer}.
"""


@dataclass(frozen=True)
class Adapter:
    """`error`: ‖ΔW − B·A‖ / ‖ΔW‖. `full_rank`: the rank that ΔW itself could have."""

    name: str
    rank: int
    full_rank: int
    error: float


def write_lora(
    folder: Path, store: ObjectStore, release: Release, section: ModelSection, *, tolerance: float
) -> dict[str, Any]:
    if not release.memories:
        raise ConfigError(f"Release {release.number} has no side memory, so there is no adapter to write.")
    config = load_config(model_folder(section))
    module = value_path(config, release.layer)
    adapters = []
    for index, reference in enumerate(release.memories):
        delta_DF = torch.tensor(decode_memory(store.read(reference.path, sha256=reference.sha256)).matrix)
        up_DR, down_RF, error = low_rank(delta_DF, tolerance=tolerance)
        adapter = Adapter(f"memory-{index}", down_RF.shape[0], min(delta_DF.shape), error)
        _write_adapter(
            folder / adapter.name,
            up_DR,
            down_RF,
            module=module,
            base=section.path,
            transposed=config.model_type == "gpt2",
        )
        adapters.append(adapter)
    lines = "\n".join(
        f"- `{one.name}`: rank {one.rank} of {one.full_rank}, error {one.error:.4f} of ‖ΔW‖" for one in adapters
    )
    readme = README.format(
        number=release.number,
        lines=lines,
        unrouted=UNROUTED,
        fingerprint=release.model_fingerprint,
        layer=release.layer,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return {"adapters": [asdict(adapter) for adapter in adapters]}


def low_rank(delta_DF: Tensor, *, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """B, A and the error they have. Rank 1 at least: PEFT knows no rank 0."""
    left_DK, values_K, right_KF = torch.linalg.svd(delta_DF.double(), full_matrices=False)
    lost_K = values_K.square().flip(0).cumsum(0).flip(0).sqrt()  # what remains when the k largest are kept, k = 0, 1, …
    errors = torch.cat([lost_K, lost_K.new_zeros(1)]) / lost_K[0].clamp(min=torch.finfo(torch.float64).tiny)
    rank = max(1, int((errors <= tolerance).nonzero()[0]))
    roots_R = values_K[:rank].sqrt()
    return (left_DK[:, :rank] * roots_R).float(), (roots_R[:, None] * right_KF[:rank]).float(), float(errors[rank])


def _write_adapter(folder: Path, up_DR: Tensor, down_RF: Tensor, *, module: str, base: str, transposed: bool) -> None:
    folder.mkdir()
    rank = down_RF.shape[0]
    # PEFT's names: the adapted model lies at base_model.model of the wrapper.
    name = f"base_model.model.{module}"
    weights = {f"{name}.lora_A.weight": down_RF.contiguous(), f"{name}.lora_B.weight": up_DR.contiguous()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": [module],  # the whole path, so that no other layer's matrix is meant
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,  # GPT-2's Conv1D
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
