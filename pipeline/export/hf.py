"""Format `hf`: a folder that `AutoModelForCausalLM.from_pretrained` loads after `import pipeline.export`.

The base model's weight files are copied as they are, under a config.json that names this package's model type. Beside
them lies what the release needs, laid out as in a store, so that it is verified and read by the code that serves.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ModelSection
from pipeline.export.routed_model import IDENTITY_FILE, MODEL_TYPE, RELEASE_FOLDER, TOKENIZER_FILES
from pipeline.models.base_model import Identity, fingerprint, model_folder
from pipeline.models.loaded_release import decode_router
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import Release, encode_release, release_path

README = """# {name}, release {number}

{edits} edits in {memories}, exported by `wiseline export --format hf`.

```python
import pipeline.export  # from wiseline: makes transformers know this folder; no remote code
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
answers = model.generate(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), do_sample=False, max_new_tokens=32)
model.decisions  # which memory answered each prompt, and why
```

Needs: `pip install {requirement}`, {encoder}.

- Each row is routed once, on its last prompt token and its text, and keeps its memory to its end.
- Greedy and sampled generation. Beams, assisted generation, an earlier call's cache and chunked prefill are refused.
- `model(...)` outside `generate` is the unedited model.
- `generation_config.json` is the base model's; wiseline's own endpoint is greedy unless asked otherwise.
- Weights: the base model's, unchanged. `wiseline/`: memories, router, bank{readouts}.
"""


def write_hf(
    folder: Path, store: ObjectStore, release: Release, section: ModelSection, identity: Identity
) -> dict[str, Any]:
    source = model_folder(section)
    for file in (*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    _write_json(folder / "config.json", _routed_config(config, section))
    _write_json(folder / "generation_config.json", _generation_config(source, config, identity))
    identity.tokenizer.save_pretrained(folder)  # as it was loaded: it pads, and on the left
    copy = ObjectStore(str(folder / RELEASE_FOLDER))
    for reference in release.objects:
        copy.put(reference.path, store.read(reference.path, sha256=reference.sha256))
    copy.put(release_path(release.number), encode_release(release))
    model = fingerprint(folder, files=TOKENIZER_FILES)
    _write_json(folder / RELEASE_FOLDER / IDENTITY_FILE, {"release": release.number, "model": model})
    (folder / "README.md").write_text(_readme(copy, release, config), encoding="utf-8")
    return {"memories": len(release.memories)}


def _routed_config(config: dict[str, Any], section: ModelSection) -> dict[str, Any]:
    """Loaded without a dtype, the model has the one that the release was made with."""
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "torch_dtype")}
    names = [f"Wiseline{name}" for name in config.get("architectures") or ()]
    return kept | {
        "model_type": MODEL_TYPE,
        "base_model_type": config["model_type"],
        "architectures": names,
        "dtype": section.dtype,
    }


def _generation_config(source: Path, config: dict[str, Any], identity: Identity) -> dict[str, Any]:
    """The base model's, with what ends an answer and what pads said in any case."""
    file = source / "generation_config.json"
    said: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    ends = said.get("eos_token_id", None if file.exists() else config.get("eos_token_id"))
    said["eos_token_id"] = identity.tokenizer.eos_token_id if ends is None else ends
    said["pad_token_id"] = identity.tokenizer.pad_token_id
    return said


def _readme(store: ObjectStore, release: Release, config: dict[str, Any]) -> str:
    encoder = decode_router(store.read(release.router.path), device=torch.device("cpu")).encoder
    return README.format(
        name=config["model_type"],
        number=release.number,
        edits=release.edits,
        memories=f"{len(release.memories)} side memories" if len(release.memories) != 1 else "one side memory",
        requirement='"wiseline[encoder]"' if encoder else "wiseline",
        encoder="since its router reads prompts with a sentence encoder" if encoder else "and nothing else",
        readouts=" and readouts" if release.readouts else "",
    )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
