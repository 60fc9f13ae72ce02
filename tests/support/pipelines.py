"""Parameters with which the six notebooks run in seconds."""

TINY = {"synthetic_patients": 3, "autoencoder_steps": 20, "max_epochs": 1, "num_inference_steps": 2}
TINY |= {
    "multipliers": "1,1,1,1",
    "attention_rates": "8",
}  # coarse attention, or a 1 mm volume would have 144 000 tokens
