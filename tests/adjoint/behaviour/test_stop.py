"""A callback that stops a tilt leaves the field, checkpoint and certificate that were reached."""

from dataclasses import replace

import torch
from helpers.linear_tilt import BASE, FAST, Slope

from adjoint import tilt
from flows import Callback, StopTraining
from flows.training import checkpoint as checkpoints

CONFIG = replace(FAST, iterations=6, certificate_samples=64)


class Stop(Callback):
    """Stops after two iterations, or never."""

    def __init__(self, stops):
        self.stops, self.seen = stops, 0

    def on_step(self, trainer, iteration, metrics):
        self.seen = iteration
        if self.stops and iteration == 2:
            raise StopTraining("that will do")


def run(path, stops, *, resume=False):
    watch = Stop(stops)
    tilted = tilt(
        BASE,
        Slope(),
        shape=(2,),
        config=CONFIG,
        callbacks=[watch],
        checkpoint=path,
        resume=resume,
    )
    return tilted, watch.seen


def test_a_stopped_tilt_is_certified_and_resumes(tmp_path):
    whole, last = run(tmp_path / "whole.pt", stops=False)
    stopped, seen = run(tmp_path / "c.pt", stops=True)
    assert whole.stopped is None
    assert "stopped" not in str(whole)
    assert stopped.stopped == "stopped after 2 of 6 updates: that will do"
    assert str(stopped).splitlines()[-1] == stopped.stopped
    assert str(replace(stopped, certificate=None)).splitlines()[-1] == stopped.stopped
    assert last == CONFIG.iterations > seen == 2
    assert checkpoints.load(tmp_path / "c.pt")["iteration"] == 2
    assert stopped.certificate is not None
    assert stopped.certificate.log_weight_std > 0
    again, seen = run(tmp_path / "c.pt", stops=False, resume=True)
    assert seen == last
    for a, b in zip(again.field.parameters(), whole.field.parameters(), strict=True):
        assert torch.equal(a, b)
