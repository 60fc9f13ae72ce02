"""A latent cache whose autoencoder counts its calls; importable by processes of their own."""

import time

import torch
from torch import nn

from ldm_lib.autoencoder.model import Autoencoder
from ldm_lib.data.augmentation import Augmentation
from ldm_lib.diffusion.latent_cache import LatentCache
from ldm_lib.diffusion.latents import LatentSpec
from ldm_lib.model_io import load_model

HOW = {"device": torch.device("cpu"), "precision": "32"}
CHANGE = Augmentation(flip_probability=0.5, rotation_degrees=8.0, intensity_shift=0.1, tissue_deformation_mm=8.0)


class Counting(nn.Module):
    """An autoencoder that counts how often it encodes, and takes its time."""

    def __init__(self, folder, seconds=0.0):
        super().__init__()
        self.network, self.calls, self.seconds = load_model(folder, Autoencoder), 0, seconds
        self.factor, self.spacing_mm, self.config = self.network.factor, self.network.spacing_mm, self.network.config

    def encode(self, volume):
        self.calls += 1
        time.sleep(self.seconds)
        return self.network.encode(volume)


def cache(folder, autoencoder, weights="w", settings=None, **options):
    return LatentCache(folder, autoencoder, weights, settings or LatentSpec(), **{**HOW, **options})


def fill_slowly(heard, folder, model, cases, seconds):
    torch.set_num_threads(1)
    autoencoder = Counting(model, seconds)
    autoencoder.encode = lambda volume: (heard.put("began"), Counting.encode(autoencoder, volume))[1]
    handles = cache(folder, autoencoder, augmentation=CHANGE).encode(cases, variants=2)
    heard.put((autoencoder.calls, sum(float(latents["voided"].sum()) for handle in handles for latents in handle)))
