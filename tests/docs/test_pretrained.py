"""The page on pretrained models: its Python runs, with tiny models for those it would download."""

import math

import pytest
import torch
from helpers import pages
from helpers import tiny_pipelines as tiny

PAGE = pages.Page("docs/pretrained.md")
BLOCKS = PAGE.blocks("python")


def run(code):
    """As written, but for the numbers of iterations; the names it leaves."""
    return pages.run(code, iterations="iterations=2")


@pytest.fixture
def downloads(monkeypatch):
    """Tiny random models in place of those that diffusers would download."""
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    pipe = tiny.stable_diffusion_3(diffusers)
    embeddings = [torch.randn(s).requires_grad_() * 1.0 for s in ((1, 5, 16), (1, 16))]
    prompts = (embeddings[0], None, embeddings[1], None)  # with a graph, as an encoder gives them
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **options: prompts)
    monkeypatch.setattr(type(pipe), "from_pretrained", lambda name: pipe)
    unet = tiny.unet(diffusers)
    monkeypatch.setattr(diffusers.UNet2DModel, "from_pretrained", lambda name: unet)
    scheduler = diffusers.DDIMScheduler
    monkeypatch.setattr(scheduler, "from_pretrained", lambda name, **facts: scheduler(**facts))


def test_there_are_examples():
    assert len(BLOCKS) == 7


@pytest.mark.slow
def test_a_pipeline(downloads):
    names = run(BLOCKS[1])
    with torch.no_grad():
        prompt, _, pooled, _ = names["pipe"].encode_prompt()
        x = names["latents"]
        timestep = torch.full((len(x),), 600.0)
        pred = names["pipe"].transformer(
            x, prompt.expand(4, -1, -1), pooled.expand(4, -1), timestep, return_dict=False
        )[0]
        v = names["tilted"].field(x, torch.tensor(0.4))
    torch.testing.assert_close(v, -pred, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_unet(downloads):
    assert bool(run(BLOCKS[2])["images"].isfinite().all())


def test_a_network_of_ones_own(capsys):
    pytest.importorskip("torchcfm", reason="needs the package torchcfm")
    run(BLOCKS[3])
    assert "log_weight_std" in capsys.readouterr().out


def velocity_from_noise(network, x, time, share):
    """x̂1 - x̂0 at ᾱ = ``share``, and the canonical time: from z = α x1 + σ x0 alone."""
    alpha, sigma = math.sqrt(share), math.sqrt(1 - share)
    z = (alpha + sigma) * x
    noise = network(z, x.new_full(x.shape[:1], time))
    return (z - sigma * noise) / alpha - noise, x.new_tensor(alpha / (alpha + sigma))


def test_a_ddpm_of_ones_own():
    """At whole steps and at times of the continuous path, by ᾱ from its definition."""
    names, x = run(BLOCKS[4]), torch.randn(5, 2, dtype=torch.float64)
    table, vp = names["field"].double(), names["continuous"].double()
    share = 1.0
    for k in range(1000):
        share *= 1 - (1e-4 + k * (0.02 - 1e-4) / 999)
        if k in (0, 10, 500, 999):
            v, t = velocity_from_noise(table.network, x, k, share)
            torch.testing.assert_close(table(x, t), v, rtol=1e-7, atol=1e-7)
    for s in (0.05, 0.5, 1.0):
        share = math.exp(-(0.1 * s + (20 - 0.1) * s**2 / 2))
        v, t = velocity_from_noise(vp.network, x, s, share)
        torch.testing.assert_close(vp(x, t), v, rtol=1e-7, atol=1e-7)
    assert f"here {table.t_min:.4f} and {vp.t_min:.4f}," in PAGE.text


def test_an_adapter_of_ones_own_and_the_same_by_hand():
    names = run(BLOCKS[5] + BLOCKS[6])
    field, by_hand, x = names["field"], names["by_hand"], torch.randn(5, 2)
    label = {"label": torch.arange(5.0)}
    assert names["v"].shape == (5, 2)
    for t in (torch.tensor(0.3), torch.rand(5)):
        torch.testing.assert_close(by_hand(x, t, label), field(x, t, label), rtol=0, atol=0)
    held = {id(p) for p in by_hand.parameters()}
    assert held == {id(p) for p in field.network.parameters()}  # what tilt will train
