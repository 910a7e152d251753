"""The cost of a tilt, said beforehand, and the sizes that follow it."""

import re
from dataclasses import replace

import pytest
import torch
from helpers.linear_tilt import BASE, FAST, Shift, Slope, run
from torch import nn

from adjoint import TiltConfig, estimate_cost, tilt
from adjoint.cost import BUDGET, PATH_ENTRIES_AT_A_TIME, _activations, _flops, chosen_sizes
from flows import MLPVelocity, UNetVelocity, frozen
from flows.training import ProgressBar


class Counting(nn.Module):
    """A field that counts the states at which it is evaluated."""

    def __init__(self, field):
        super().__init__()
        self.field, self.states = field, 0

    def forward(self, x, t, cond=None):
        self.states += len(x)
        return self.field(x, t, cond)


def sizes(base, shape, **options):
    config = estimate_cost(base, shape=shape, config=TiltConfig(**options)).config
    return config.base_samples, config.certificate_samples, config.eval_batch_size


def test_fields_in_the_plane_keep_their_sizes():
    assert sizes(BASE, (2,)) == (8192, 4096, 4096)
    assert sizes(MLPVelocity(2), (2,)) == (8192, 4096, 4096)
    assert sizes(MLPVelocity(64), (64,), refine_fraction=0.0) == (8192, 4096, 4096)


def test_a_network_of_images_is_not_evaluated_a_million_times_before_training():
    unet = UNetVelocity(1)
    found = estimate_cost(unet, shape=(1, 8, 8))
    assert 64 <= found.config.base_samples <= 2048
    assert found.before <= 2048 * 120
    assert sizes(unet, (1, 8, 8), base_samples=300) == (300, *sizes(unet, (1, 8, 8))[1:])


def attention(width=32):
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)

    class Tokens(nn.Module):
        """A transformer whose tokens are the rows of an image."""

        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, t, cond=None):
            return self.layer(x) * torch.as_tensor(t).reshape(-1, 1, 1)

    return Tokens().eval()


def test_attention_is_counted():
    x = torch.randn(4, 16, 32)
    d, n = 32, 16
    products = 2 * n * d * (3 * d + d + 8 * d)  # projections and the perceptron
    found = _flops(frozen(attention()), x, None)
    assert found == pytest.approx(products + 4 * n * n * d, rel=1e-6)


def test_the_memory_of_an_update_counts_what_trained_weights_keep():
    hidden = MLPVelocity(2, hidden=(64, 64))
    x = torch.randn(4, 2)
    held = []

    def keep(tensor):
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden(x.requires_grad_(True), torch.tensor(0.5))
    own = {p.data_ptr() for p in hidden.parameters()}
    expected = {t.data_ptr(): t.nbytes for t in held if t.data_ptr() not in own}
    assert _activations(frozen(hidden), x.detach(), None) == sum(expected.values()) // 4


def test_sizes_follow_operations_not_time_and_dimension():
    for flops, base_samples, certificate_samples in (
        (None, 8192, 4096),
        (0.5e6, 8192, 4096),
        (3e6, 1024, 2048),
        (1e9, 64, 64),
        (1e12, 64, 64),
    ):
        config = chosen_sizes(TiltConfig(), 2, flops)
        assert (config.base_samples, config.certificate_samples) == (
            base_samples,
            certificate_samples,
        )
        if base_samples > 64 and flops:
            assert base_samples * 120 * flops <= BUDGET
    for dim, at_a_time in ((64, 4096), (768, 256), (4 * 64 * 64, 16)):
        coarse = TiltConfig(refine_fraction=0.0)
        assert chosen_sizes(coarse, dim, None).eval_batch_size == at_a_time


def test_the_memory_of_trajectories_is_bounded_however_many_steps_they_have():
    for options, dim in (({}, 64), ({"steps": 1000}, 2), ({"kernel": "covariance_matched"}, 16)):
        config = chosen_sizes(TiltConfig(**options), dim, None)
        whole = dim * dim if "kernel" in options else dim  # the noise's roots
        entries = config.chain_steps * config.eval_batch_size * whole
        assert entries <= PATH_ENTRIES_AT_A_TIME < 4 * entries


@pytest.mark.parametrize(
    ("kernel", "elsewhere"), [("euler_published", 8), ("euler_consistent", 0), ("ancestral", 1)]
)
def test_an_adjoint_that_is_read_at_another_time_costs_an_evaluation_more(kernel, elsewhere):
    """A rollout, an adjoint and a loss of 8 steps, and the base at its own time in some of them."""
    config = replace(FAST, kernel=kernel, steps=8, batch_size=20)
    assert estimate_cost(BASE, shape=(2,), config=config).per_update == 20 * (3 * 8 + elsewhere)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "euler_published"},
        {"kernel": "covariance_matched"},
        {"micro_batch": 7},
        {"late_fraction": 0.25, "early_fraction": 0.5},
        {"control_variates": True},
        {"replay_size": 64, "losses_per_rollout": 4},
        {"refine_fraction": 0.5, "refine_loss": "log_variance", "refine_steps": 12},
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_evaluations_are_those_that_are_made(options):
    config = replace(
        FAST,
        iterations=8,
        steps=8,
        batch_size=20,
        base_samples=512,
        certificate_samples=512,
        **options,
    )
    base, model = Counting(BASE), Counting(Shift())
    cost = estimate_cost(base, shape=(2,), config=config, dtype=torch.float64)
    found = tilt(base, Slope(), shape=(2,), config=config, model=model, dtype=torch.float64)
    made = found.base.states - base.states + model.states + found.field.states - model.states
    said = cost.before + cost.per_update * config.iterations + cost.after
    assert made == pytest.approx(said, rel=0.05)


def test_a_refinement_that_may_go_on_with_adjoint_matching_costs_the_dearer_of_the_two():
    """For a costly base few samples are drawn, and adjoint matching is the dearer."""
    found = {
        loss: estimate_cost(
            UNetVelocity(1), shape=(1, 8, 8), config=TiltConfig(refine_loss=loss, **options)
        )
        for loss, options in (
            ("auto", {"refine_samples": 64}),
            ("flow_matching", {"refine_samples": 64}),
            ("log_variance", {"refine_fraction": 0.0}),
        )
    }
    matching = found["log_variance"].per_update
    assert found["auto"].per_update == matching > 1.5 * found["flow_matching"].per_update
    many = [
        estimate_cost(BASE, shape=(2,), config=TiltConfig(refine_loss=loss)).per_update
        for loss in ("auto", "flow_matching")
    ]
    assert many[0] == many[1] > matching


def test_losses_that_add_up_make_a_training_longer():
    short = TiltConfig(iterations=20, batch_size=8, steps=10)
    together = replace(short, accumulate=8)
    assert chosen_sizes(together, 2, 1e3).refine_samples == 256
    assert chosen_sizes(short, 2, 1e3).refine_samples == 64


def test_the_cost_is_said_beforehand_where_progress_is_shown(capsys):
    config = replace(FAST, iterations=2, certificate_samples=16)
    run(config)
    assert capsys.readouterr().err == ""
    run(config, callbacks=[ProgressBar("tilt")])
    err = capsys.readouterr().err
    assert re.search(r"[\d,]+ before training \(about .*base_samples", err)
    assert err.index("before training") < err.index("preparation: ")


def test_a_cost_names_the_options_that_lower_it():
    cost = estimate_cost(UNetVelocity(1), shape=(1, 8, 8))
    text = str(cost)
    assert f"{cost.before:,} before training" in text
    assert "1,500 updates" in text
    assert "\n" not in text
    for option in ("base_samples", "batch_size", "certificate_samples", "micro_batch"):
        assert option in text
    small = estimate_cost(UNetVelocity(1), shape=(1, 8, 8), config=TiltConfig(micro_batch=8))
    assert small.memory < 0.1 * cost.memory
