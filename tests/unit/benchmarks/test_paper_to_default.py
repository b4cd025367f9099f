"""Each change of the table is one that a round accepts, and the last one is the default."""

from pathlib import Path

from benchmarks.paper_to_default import CHANGES, default_of
from jobs.evaluate import Setting, settled
from pipeline.config import Config

DEMO = Path(__file__).parents[3] / "demo" / "model"
# Its procedure alone reads them, or they are no matter of method.
OWN_TO_THE_PAPER = {"margins", "clamp", "prefix_tokens", "seed"}


def test_the_changes_lead_from_the_preset_to_the_default(tmp_path: Path) -> None:
    changed: list[str] = []
    configs: list[Config] = []
    for keys in CHANGES.values():
        changed += [key if "=" in key else default_of(key) for key in keys]
        setting = Setting(model=DEMO, preset="paper", shards=4, overrides=tuple(changed))
        configs.append(settled(setting, edits=200, store=tmp_path))
    assert configs[0].training.procedure == "paper"
    default = settled(Setting(model=DEMO, shards=4), edits=200, store=tmp_path)
    assert configs[-1].training.model_dump(exclude=OWN_TO_THE_PAPER) == default.training.model_dump(
        exclude=OWN_TO_THE_PAPER
    )
    for section in ("shards", "merge", "router"):
        assert getattr(configs[-1], section) == getattr(default, section), section
    assert len({config.digest("training", "shards", "merge", "router") for config in configs}) == len(CHANGES)
