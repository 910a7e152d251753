"""The base class of losses: defaults that do nothing, and what is refused."""

import pytest
import torch
from torch import nn

from flows.training import Loss, SplitLoss, Trainer, TrainerConfig

CONFIG = TrainerConfig(iterations=2, ema_decay=0)


class Points(SplitLoss):
    """A regression that notes the order of its parts."""

    def __init__(self):
        self.order = []

    def host_step(self, module, generator):
        self.order.append("host")
        return {"known": torch.tensor(3.0), "both": torch.tensor(1.0)}

    def sample(self, module, generator):
        self.order.append("sample")
        return (torch.randn(5, 3, generator=generator),)

    def evaluate(self, module, inputs):
        self.order.append("evaluate")
        loss = module(inputs[0]).square().mean()
        return loss, {"largest": inputs[0].amax(), "both": torch.tensor(2.0)}


def network():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_a_split_loss_calls_its_parts_in_order():
    module, loss = network(), Points()
    value, metrics = loss(module, torch.Generator().manual_seed(1))
    assert loss.order == ["host", "sample", "evaluate"]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(value, module(x).square().mean())
    assert {n: float(m) for n, m in metrics.items()} == {
        "largest": float(x.amax()),
        "known": 3.0,
        "both": 1.0,  # the host's number
    }


def test_a_loss_and_a_function_are_trained_alike_and_need_no_hook():
    class Plain(Loss):
        def __call__(self, module, generator):
            return module(torch.randn(5, 3, generator=generator)).square().mean(), {}

    found = [Trainer(network(), loss, CONFIG) for loss in (Plain(), Plain().__call__)]
    for trainer in found:
        trainer.fit()
        state = trainer.state_dict()
        assert state["loss"] == {}
        trainer.load_state_dict(state)
        assert trainer.loss.phase is None
        assert trainer.loss.calls == 0
    assert torch.equal(found[0].module.weight, found[1].module.weight)


def test_hooks_that_would_never_be_called_are_refused():
    class Forgotten:
        def __call__(self, module, generator):
            return module.weight.sum(), {}

        def state_dict(self):
            return {}

        def before_step(self, module):
            pass

    with pytest.raises(TypeError, match=r"derive from flows\.training\.Loss for its state_"):
        Trainer(network(), Forgotten(), CONFIG)
    for wrong in (None, Forgotten):
        with pytest.raises(TypeError, match="loss must be a function"):
            Trainer(network(), wrong, CONFIG)
