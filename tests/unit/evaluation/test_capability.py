import sys

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.capability import capability
from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease


def test_without_the_harness_there_is_one_sentence(
    small_base: BaseModel, scrambling: LoadedRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'wiseline\[lm-eval\]'"):
        capability(small_base, scrambling, ["hellaswag"])
