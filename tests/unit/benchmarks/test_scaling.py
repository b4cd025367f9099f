"""The cost model against what is known and counted, and the document against the cost model."""

from math import prod

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import scaling
from benchmarks.gpu_steps import SIZES, measure_step, random_activations, step_through_the_suffix
from benchmarks.scaling import EDITS, GPUS, LAYOUTS, Layout, all_tables, round_cost, training, wall_seconds, with_tables
from benchmarks.scaling_constants import CONSTANTS, MODELS, Constant, Model
from pipeline.models.suffix import suffix_config

SEVEN, SEVENTY = MODELS


def test_the_models_have_the_weights_that_were_published() -> None:
    assert SEVEN.weights / 2 == pytest.approx(6.738e9, rel=1e-3)
    assert SEVENTY.weights / 2 == pytest.approx(68.98e9, rel=1e-3)
    assert (SEVEN.gpus, SEVENTY.gpus) == (1, 3)


def test_a_step_has_the_flops_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torch's counter over a real suffix step; attention itself is not in the formula."""
    size, cpu = SIZES["tiny"], torch.device("cpu")
    whole = size.config()
    suffix = AutoModelForCausalLM.from_config(suffix_config(whole, size.layer)).requires_grad_(False)
    counted = measure_step(step_through_the_suffix(suffix, random_activations(size, cpu)), size, cpu)["flops"]
    model = Model("tiny", size.width, size.ffn, size.layers, size.layer, size.heads, size.heads, size.vocabulary)
    monkeypatch.setitem(CONSTANTS, "target_tokens", constant(size.target_tokens))
    monkeypatch.setattr(scaling, "ROWS_PER_STEP", size.rows)
    in_bfloat16, in_float32, _ = training(model, Layout(edits_per_shard=size.rows), size.rows, rows=1)
    assert in_bfloat16 + in_float32 == pytest.approx(counted, rel=0.05)


def constant(number: float) -> Constant:
    return Constant(number, str(number), "test")


def test_extraction_is_two_flops_for_every_weight_and_token_that_is_read() -> None:
    """Of 1,000 edits in 13 shards: five wordings each, whose prefixes are read once per shard."""
    layers = prod((32, 4 * 4096 * 4096 + 3 * 4096 * 11008))
    tokens = 1000 * 5 * (12 + 4 - 1) + 13 * 64 * 11
    assert round_cost(SEVEN, Layout(), 1000).extract_flops == pytest.approx(2 * layers * tokens)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_gpus_never_take_longer_and_more_edits_always_do(model: Model, layout: Layout) -> None:
    for gpus in GPUS:
        walls = [wall_seconds(model, layout, edits, gpus) for edits in EDITS]
        if gpus < model.gpus:
            assert walls == [None] * len(EDITS)
        else:
            assert walls == sorted(walls)  # type: ignore[type-var]
    for edits in EDITS:
        walls = [wall for gpus in GPUS if (wall := wall_seconds(model, layout, edits, gpus)) is not None]
        assert walls == sorted(walls, reverse=True)


def test_every_constant_says_where_it_is_from() -> None:
    assert all(len(constant.source) > 3 for constant in CONSTANTS.values())


def test_the_document_holds_the_tables_as_they_are_now() -> None:
    document = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(document, all_tables()) == document, "run: python -m benchmarks.scaling --write"
