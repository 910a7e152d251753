"""Fixtures of several folders; being here, it also puts helper modules on the path of tests."""

import pytest
import torch

from applications.common.pictures import style


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
def process():
    """What programs set for their whole process (`training.runtime`) is undone after each test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture
def one_thread(process):
    """One thread for the test: exact repetitions, and no contest for the processors."""
    torch.set_num_threads(1)
