"""The GPU benchmark runs whole at a tiny size, and says that it was skipped where there is no GPU."""

import json

import pytest
import torch

from benchmarks.gpu_7b import main


def test_all_of_it_runs_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--size", "tiny", "--trainers", "2", "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["suffix"]["flops"] < figures["full"]["flops"]
    assert figures["suffix"]["weights_gib"] < figures["full"]["weights_gib"]
    assert [one["trainers"] for one in figures["trainers"]] == [2]
    rows = [(one["batch"], one["routed"]) for one in figures["decode"]]
    assert rows == [(batch, routed) for batch in (1, 2) for routed in ("no", "matched", "own")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would not be skipped")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out == "Skipped: benchmarks.gpu_7b needs a GPU, and there is none here.\n"
    main(["--json"])
    assert "skipped" in json.loads(capsys.readouterr().out)
