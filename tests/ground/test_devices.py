"""Devices and precisions: what was requested is used, or rejected."""

import pytest
import torch

from ldm_lib import devices
from ldm_lib.devices import autocast, pick_device, pick_precision
from ldm_lib.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("available", [True, False])
def test_auto_takes_a_gpu_if_there_is_one(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto") == (CUDA if available else CPU)
    assert pick_device("cpu") == CPU


def test_an_absent_gpu_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device is visible"):
        pick_device("cuda")


def test_a_requested_precision_is_used():
    assert [pick_precision(p, CUDA) for p in ("32", "bf16", "16")] == ["32", "bf16", "16"]
    assert [pick_precision(p, CPU) for p in ("32", "bf16")] == ["32", "bf16"]


def test_half_precision_on_a_cpu_is_rejected():
    """Lightning would take bfloat16 instead, and sampling float16."""
    with pytest.raises(ConfigError, match="precision = '16' on a CPU"):
        pick_precision("16", CPU)


@pytest.mark.parametrize("given", ["fp16", 32, "", None])
def test_an_unknown_precision_is_rejected(given):
    line = rf"^precision = {given!r}: allowed: auto, 32, bf16, 16, each as text\. Fix: set precision to one of them\.$"
    with pytest.raises(ConfigError, match=line):
        pick_precision(given, CPU)


@pytest.mark.parametrize("supported", [True, False])
def test_auto_precision_on_a_cpu_is_32_whatever_the_processor_supports(monkeypatch, supported):
    """One seed gives one result on every processor, up to rounding."""
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: supported, raising=False)
    assert pick_precision("auto", CPU) == "32"


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16"), (False, "16")])
def test_auto_precision_on_a_gpu_is_bf16_where_supported(monkeypatch, supported, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert pick_precision("auto", CUDA) == chosen


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_changes_products_only(precision, dtype):
    a = torch.ones(2, 2)
    with autocast(CPU, precision):
        assert (a @ a).dtype == dtype
        assert (a + a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(("wrong", "error"), [(1.0, 0.0), (1.01, 0.01), (float("nan"), float("inf"))])
def test_the_probe_compares_gradients_in_bf16_with_those_in_float32(monkeypatch, wrong, error):
    exact = torch.arange(-4.0, 5.0)
    monkeypatch.setattr(devices, "_weight_gradient", lambda x, w, device, p: exact * (wrong if p == "bf16" else 1))
    found, speed = devices.probe_bf16(CPU)
    assert found == pytest.approx(error, abs=1e-6) and speed > 0


def test_the_probe_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    devices.probe_bf16(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_in_bf16_is_refused_where_its_gradients_are_wrong(monkeypatch):
    monkeypatch.setattr(devices, "probe_bf16", lambda device: (float("inf"), 2.0))
    devices.require_trainable("32", CPU)
    devices.require_trainable("bf16", CUDA)
    with pytest.raises(
        ConfigError, match=r"computes wrong gradients .* \(off by inf of the largest\).* precision to 32"
    ):
        devices.require_trainable("bf16", CPU)
    monkeypatch.setattr(devices, "probe_bf16", lambda device: (0.01, 2.0))
    devices.require_trainable("bf16", CPU)
