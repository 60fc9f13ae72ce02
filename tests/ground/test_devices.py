"""Where networks run: what is asked for is there, or refused."""

import pytest
import torch

from ldm_lib.devices import autocast, pick_device, pick_precision, processor_name
from ldm_lib.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_what_is_there(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto") == (CUDA if there else CPU)
    assert pick_device("cpu") == CPU


def test_an_absent_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device is visible"):
        pick_device("cuda")


def test_precision_is_what_was_asked_for():
    assert [pick_precision(p, CUDA) for p in ("32", "bf16", "16")] == ["32", "bf16", "16"]
    assert [pick_precision(p, CPU) for p in ("32", "bf16")] == ["32", "bf16"]


def test_half_precision_on_a_cpu_is_refused():
    """Lightning would take bfloat16 instead, and sampling float16."""
    with pytest.raises(ConfigError, match="precision = '16' on a CPU"):
        pick_precision("16", CPU)


@pytest.mark.parametrize(("amx", "bf16", "chosen"), [
    (True, False, "bf16"), (False, True, "bf16"), (False, False, "32"),
])  # fmt: skip
def test_auto_precision_asks_the_processor(monkeypatch, amx, bf16, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    assert pick_precision("auto", CPU) == chosen


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16"), (False, "16")])
def test_auto_precision_asks_the_gpu(monkeypatch, supported, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert pick_precision("auto", CUDA) == chosen


def test_auto_precision_knows_processors_of_other_makers(monkeypatch):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert pick_precision("auto", CPU) == "32"


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_changes_products_and_no_more(precision, dtype):
    a = torch.ones(2, 2)
    with autocast(CPU, precision):
        assert (a @ a).dtype == dtype
        assert (a + a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32


def test_the_processor_has_a_name(monkeypatch):
    assert processor_name(CPU).strip()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert processor_name(CUDA) == "a GPU"
