"""Devices and reproducibility for every test."""

import os

# No test may reach for a network: models are made on the spot.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every kind of device: the same test body runs on each."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
