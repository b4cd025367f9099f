from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.serving.declared import EndpointArguments, endpoint


@pytest.mark.parametrize("said", ["serve: {host: 0.0.0.0}", "serve: {gpus_per_replica: auto}"])
def test_what_would_go_wrong_later_is_refused_at_once(tmp_path: Path, said: str) -> None:
    (tmp_path / "config.yaml").write_text(said)
    with pytest.raises(ConfigError):
        endpoint(EndpointArguments(config=tmp_path / "config.yaml"))
