"""Define the presets, with which the same code runs in minutes or in days, and resolve the parameters of a run."""

from collections.abc import Mapping
from typing import Any

from ldm_lib.diffusion.options import FLOW_SAMPLERS
from ldm_lib.errors import ConfigError
from ldm_lib.experiment.stages import STAGES, StageConfig
from ldm_lib.options import nearest

# The pretrained weights: a linear codec with 16 latent channels per latent voxel of 8 mm; the denoiser corrects an
# initial estimate.
PRETRAINED_MODEL: dict[str, Any] = {
    "spacing_mm": 1.0, "domain_randomisation": "wide", "tissue_map": "registered", "workers": 2,
    "channels": "8,8,8,8", "latent_channels": 16, "learned": "none", "min_gain_over_pca": 0.0,
    "context": "initial_estimate", "contralateral": True, "bias_field_correction": True, "mask_dilation": 0,
    "training_tissue": "given", "base_width": 48, "multipliers": "1,2,2", "schedule": "cosine", "latent_crop": 12,
    "cache_variants": 1, "latent_flip_probability": 0.5,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "synthetic_patients": 5, "spacing_mm": 6.0, "masks_per_patient": 1, "channels": "8,8,16",
        "autoencoder_steps": 60, "crop": 24, "min_reconstruction_psnr": 10.0, "check_cases": 1,
        "base_width": 16, "multipliers": "1,2,2", "attention_rates": "4", "max_epochs": 2, "val_every": 1,
        "val_cases": 1, "num_inference_steps": 4, "save_samples_every": 1, "cache_variants": 1, "warmup_steps": 5,
        "samples": 2, "max_cases": 1, "show_cases": 1, "fidelity_cases": 1, "guidance_scales": "0,1,2",
        "counterfactual_days": "0,200", "compare_cases": 1, "compare_steps": "2,4", "log_every": 1,
        "checkpoint_every": 2, "wandb_mode": "off", "use_mlflow": False,
    },
    "demo": PRETRAINED_MODEL | {
        "pretrained": True, "synthetic_patients": 4, "masks_per_patient": 1, "validation_fraction": 0.34,
        "max_brains": 4, "check_cases": 2, "learning_rate": 2e-5, "batch_size": 4, "max_epochs": 50, "val_every": 25,
        "val_cases": 1, "save_samples_every": 25, "max_cases": 2, "compare_cases": 1, "compare_steps": "4,8",
        "fidelity_cases": 1, "guidance_scales": "1,2", "counterfactual_days": "0,120", "show_cases": 2,
    },
    "coarse": {},
    "full": {
        "synthetic_patients": 100, "synthetic_first": 0, "spacing_mm": 1.0, "input_transform": "haar",
        "channels": "128,256", "blocks": 2, "learned": "both", "autoencoder_steps": 20000,
        "autoencoder_batch_size": 2, "autoencoder_learning_rate": 1e-4, "crop": 96, "final_crop": 160,
        "check_cases": 20, "learning_rate": 1e-4, "warmup_steps": 500, "max_epochs": 100, "val_every": 5,
        "ema_decay": 0.9999, "val_cases": 8, "latent_crop": 16, "num_inference_steps": 50, "base_width": 128,
        "blocks_per_level": 2, "cache_variants": 4, "max_cases": 0, "fidelity_cases": 20, "keep_weights": "best",
        "checkpoint_every": 500, "compare_cases": 8, "compare_steps": "4,8,10,20,50,250",
    },
    "weights": PRETRAINED_MODEL | {
        "synthetic_patients": 240, "synthetic_first": 0, "validation_fraction": 0.05, "check_cases": 12,
        "max_cases": 12,
        "batch_size": 32, "num_workers": 2, "learning_rate": 5e-4, "warmup_steps": 500, "ema_decay": 0.9995,
        "checkpoint_every": 500, "log_every": 50, "max_epochs": 400, "val_every": 20, "val_cases": 6,
        "save_samples_every": 0, "patience": 400,
    },
    "people": PRETRAINED_MODEL | {
        "pretrained": True, "masks_per_patient": 4, "validation_fraction": 0.2, "check_cases": 12, "max_cases": 12,
        "fresh_samples": True, "cache_variants": 20, "early_crop": 8, "learning_rate_schedule": "cosine",
        "noisiest_fraction": 0.3, "batch_size": 32, "num_workers": 2, "learning_rate": 4e-4, "warmup_steps": 100,
        "ema_decay": 0.998, "checkpoint_every": 200, "log_every": 20, "max_epochs": 600, "val_every": 20,
        "val_cases": 12, "save_samples_every": 0, "patience": 600,
    },
}  # fmt: skip
DEFAULT_PRESET = "demo"
ALL_PARAMETERS = "see `ldm params 01` to `ldm params 06`"


def require_fit(configs: Mapping[str, Any]) -> None:
    """Require, before anything is trained, that the sampler of stage 05 supports the schedule of stage 04."""
    schedule, sampler = configs["04_training"].schedule, configs["05_sampling"].sampler
    is_flow = schedule == "flow"
    if FLOW_SAMPLERS.get(sampler, is_flow) != is_flow:
        raise ConfigError(f"sampler = {sampler!r}: with schedule {schedule!r}", fix="take dpm++2m, which supports all")


def resolve(preset: str = DEFAULT_PRESET, overrides: dict[str, Any] | None = None) -> dict[str, StageConfig]:
    """Return the configuration of all six stages: defaults, then the preset, then `overrides` (text is converted).

    An override reaches every stage that has a parameter of its name; an unknown one is rejected.
    """
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}", fix=nearest(preset, PRESETS))
    known = {name for model in STAGES.values() for name in model.model_fields}
    values = PRESETS[preset] | (overrides or {})
    if unknown := [name for name in values if name not in known]:
        raise ConfigError(f"unknown parameter {unknown[0]!r}", fix=nearest(unknown[0], known, ALL_PARAMETERS))
    return {stage: model.parse({k: v for k, v in values.items() if k in model.model_fields})
            for stage, model in STAGES.items()}  # fmt: skip
