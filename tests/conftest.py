"""Fixtures of several folders; being here, it also puts helper modules on the path of tests."""

import pytest
import torch

from applications.pictures import style


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved so far, which are also written."""
    figures = []
    save = style.save

    def saving(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(style, "save", saving)
    return figures


@pytest.fixture(autouse=True)
def denormal_numbers():
    """Programs flush them (`flows.process`); the tests that come after need them."""
    yield
    torch.set_flush_denormal(False)
