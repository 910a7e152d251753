"""The training that test_training.py kills.

Everything that a checkpoint has to restore takes part: a loss with state of its own, a schedule
with warm-up, accumulation, clipping, averaging, and loggers.
"""

import torch
from torch import nn

from flows.training.config import TrainerConfig
from flows.training.loggers import CSVLogger, JSONLLogger
from flows.training.loss import Loss
from flows.training.trainer import Trainer

ITERATIONS = 400


class ReplayLoss(Loss):
    """Regression on a ring buffer of random points, divided by a running scale."""

    def __init__(self):
        self.buffer = torch.zeros(64, 3)
        self.scale = torch.ones(())
        self.draws = 0

    def __call__(self, module, generator):
        row = 8 * (self.draws % 8)
        self.buffer[row : row + 8] = torch.randn(8, 3, generator=generator)
        self.draws += 1
        x = self.buffer[torch.randint(64, (16,), generator=generator)]
        error = (module(x) - x.sin().sum(1, keepdim=True)).square().mean()
        self.scale = 0.95 * self.scale + 0.05 * error.detach()
        return error / self.scale, {"scale": self.scale}

    def state_dict(self):
        return {"buffer": self.buffer, "scale": self.scale, "draws": self.draws}

    def load_state_dict(self, state):
        self.buffer, self.scale, self.draws = state["buffer"], state["scale"], state["draws"]


def train(folder, report):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))
    config = TrainerConfig(
        iterations=ITERATIONS, warmup=20, accumulate=2, ema_decay=0.99, checkpoint_every=7
    )
    loggers = [CSVLogger(folder / "metrics.csv", every=3), JSONLLogger(folder / "metrics.jsonl")]
    trainer = Trainer(
        module,
        ReplayLoss(),
        config,
        callbacks=[*loggers, report],
        checkpoint=folder / "checkpoint.pt",
        identity={"name": "replay", "dims": [3, 16, 1]},
    )
    trainer.fit(resume=True)
