"""The bench measures both contestants on the same volume and writes what it says."""

import json

import pytest

from ldm_lib.bench import bench

FIGURES = {"encode_s", "decode_s", "peak_memory_gb"}


@pytest.mark.slow
def test_ratios_are_those_of_the_seconds_that_were_measured(tmp_path):
    said = []
    found = bench(tmp_path / "new" / "bench.json", shape=(32, 32, 32), say=said.append)
    ours, monai = (found["autoencoders"][name] for name in ("ours", "monai"))
    assert set(ours) == set(monai) == FIGURES and min(*ours.values(), *monai.values()) > 0
    ratio = (monai["encode_s"] + monai["decode_s"]) / (ours["encode_s"] + ours["decode_s"])
    assert found["ratios"] == {"encode_decode_speedup_vs_monai_fp32": pytest.approx(ratio)}
    assert json.loads((tmp_path / "new" / "bench.json").read_text())["ratios"] == found["ratios"]
    assert found["shape"] == [32, 32, 32] and f"{ratio:.2f}" in said[-1]
