"""The device that a user names."""

import pytest
import torch

from flows.training.runtime import choose_device


def test_a_device_that_is_not_there_is_refused_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    absent = ["tpu9", "meta", "cuda:99" if torch.cuda.is_available() else "cuda"]
    for name in absent:
        with pytest.raises(ValueError, match=f"device must be cpu, cuda or auto, got '{name}': "):
            choose_device(name)
