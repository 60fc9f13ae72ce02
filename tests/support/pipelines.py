"""Parameters with which the six notebooks run in seconds."""

# 8 mm voxels, and attention at a coarse level only: a volume of 1 mm would have 144,000 tokens.
TINY = {
    "synthetic_patients": 3, "spacing_mm": 8.0, "autoencoder_steps": 10, "max_epochs": 1, "num_inference_steps": 2,
    "multipliers": "1,1,1,1", "attention_rates": "8", "compare_steps": "2", "guidance_scales": "1,2",
    "accept_anyway": True,
}  # fmt: skip
