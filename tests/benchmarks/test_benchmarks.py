"""The benchmarks measure all contestants on the same volumes, latents and batches, and write the ratios."""

import json

import pytest
import torch

from benchmarks import case as one_case
from benchmarks import gpu, training
from benchmarks.__main__ import bench, main
from benchmarks.case import PARTS
from benchmarks.command import IN_ORDER, bench_command
from benchmarks.reference_models import ddim_steps, standard_denoiser
from benchmarks.timed_command import Stopwatch
from benchmarks.training import PlainLoop, random_latents
from ldm_lib.diffusion.latents import collate
from ldm_lib.diffusion.schedule import noise_schedule
from ldm_lib.diffusion.unet import count_flops, count_parameters
from ldm_lib.errors import RunError
from ldm_lib.experiment.presets import resolve
from ldm_lib.training.initialise import build_denoiser
from ldm_lib.training.step import Trainer

CPU = torch.device("cpu")
SMALL = {"base_width": 32, "blocks_per_level": 1, "precision": "32"}
TINY = {"shape": (40, 32, 24), "spacing_mm": 8.0, "changes": SMALL}
CODED = {"encode_s", "decode_s", "peak_memory_gb"}
STEPPED = {"s", "least_s", "most_s", "steps", "parameters", "precision"}


@pytest.fixture
def shortened(monkeypatch):
    monkeypatch.setattr(training, "ROUNDS", (3, 3))
    command = {"command": {"cold": {"total": 4.0}}, "ratios": {"command_cold_over_again": 2.0}}
    monkeypatch.setattr("benchmarks.__main__.bench_command", lambda files, *, spacing_mm: command)
    monkeypatch.setattr(one_case, "_run_in_process", lambda request: one_case.CONTESTANTS[request["who"]](request))


def config(**changes):
    return resolve("full", {"base_width": 32, "blocks_per_level": 1, "batch_size": 2} | changes)["04_training"]


def test_ratios_are_those_of_the_seconds_that_were_measured(tmp_path, shortened, capsys):
    found = bench(tmp_path / "new" / "bench.json", **TINY)
    coders, steps = found["autoencoders"], found["training"]
    assert set(coders["ours"]) == set(coders["monai"]) == CODED
    assert min(*coders["ours"].values(), *coders["monai"].values()) > 0
    coding = {name: row["encode_s"] + row["decode_s"] for name, row in coders.items()}
    case, memory = found["case"], {name: row["peak_memory_gb"] for name, row in found["case"].items()}
    s = {name: row["s"] for name, row in steps.items()}
    encoded = s["plain_loop"] + 2 * found["batch_size"] * coders["monai"]["encode_s"]
    ours = steps["ours"]
    assert found["ratios"] == pytest.approx({
        "command_cold_over_again": 2.0,
        "encode_decode_speedup_vs_monai_fp32": coding["monai"] / coding["ours"],
        "case_speedup_vs_common_stack": case["common_stack"]["total_s"] / case["ours"]["total_s"],
        "case_memory_reduction_vs_common_stack": memory["common_stack"] / memory["ours"],
        "train_step_speedup_vs_plain_loop": s["plain_loop"] / s["ours"],
        "train_step_speedup_vs_encode_every_step": encoded / s["ours"],
    })  # fmt: skip
    assert set(ours) == set(steps["plain_loop"]) == STEPPED
    for row in (ours, steps["plain_loop"]):
        assert row["steps"] == 3 and 0 < row["least_s"] <= row["s"] <= row["most_s"]
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written == json.loads(json.dumps(found)) and found["shape"] == [40, 32, 24] and found["grid"] == [5, 4, 3]
    for row in case.values():
        assert row["total_s"] == pytest.approx(sum(row[part] for part in PARTS)) and min(row[p] for p in PARTS) > 0
        assert row["total_with_load_s"] == pytest.approx(row["total_s"] + row["load_s"])
    assert case["common_stack"]["extrapolated"] and case["common_stack"]["steps_run"] == 3 < case["ours"]["steps"]
    assert found["hole"]["box"] == found["hole"]["grid"] == [4, 4, 3] and found["hole"]["ml"] > 0
    assert set(found["seconds"]) == {"command", "case", "training"} and "versions" in found["made_with"]
    assert found["processor"] and found["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert all(f"{name} {value:.2f}" in printed for name, value in found["ratios"].items())


@pytest.mark.slow
def test_one_part_alone_measures_what_it_needs_of_the_other(tmp_path, shortened):
    found = bench(tmp_path / "bench.json", only="training", **TINY)
    assert "autoencoders" not in found and set(found["seconds"]) == {"training"}
    assert {name.split("_")[0] for name in found["ratios"]} == {"train"}
    assert found["training"]["encode_every_step"]["sum_of"]["encode_s"] > 0


def test_the_command_line_names_part_and_file(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("benchmarks.__main__.bench", lambda output, **given: calls.append((output, *given.values())))
    assert main([]) == main(["--only", "case", "--full", "--output", str(tmp_path / "b.json")]) == 0
    assert main(["--only", "command", "--t1n-voided", "v.nii.gz", "--mask", "m.nii.gz"]) == 0
    assert calls[0][0].parts[-2:] == ("bench", "bench.json") and calls[0][1:] == (None, False, None)
    assert calls[1] == (tmp_path / "b.json", "case", True, None) and calls[2][3] == ("v.nii.gz", "m.nii.gz")
    with pytest.raises(SystemExit, match="2"):
        main(["--mask", "m.nii.gz"])


def test_parts_add_up_to_the_whole_and_an_inner_one_counts_once(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("benchmarks.timed_command.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.part("outer"):
        for _ in range(2):
            with watch.part("inner"):
                pass
    assert watch.seconds == {"other": 1, "outer": 3, "inner": 2}


@pytest.mark.slow
def test_the_command_is_measured_from_start_to_exit(monkeypatch):
    monkeypatch.setattr("benchmarks.command.CASES", 1)
    rows = bench_command(spacing_mm=8.0)["command"]
    for name in ("cold", "again"):
        assert [*rows[name]] == [*IN_ORDER, "total"] and min(rows[name].values()) > 0
        assert rows[name]["total"] == pytest.approx(sum(rows[name][part] for part in IN_ORDER))
    assert rows["again"]["registration"] < 0.5 * rows["cold"]["registration"]


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_of_the_common_stack_ends_at_the_ground_truth_if_the_network_knows_it(steps):
    schedule, draw = noise_schedule(), torch.Generator().manual_seed(0)
    truth, voided = (torch.randn(1, 2, 6, 6, 6, generator=draw) for _ in range(2))
    mask = torch.zeros(1, 1, 6, 6, 6)
    mask[..., 2:5, 2:5, 2:5] = 1

    def knows(x, t):
        assert torch.equal(x[:, :2] * (1 - mask), voided * (1 - mask)) and x.shape[1] == 2 + 4 + 1
        alpha, sigma = schedule.alpha_sigma(t, x)
        return ((x[:, :2] - alpha * truth) / sigma).float()

    filled = ddim_steps(knows, voided, torch.zeros(1, 4, 6, 6, 6), mask, schedule, steps=steps)
    assert torch.equal(filled * (1 - mask), voided * (1 - mask))
    assert (filled - truth).mul(mask).abs().max() < 1e-2


def test_a_contestant_that_dies_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(one_case.sys, "executable", "/bin/false")
    with pytest.raises(
        RunError, match=r"bench, ours: its process ended without a result \(status 1\).*Fix: free memory"
    ):
        one_case.bench_case(8.0, changes=SMALL)


@pytest.mark.slow
def test_each_contestant_has_a_process_and_a_peak_of_its_own():
    held = torch.ones(500_000_000)  # 2 GB of this process, which no result may contain
    found = one_case.bench_case(8.0, changes=SMALL)
    peaks = [row["peak_memory_gb"] for row in found["case"].values()]
    assert held.all() and min(peaks) > 0.2 and max(peaks) < 1.5


def test_steps_are_taken_in_turn_on_the_same_batches(tmp_path, shortened, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "advance", lambda self, batches: seen.append(("ours", *batches)))
    monkeypatch.setattr(PlainLoop, "advance", lambda self, batch: seen.append(("plain", batch)))
    bench(tmp_path / "bench.json", only="training", **TINY)
    assert [name for name, _ in seen] == ["ours", "plain"] * 4
    assert all(mine is theirs for (_, mine), (_, theirs) in zip(seen[::2], seen[1::2], strict=True))
    assert seen[2][1] is not seen[4][1]


def test_both_have_as_many_parameters_and_flops_at_full_size():
    with torch.device("meta"):
        ours = build_denoiser(resolve("full")["04_training"], in_channels=11, out_channels=6)
        plain = standard_denoiser(ours)
        x, t = torch.empty(1, 11, 32, 32, 20), torch.zeros(1)
    assert count_parameters(plain) == pytest.approx(count_parameters(ours), rel=0.02)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        plain(x, t)
    assert counter.get_total_flops() == pytest.approx(count_flops(ours, (30, 30, 20)), rel=1e-3)


@pytest.mark.slow
def test_the_plain_loop_overfits_a_batch():
    torch.manual_seed(0)
    settings = config(learning_rate=1e-3)
    network = standard_denoiser(build_denoiser(settings, in_channels=11, out_channels=6))
    loop = PlainLoop(network, noise_schedule(**settings.process), settings)
    cases = [random_latents((5, 4, 3), 6, seed) | {"t": torch.tensor(t)} for seed, t in enumerate((400, 900))]
    batch = collate([case | {"noise": torch.randn(6, 5, 4, 3)} for case in cases])
    losses = [loop.advance(batch) for _ in range(25)]
    assert losses[0] == pytest.approx(1, abs=0.2), "of a prediction that is zero"
    assert losses[-1] < 0.6 * losses[0]
    moved = [not torch.equal(a, b) for a, b in zip(loop.average.parameters(), network.parameters(), strict=True)]
    assert any(moved)


@pytest.mark.parametrize("parts", [("levels", "training_step", "compiled"), pytest.param((), marks=pytest.mark.slow)])
def test_the_script_for_a_gpu_keeps_what_it_measured(tmp_path, monkeypatch, parts):
    """At a tiny size, on any machine; a part that fails does not stop the others."""

    def fails(size, device):
        raise torch.OutOfMemoryError("full\nmore")

    kept = {
        name: measure for name, measure in gpu.PARTS.items() if not parts or name in ("matrix_product_tflops", *parts)
    }
    monkeypatch.setattr(gpu, "PARTS", {"fails": fails} | kept)
    assert gpu.main(["--tiny", "--output", str(tmp_path / "new" / "gpu.json")]) == 1
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert found.pop("fails") == {"failed": "OutOfMemoryError: full"} and set(found["seconds"]) == {"fails", *kept}
    assert not [name for name in kept if "failed" in found[name]]
    assert [row["width"] for row in found["levels"]] == [32, 64, 128]
    best = found["matrix_product_tflops"][found["precision"]]
    for row in found["levels"] + found["training_step"]:
        assert row["share"] == pytest.approx(row["tflops"] / best) and row["tflops"] > 0
    if not parts:
        first, again = found["pretrained_case"]["first"], found["pretrained_case"]["again"]
        assert again["map_s"] < 0.5 * first["map_s"] and found["bf16"]["forward_error"] < 0.1
