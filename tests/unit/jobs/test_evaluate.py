"""What `wiseline evaluate` runs: how its options become a config, and how a sweep is laid out."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from jobs.evaluate import Setting, settled
from jobs.evaluation_sweep import data_sets, markdown, steps
from pipeline.errors import ConfigError, NotFound
from pipeline.evaluation.sweep_plot import sweep_plot

DEMO = Path(__file__).parents[3] / "demo" / "model"


def config(tmp_path: Path, *, edits: int = 200, **options: Any) -> Any:
    return settled(Setting(model=DEMO, **options), edits=edits, store=tmp_path)


@pytest.mark.parametrize(
    ("options", "per_shard", "per_memory"),
    [
        ({"shards": 4}, 50, 4),
        ({"shards": 4, "variant": "retrieve"}, 50, 1),
        ({}, 67, 3),
        ({"variant": "retrieve"}, 80, 2),
        ({"shards": 900}, 1, 200),
        ({"shards": 3, "overrides": ("shards.edits_per_shard=7",)}, 7, 3),
    ],
)
def test_shards_are_laid_out_by_variant(
    tmp_path: Path, options: dict[str, Any], per_shard: int, per_memory: int
) -> None:
    shards = config(tmp_path, **options).shards
    assert (shards.edits_per_shard, shards.shards_per_memory) == (per_shard, per_memory)


def test_the_gate_is_open_and_all_edits_are_asked(tmp_path: Path) -> None:
    chosen = config(tmp_path, edits=1234)
    assert chosen.round.min_reliability == chosen.round.min_generalization == chosen.round.min_locality == 0
    assert chosen.round.evaluate_edits == 1234


def test_options_stand_over_the_preset_and_set_over_both(tmp_path: Path) -> None:
    paper = config(tmp_path, preset="paper", merge="dare-ties", overrides=("training.max_steps=3",))
    assert (paper.training.procedure, paper.merge.method, paper.training.max_steps) == ("paper", "dare_ties", 3)
    assert paper.router.method == "activation"


def test_the_papers_margin_is_kept_on_texts_the_edits_bring(tmp_path: Path) -> None:
    setting = Setting(model=DEMO, preset="paper")
    chosen = settled(setting, edits=2, store=tmp_path, out_of_scope=['Who "is" it? 🙂', "b: c"])
    assert chosen.training.unrelated_prompts == ('Who "is" it? 🙂', "b: c")


def test_a_preset_takes_what_suits_it_and_activation_brings_its_addressing(tmp_path: Path) -> None:
    dense = config(tmp_path, preset="paper", overrides=("router.method=activation", "shards.density=0.6"))
    assert (dense.shards.rho, dense.shards.masks) == (0.6, "overlapping")
    assert config(tmp_path, router="activation").router.addressing == "own"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"variant": "both"}, "--variant 'both' is unknown"),
        ({"preset": "papre"}, "There is no preset 'papre'"),
        ({"merge": "tise"}, r"merge\.method"),
        ({"router": "magic"}, r"router\.method"),
    ],
)
def test_what_is_unknown_is_a_sentence(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(tmp_path, **options)


def test_a_sweep_ends_with_all_there_is() -> None:
    assert steps(5000, most=None) == [1, 10, 100, 1000]
    assert steps(600, most=None) == [1, 10, 100, 600]
    assert steps(600, most=50) == [1, 10, 50]
    assert steps(1, most=None) == [1]


def test_a_folder_of_data_sets(tmp_path: Path) -> None:
    for name in ("b/x-edit.json", "a/y_edit.json", "a/z-train.json", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [file.name for file in data_sets(tmp_path)] == ["y_edit.json", "x-edit.json", "c.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="no files of edits"):
        data_sets(tmp_path / "empty")


def test_tables_leave_out_what_nobody_measured_and_plots_are_svg() -> None:
    rows = [
        {"data": "a&b", "n": 1, "variant": "merge", "rel_em": 1.0, "gen_em": None, "loc_em": 0.5},
        {"data": "a&b", "n": 100, "variant": "merge", "rel_em": 0.25, "gen_em": None, "loc_em": 1.0},
    ]
    table = markdown(rows)
    assert "generalization" not in table
    assert table.splitlines()[2] == "| a&b | 1 | merge | 1.000 | 0.500 |"
    drawing = ElementTree.fromstring(sweep_plot(rows))
    assert "a&b" in [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
