"""The config file: what a typo says, what wins, and what a digest stands for."""

from pathlib import Path

import pytest

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("shards.densty=1", "Unknown config key shards.densty; did you mean density?"),
        ("shrds.density=1", "Unknown config key shrds; did you mean shards?"),
        ("shards.density=.9", "2 disjoint masks of density 0.9 do not fit into one matrix"),
        ("training.seed=soon", r"Config training.seed: .*\(it is 'soon'\)"),
        ("model.layer=last", r"Config model.layer: .*\(it is 'last'\)"),
        ("router.signals=[]", "Config router.signals: "),
        ("merge.density=0", r"Config merge.density: .*\(it is 0\)"),
        ("shards", "does not read as section.key=value"),
        ("training.procedure=paper", "Config: training.procedure paper trains on whole prompts"),
        ("shards.density=[", "the value is not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(overrides=[override])


def test_the_override_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("shards:\n  density: 0.3\n  edits_per_shard: 7\nserve:\n")
    config = load_config(file, overrides=["shards.density=0.25"])
    assert (config.shards.density, config.shards.edits_per_shard, config.serve.port) == (0.25, 7, 8000)


@pytest.mark.parametrize("text", ["- a list", "shards: [", "shards: 3", "a: \xff"])
def test_a_broken_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no config file at"):
        load_config(tmp_path / "missing.yaml")


def test_the_repositorys_file_is_valid_and_says_what_the_defaults_say() -> None:
    """A newcomer reads ray_config.yaml, a program reads the defaults: they must not tell two stories."""
    assert load_config(REPOSITORY / "ray_config.yaml").model_dump(exclude={"model", "store"}) == Config().model_dump(
        exclude={"model", "store"}
    )


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = load_config(overrides=["model.path=model", "store.uri=store"])
    assert (config.model.path, config.store.uri) == (str(tmp_path / "model"), str(tmp_path / "store"))
    remote = load_config(overrides=["model.path=org/name", "store.uri=s3://bucket/prefix"])
    assert (remote.model.path, remote.store.uri) == ("org/name", "s3://bucket/prefix")


def test_a_digest_changes_with_its_sections_and_with_no_other() -> None:
    plain = load_config()
    assert load_config(overrides=["serve.port=1"]).digest("training") == plain.digest("training")
    assert load_config(overrides=["training.seed=1"]).digest("training") != plain.digest("training")


def test_rho_is_the_papers_unless_more_disjoint_shards_must_fit() -> None:
    def rho(*overrides: str) -> float:
        return load_config(overrides=[f"shards.{override}" for override in overrides]).shards.rho

    assert rho() == rho("shards_per_memory=5") == 0.2
    assert rho("shards_per_memory=8") == 1 / 8
    assert rho("shards_per_memory=8", "masks=overlapping") == 0.2
    assert rho("density=0.1") == 0.1


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().training.seed = 3  # type: ignore[misc]
