"""The benchmark of a sharded vocabulary, on sizes that take no time."""

import json

import pytest

from benchmarks import distributed

torch_distributed = pytest.importorskip("torch.distributed")


@pytest.mark.slow
def test_rows_and_what_is_sent(tmp_path, monkeypatch, capsys):
    if not torch_distributed.is_available() or not torch_distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(
        "sys.argv", ["", "--shape", "64x301x24x16", "--rounds", "2", "--dtype", "fp32", "--output", str(output)]
    )
    distributed.main()
    (row,) = map(json.loads, output.read_text().splitlines())
    methods = row["methods"]
    assert list(methods) == [distributed.OURS, distributed.PRODUCTS, distributed.PARALLEL]
    assert all(one["step_seconds"] > 0 for one in methods.values())
    # that all make the same call; three fields and the target of each row; hidden states' gradient
    assert methods[distributed.OURS]["collectives"] == 3
    assert methods[distributed.OURS]["sent_bytes"] == 416 + 4 * (4 * 64 + 3) + 4 * 64 * 16
    assert "64 x 301 (24 + 16) fp32, 2 processes" in capsys.readouterr().out
