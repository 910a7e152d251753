"""From a pipeline to a tilted one: tiny models of diffusers, latent and decoded rewards."""

import pytest
import torch

from adjoint.models.lora import lora, merge
from adjoint.rewards.decoded import decoded
from adjoint.tilt import TiltConfig, tilt
from flows.pretrained import load
from flows.sampling import sample

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra interop)")
tiny_pipelines = pytest.importorskip("tiny_pipelines")

OPTIONS = {
    "steps": 5,
    "batch_size": 16,
    "iterations": 40,
    "ema_decay": 0.0,
    "base_samples": 64,
    "certificate_samples": 256,
    "refine_fraction": 0.0,
}


def rises(tilted, sigmas=3.0):
    """Whether the mean reward rose by more than so many standard errors."""
    before, after = tilted.certificate_base, tilted.certificate
    error = torch.stack([c.rewards.var() / len(c.rewards) for c in (before, after)]).sum().sqrt()
    return after.reward - before.reward > sigmas * float(error)


@pytest.fixture
def pipeline():
    return tiny_pipelines.stable_diffusion_3(diffusers)


@pytest.fixture
def prompt():
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder_hidden_states": torch.randn(1, 3, 16, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
    }


@pytest.mark.filterwarnings("ignore:judgement")  # random weights are no flow
@pytest.mark.parametrize("adapters", [False, True])
def test_stable_diffusion_3_toward_a_decoded_reward(pipeline, prompt, adapters):
    if adapters:
        pytest.importorskip("peft", reason="low-rank adapters need the package peft (extra lora)")
    field = load(pipeline, expanded=prompt, quiet=True)
    x0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    weights = {name: w.clone() for name, w in pipeline.transformer.state_dict().items()}
    untilted = sample(field, x0, grid=5, method="euler")
    bright = 200.0 * decoded(lambda y, cond: y.mean((1, 2, 3)), pipeline.vae, chunk=8)
    config = TiltConfig(lr=2e-2 if adapters else 1e-2, micro_batch=32, **OPTIONS)
    model, base = lora(field, rank=4) if adapters else (None, field)
    before = sample(base, x0, grid=5, method="euler")  # through adapters it may round otherwise
    torch.testing.assert_close(before, untilted, rtol=1e-5, atol=1e-6)
    tilted = tilt(base, bright, shape=(4, 8, 8), config=config, model=model)
    assert rises(tilted)
    assert 0 < tilted.certificate.ess <= 1
    assert tilted.certificate.path_kl > 0
    for name, weight in pipeline.transformer.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert torch.equal(sample(base, x0, grid=5, method="euler"), before)
    ours = sample(tilted.field, x0, grid=5, method="euler")
    assert (ours - untilted).norm() > 1e-3 * untilted.norm()
    network = tilted.field.network
    if adapters:
        frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
        assert len(frozen) == len(list(pipeline.transformer.parameters()))
    state = merge(network) if adapters else network.state_dict()
    pipeline.transformer.load_state_dict(state, assign=adapters)
    back = sample(load(pipeline, expanded=prompt, quiet=True), x0, grid=5, method="euler")
    torch.testing.assert_close(back, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:judgement")
def test_a_diffusion_unet_toward_a_latent_reward():
    field = load(tiny_pipelines.unet(diffusers), scheduler=diffusers.DDPMScheduler(100), quiet=True)
    config = TiltConfig(lr=3e-3, **OPTIONS)
    tilted = tilt(field, lambda x, cond: 5.0 * x.mean((1, 2, 3)), shape=(1, 8, 8), config=config)
    assert rises(tilted)
    assert tilted.certificate.log_weight_std > 0
