"""Models and constants of benchmarks/scaling.py. A constant that nobody measured begins with "assumed"."""

import math
from dataclasses import dataclass

BYTES_F32, BYTES_HALF = 4, 2
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """Of the Llama kind: gated FFN, untied head. `layer`: the paper's depth, 27 of 32."""

    name: str
    D: int
    F: int
    layers: int
    layer: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000

    @property
    def matrix(self) -> int:
        return self.D * self.F

    @property
    def kv(self) -> int:
        """Width of a layer's keys, and of its values."""
        return self.D // self.heads * self.kv_heads

    @property
    def per_layer(self) -> int:
        return 2 * self.D**2 + 2 * self.D * self.kv + 3 * self.matrix

    @property
    def above(self) -> int:
        """Layers of the suffix."""
        return self.layers - self.layer - 1

    @property
    def suffix(self) -> int:
        """Weights of the layers above L and of the head."""
        return self.above * self.per_layer + self.vocabulary * self.D

    @property
    def body(self) -> int:
        """Weights of all layers: what extraction runs."""
        return self.layers * self.per_layer

    @property
    def weights(self) -> int:
        """Bytes in bfloat16."""
        return (self.body + 2 * self.vocabulary * self.D) * BYTES_HALF

    @property
    def gpus(self) -> int:
        """GPUs that hold the whole model, with a fifth of each left free (pipeline/models/placement.py)."""
        return math.ceil(self.weights / (0.8 * value("gpu_memory")))


@dataclass(frozen=True)
class Constant:
    value: float
    shown: str
    source: str


STEPS_MEASURED = (
    "two shared cores, 2026-11-20: 200 CounterFact edits in 4 shards on a 256 x 688 matrix, λ .1 (docs/experiments.md)"
)
DATA_SHEET = "data sheet of the H100 SXM, dense"
GPU_BENCH = "until `python -m benchmarks.gpu_7b` has run on the GPU in question"

CONSTANTS: dict[str, Constant] = {
    "wordings": Constant(5, "5", "config: bare and `training.prefixes` 4; a chat template adds one"),
    "prompt_tokens": Constant(21, "21", "assumed: 12 bare, 10 and a blank in a prefix; mean over the wordings"),
    "own_prompt_tokens": Constant(12, "12", "assumed, as above: what a wording does not share with others"),
    "prefix_tokens": Constant(
        64 * 11, "704", "read once per shard: 64 texts (pipeline/training/contexts.py) of `training.prefix_tokens` 10"
    ),
    "target_tokens": Constant(4, "4", "assumed: 3 and the end of sequence"),
    "rows_per_edit": Constant(
        39 * 64 / 50, "50", f"39 steps (mean of 26, 43, 49, 37) of 64 rows for 50 edits: {STEPS_MEASURED}"
    ),
    "polish_rows_per_edit": Constant(
        7 * 64 / 200, "2.2", f"keyed, 7 steps of 64 rows for 200 edits: {STEPS_MEASURED}; Ties takes 6 times as many"
    ),
    "bfloat16": Constant(989e12, "989 TFLOP/s", DATA_SHEET),
    "float32": Constant(40e12, "40 TFLOP/s", f"assumed: 60 % of the 67 of the data sheet, {GPU_BENCH}"),
    "bandwidth": Constant(3.0e12, "3.0 TB/s", f"assumed: 90 % of the 3.35 of the data sheet, {GPU_BENCH}"),
    "extract_share": Constant(0.35, "35 %", f"assumed share of the peak that extraction reaches, {GPU_BENCH}"),
    "train_share": Constant(0.25, "25 %", f"assumed share of the peak that suffix steps reach, {GPU_BENCH}"),
    "passes": Constant(27, "27", "reads and writes of D x F float32 in a step, counted in pipeline/training/fit.py"),
    "decode_step": Constant(0.03, "30 ms", f"assumed: a step of a batch of answers, {GPU_BENCH}"),
    "host_to_device": Constant(10e9, "10 GB/s", f"assumed: pageable host memory over PCIe, {GPU_BENCH}"),
    "load_rate": Constant(2e9, "2 GB/s", f"assumed: safetensors from a local disk, {GPU_BENCH}"),
    "gpu_memory": Constant(80e9, "80 GB", DATA_SHEET),
    "merge_seconds": Constant(
        23.4,
        "23.4 s",
        "processor time of one core (AMD EPYC, two cores, shared, 2026-11-20): `merge_memory` on the shards of "
        "`python -m benchmarks.merge --method keyed --density auto --threads 1`, 8 of 4096 x 11008 with 256 keys each",
    ),
    "evaluated_edits": Constant(1000, "1,000", "config: `round.evaluate_edits`"),
    "questions_per_edit": Constant(4, "4", "assumed: prompt, chat, a paraphrase, a locality prompt"),
    "answer_tokens": Constant(8, "8", "assumed"),
    "bank_entry": Constant(300, "300 B", "assumed: prompt, target and subject as text"),
    "price": Constant(2.5, "$2.50 an hour", "assumed: one H100; prices differ by a factor of three"),
}


def value(name: str) -> float:
    return CONSTANTS[name].value


def constants() -> list[tuple[str, str, str]]:
    return [(name.replace("_", " "), one.shown, one.source) for name, one in CONSTANTS.items()]


MODELS = (
    Model("Llama-2-7B", D=4096, F=11_008, layers=32, layer=27, heads=32, kv_heads=32),
    Model("Llama-2-70B", D=8192, F=28_672, layers=80, layer=69, heads=64, kv_heads=8),
)
