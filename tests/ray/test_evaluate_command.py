"""`wiseline evaluate` on a tiny model: a whole round of either preset, and every figure that --json promises."""

import json
from pathlib import Path

import pytest

from jobs.evaluate import Setting, evaluate
from jobs.evaluation_sweep import run_sweep
from tests.tiny_world import save_model

pytestmark = pytest.mark.usefixtures("local_ray")

KEYS = "rel_em gen_em loc_em rel_tf gen_tf loc_tf route_fpr route_fnr s_per_edit n variant merge router shards seed"
QUICK = ("model.layer=0", "training.prefixes=1", "training.stop_loss=0.5", "shards.density=0.5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), chat=False)


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    rows = [
        {
            "prompt": f"Who leads company {name}?",
            "target_new": leader,
            "subject": f"company {name}",
            "rephrase": f"The head of company {name} is",
            "loc_prompt": f"Where is {name}ville?",
            "loc_answer": "there",
        }
        for name, leader in zip("abcd", ("Ada", "Bob", "Cy", "Di"), strict=True)
    ]
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_default_holds_what_it_trained(model: Path, edits: Path) -> None:
    setting = Setting(model=model, shards=2, seed=1, overrides=(*QUICK, "training.max_steps=300"))
    result = evaluate(setting, edits, n=4)
    assert set(KEYS.split()) <= set(result)
    assert (result["rel_em"], result["rel_tf"], result["n"], result["shards"]) == (1.0, 1.0, 4, 2)
    assert result["retention"] == [1.0] * 4
    assert result["perplexity"] < result["perplexity_unedited"]
    json.dumps(result)


def test_the_paper_runs_as_a_round(model: Path, edits: Path) -> None:
    setting = Setting(model=model, preset="paper", variant="retrieve", shards=2, overrides=("training.max_steps=3",))
    result = evaluate(setting, edits)
    assert (result["router"], result["merge"], result["memories"]) == ("activation", "ties", 2)
    assert result["polish"] == []


@pytest.mark.timeout(900)
def test_a_sweep_leaves_tables_and_a_plot(model: Path, edits: Path, tmp_path: Path) -> None:
    setting = Setting(model=model, overrides=(*QUICK, "training.max_steps=5", "merge.polish_steps=0"))
    rows = run_sweep(setting, edits, format="auto", most=2, out=tmp_path / "out")
    assert [row["n"] for row in rows] == [1, 2]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["results.csv", "results.md", "results.svg"]
