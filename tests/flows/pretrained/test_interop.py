"""Adapters against the packages themselves: the same samples, before and after a tilt.

Each part is skipped where its package is not installed (extra ``interop``).
"""

import copy

import pytest
import torch
from helpers import tiny_pipelines as tiny
from torch import nn

from adjoint import TiltConfig, load_adapters, lora, save_adapters, tilt
from flows.field import Guided
from flows.pretrained import diffusers_diffusion, diffusers_flow, load
from flows.sampling import sample

NEEDS = "needs the package {}: pip install 'adjoint-matching[interop]'"
TOLERANCE = 1e-5
CONFIG = TiltConfig(
    iterations=3,
    lr=3e-3,
    lr_schedule="constant",
    ema_decay=0.0,
    kernel="ancestral",
    steps=3,
    batch_size=4,
    base_samples=64,
    certificate_samples=0,
    refine_fraction=0.0,
)


def package(name):
    return pytest.importorskip(name, reason=NEEDS.format(name.partition(".")[0]))


@pytest.fixture(scope="module")
def diffusers():
    return package("diffusers")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def difference(ours, theirs):
    assert bool(theirs.isfinite().all())
    return float((ours - theirs).norm() / theirs.norm())


def brought_back(field, original, shape, cond=None):
    """Tilt for a few steps, load the weights into the original module; the tilted field."""
    before = copy.deepcopy(original.state_dict())

    def reward(x, cond):
        return 5 * x.flatten(1).mean(1)

    def conditions(n, generator):
        return {name: c[:1].expand(n, *c.shape[1:]) for name, c in cond.items()}

    tilted = tilt(
        field, reward, shape=shape, config=CONFIG, cond_sampler=None if cond is None else conditions
    ).field
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    original.load_state_dict(tilted.network.state_dict())
    assert any(not torch.equal(v, before[name]) for name, v in original.state_dict().items())
    return tilted


class Perceptron(nn.Module):
    """A small network in flow_matching's manner, or azula's backbone."""

    def __init__(self, time_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
        self.out = nn.Linear(32, 3)

    def forward(self, x, t, label):
        time = t.reshape(-1, 1).expand(len(x), 1)
        return self.out(self.net(torch.cat([x, time, label], 1)))


class TestFlowMatching:
    x0, label = draw(16, 3), draw(16, 2, seed=1)

    def theirs(self, network, scheduler):
        """Its Euler, after its own change to the path it calls CondOT."""
        solvers, paths = package("flow_matching.solver"), package("flow_matching.path.scheduler")
        if not isinstance(scheduler, paths.CondOTScheduler):
            network = paths.ScheduleTransformedModel(network, scheduler, paths.CondOTScheduler())
        solver = solvers.ODESolver(network)
        grid = torch.linspace(self.start, 1, 11)
        return solver.sample(
            self.x0, None, method="euler", time_grid=grid, label=self.label
        ).detach()

    def ours(self, field):
        grid = torch.linspace(self.start, 1, 11)
        return sample(field, self.x0, grid=grid, method="euler", cond={"label": self.label})

    @pytest.mark.parametrize(
        ("name", "start", "arguments"),
        [
            ("CondOTScheduler", 0.0, ()),
            ("CosineScheduler", 0.0, ()),
            ("LinearVPScheduler", 0.0, ()),
            ("PolynomialConvexScheduler", 0.05, (2,)),
            ("VPScheduler", 0.05, ()),
        ],
    )
    def test_samples_are_those_of_its_solver(self, name, start, arguments):
        scheduler = getattr(package("flow_matching.path.scheduler"), name)(*arguments)
        network, self.start = Perceptron(), start
        field = load(network, scheduler=scheduler, quiet=True)
        assert difference(self.ours(field), self.theirs(network, scheduler)) < TOLERANCE

    def test_a_path_is_as_good_as_its_scheduler(self):
        path = package("flow_matching.path").CondOTProbPath()
        assert load(Perceptron(), scheduler=path).convention.name.endswith("CondOTScheduler")

    def test_tilted_weights_go_back(self):
        scheduler = package("flow_matching.path.scheduler").CondOTScheduler()
        network, self.start = Perceptron(), 0.0
        before = self.theirs(network, scheduler)
        field = load(network, scheduler=scheduler, quiet=True)
        tilted = brought_back(field, network, (3,), {"label": self.label})
        assert difference(self.ours(tilted), self.theirs(network, scheduler)) < TOLERANCE
        assert difference(self.ours(tilted), before) > 1e-3


class TestTorchcfm:
    def theirs(self, network, x0):
        """The solver its examples sample with."""
        odeint = package("torchdyn.numerics").odeint
        span = torch.linspace(0, 1, 11)
        with torch.no_grad():
            return odeint(network, x0, span, solver="euler")[1][-1]

    def test_its_perceptron(self):
        matchers = package("torchcfm.conditional_flow_matching")
        models, utils = package("torchcfm.models"), package("torchcfm.utils")
        torch.manual_seed(0)
        network, x0 = models.MLP(dim=2, time_varying=True), draw(16, 2)
        field = load(network, scheduler=matchers.ConditionalFlowMatcher(), quiet=True)
        wrapped = utils.torch_wrapper(network)
        before = self.theirs(wrapped, x0)
        assert difference(sample(field, x0, grid=10, method="euler"), before) < TOLERANCE
        tilted = brought_back(field, network, (2,))
        ours = sample(tilted, x0, grid=10, method="euler")
        assert difference(ours, self.theirs(wrapped, x0)) < TOLERANCE
        assert difference(ours, before) > 1e-3

    def test_its_class_conditional_unet(self):
        matchers = package("torchcfm.conditional_flow_matching")
        torch.manual_seed(0)
        network = package("torchcfm.models.unet").UNetModel(
            dim=(1, 8, 8),
            num_channels=32,
            num_res_blocks=1,
            channel_mult=(1,),
            attention_resolutions="8",
            class_cond=True,
        )
        tiny.randomised(network)
        matcher = matchers.ExactOptimalTransportConditionalFlowMatcher()
        field = load(network, scheduler=matcher, quiet=True)
        assert "optimal-transport" in field.describe()
        x0, y = draw(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
        theirs = self.theirs(lambda t, x: network(t, x, y), x0)
        ours = sample(field, x0, grid=10, method="euler", cond={"y": y})
        assert difference(ours, theirs) < TOLERANCE
        with pytest.raises(ValueError, match=r"cond names \['label'\], which UNetModelWrapper"):
            field(x0, 0.5, {"label": y})  # its **kwargs would swallow the name


class TestAzula:
    x1, label = draw(16, 3), draw(16, 2, seed=1)

    def both(self, denoiser, field):
        """Its DDIM sampler, carried to the canonical path, and our Euler on the same times."""
        sampler = package("azula.sample").DDIMSampler(denoiser, steps=10, silent=True)
        alpha, sigma = denoiser.schedule(sampler.timesteps.double())
        grid = alpha / (alpha + sigma)
        with torch.no_grad():
            theirs = sampler(self.x1, label=self.label) / (alpha + sigma)[-1].float()
        x0 = self.x1 / (alpha + sigma)[0].float()
        return sample(field, x0, grid=grid, method="euler", cond={"label": self.label}), theirs

    @pytest.mark.parametrize("schedule", ["RectifiedSchedule", "VPSchedule", "CosineSchedule"])
    @pytest.mark.parametrize("denoiser", ["KarrasDenoiser", "SimpleDenoiser"])
    def test_samples_are_those_of_ddim(self, schedule, denoiser):
        made = getattr(package("azula.denoise"), denoiser)(
            Perceptron(), getattr(package("azula.noise"), schedule)()
        )
        field = load(made, conditions=["label"], quiet=True)
        ours, theirs = self.both(made, field)
        assert difference(ours, theirs) < TOLERANCE

    def test_tilted_weights_go_back(self):
        schedule = package("azula.noise").RectifiedSchedule()
        denoiser = package("azula.denoise").KarrasDenoiser(Perceptron(), schedule)
        field = load(denoiser, conditions=["label"], quiet=True)
        _, before = self.both(denoiser, field)
        tilted = brought_back(field, denoiser, (3,), {"label": self.label})
        ours, theirs = self.both(denoiser, tilted)
        assert difference(ours, theirs) < TOLERANCE
        assert difference(ours, before) > 1e-3


class TestStableDiffusion3:
    x0 = draw(2, 4, 8, 8)
    cond = {
        "encoder_hidden_states": draw(2, 5, 16, seed=1),
        "pooled_projections": draw(2, 16, seed=2),
    }
    null = {name: torch.zeros_like(c[:1]) for name, c in cond.items()}

    def theirs(self, pipe, weight=1.0):
        null = {name: c.expand(2, *c.shape[1:]) for name, c in self.null.items()}
        return pipe(
            prompt_embeds=self.cond["encoder_hidden_states"],
            pooled_prompt_embeds=self.cond["pooled_projections"],
            negative_prompt_embeds=null["encoder_hidden_states"],
            negative_pooled_prompt_embeds=null["pooled_projections"],
            guidance_scale=weight,
            num_inference_steps=6,
            latents=self.x0,
            output_type="latent",
            height=8,
            width=8,
        ).images

    def ours(self, field, pipe):
        grid = diffusers_flow.grid(pipe.scheduler)
        return sample(field, self.x0, grid=grid, method="euler", cond=self.cond)

    @pytest.mark.slow
    def test_samples_are_those_of_the_pipeline_before_and_after_a_tilt(self, diffusers):
        pipe = tiny.stable_diffusion_3(diffusers)
        field = load(pipe, quiet=True)
        before = self.theirs(pipe)
        assert difference(self.ours(field, pipe), before) < TOLERANCE
        tilted = brought_back(field, pipe.transformer, (4, 8, 8), self.cond)
        ours = self.ours(tilted, pipe)
        assert difference(ours, self.theirs(pipe)) < TOLERANCE
        assert difference(ours, before) > 1e-3

    @pytest.mark.slow
    @pytest.mark.parametrize("part", ["field", "network"])
    def test_the_pipeline_reads_saved_adapters_with_their_scale(self, diffusers, part, tmp_path):
        pytest.importorskip("peft")
        path, pipe = tmp_path / "adapters.safetensors", tiny.stable_diffusion_3(diffusers)
        model, _ = lora(load(pipe, quiet=True), rank=2, alpha=6)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        before = self.theirs(pipe)  # sets the scheduler's steps too
        ours = self.ours(model, pipe)
        save_adapters(model if part == "field" else model.network, path)
        again, _ = lora(load(pipe, quiet=True), rank=2, alpha=6, seed=1)
        load_adapters(again, path)
        assert difference(self.ours(again, pipe), ours) < TOLERANCE
        pipe.load_lora_weights(path)
        assert difference(self.theirs(pipe), ours) < TOLERANCE
        assert difference(before, ours) > 1e-3
        with pytest.raises(ValueError, match=r"got \['default_0'\]: fold them in first"):
            lora(load(pipe, quiet=True))

    def test_guidance_is_that_of_the_pipeline(self, diffusers):
        pipe = tiny.stable_diffusion_3(diffusers)
        guided = Guided(load(pipe, quiet=True), 4.0, self.null)
        theirs = self.theirs(pipe, weight=4.0)
        assert difference(self.ours(guided, pipe), theirs) < TOLERANCE

    def test_a_grid_is_asked_for_too_early(self, diffusers):
        with pytest.raises(ValueError, match=r"must end at 0: call scheduler\.set_timesteps"):
            diffusers_flow.grid(tiny.stable_diffusion_3(diffusers).scheduler)


class TestFlux:
    @pytest.mark.slow
    def test_samples_are_those_of_the_pipeline_before_and_after_a_tilt(self, diffusers):
        pipe = tiny.flux(diffusers)
        x0, prompt, pooled = draw(2, 16, 16), draw(1, 5, 32, seed=1), draw(1, 32, seed=2)
        field = load(
            pipe,
            constants={
                "img_ids": pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
                "txt_ids": torch.zeros(5, 3),
            },
            expanded={
                "guidance": torch.tensor([3.5]),
                "encoder_hidden_states": prompt,
                "pooled_projections": pooled,
            },
            quiet=True,
        )

        def theirs():
            return pipe(
                prompt_embeds=prompt.expand(2, -1, -1),
                pooled_prompt_embeds=pooled.expand(2, -1),
                guidance_scale=3.5,
                num_inference_steps=5,
                latents=x0,
                output_type="latent",
                height=8,
                width=8,
            ).images

        before = theirs()
        grid = diffusers_flow.grid(pipe.scheduler)
        ours = sample(field, x0, grid=grid, method="euler")
        assert difference(ours, before) < TOLERANCE
        tilted = brought_back(field, pipe.transformer, (16, 16))
        ours = sample(tilted, x0, grid=grid, method="euler")
        assert difference(ours, theirs()) < TOLERANCE
        assert difference(ours, before) > 1e-3


class TestOtherTransformers:
    """One evaluation as their pipelines make it: v = -(noise_pred that goes to the scheduler)."""

    x, prompt, sigma = draw(2, 4, 8, 8), draw(2, 5, 16, seed=1), torch.full((2,), 0.7)
    mask = torch.ones(2, 5, dtype=torch.bool)

    def check(self, field, x, cond, noise_pred):
        with torch.no_grad():
            for t in (torch.tensor(0.3), torch.full((2,), 0.3)):
                assert difference(field(x, t, cond), -noise_pred) < TOLERANCE

    def test_qwen_image(self, diffusers):
        network, x, shapes = tiny.qwen_image(diffusers), draw(2, 16, 4), [[(1, 4, 4)]]
        cond = {"encoder_hidden_states": self.prompt, "encoder_hidden_states_mask": self.mask}
        with torch.no_grad():
            pred = network(x, timestep=self.sigma, img_shapes=2 * shapes, return_dict=False, **cond)
        self.check(load(network, constants={"img_shapes": shapes}), x, cond, pred[0])

    def test_sana(self, diffusers):
        network = tiny.sana(diffusers)
        cond = {"encoder_hidden_states": self.prompt, "encoder_attention_mask": self.mask.float()}
        timestep = 1000 * self.sigma * network.config.timestep_scale
        with torch.no_grad():
            pred = network(self.x, timestep=timestep, return_dict=False, **cond)[0]
        self.check(load(network), self.x, cond, pred.chunk(2, 1)[0])

    def test_lumina2(self, diffusers):
        network = tiny.lumina2(diffusers)
        cond = {"encoder_hidden_states": self.prompt, "encoder_attention_mask": self.mask}
        with torch.no_grad():
            pred = network(self.x, timestep=1 - self.sigma, return_dict=False, **cond)[0]
        self.check(load(network), self.x, cond, -pred)

    def test_z_image(self, diffusers):
        network = tiny.z_image(diffusers)
        lists = list(self.x.unsqueeze(2).unbind()), 1 - self.sigma, list(self.prompt.unbind())
        with torch.no_grad():
            pred = torch.stack(network(*lists, return_dict=False)[0]).squeeze(2)
        self.check(load(network), self.x, {"cap_feats": self.prompt}, -pred)

    def test_a_flow_transformer_of_unknown_direction_is_refused(self, diffusers):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match=r"reversed_flow\(network, scale\) or forward_flow"):
            load(tiny.unet(diffusers), scheduler=scheduler)


class TestDiffusion:
    z = draw(3, 1, 8, 8, seed=5)

    def theirs(self, unet, scheduler):
        """The pipeline's loop, whose own output is clamped and scaled to images."""
        z = self.z
        with torch.no_grad():
            for k in scheduler.timesteps:
                z = scheduler.step(unet(z, k).sample, k, z).prev_sample
        return z

    def ours(self, field, scheduler):
        grid = diffusers_diffusion.grid(scheduler)
        x0 = field.prior_scale(float(grid[0])) * self.z
        return sample(field, x0, grid=grid, method="euler")

    @pytest.mark.parametrize(
        "options",
        [
            {"prediction_type": "epsilon"},
            {"prediction_type": "sample"},
            {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
        ],
    )
    def test_samples_are_those_of_ddim(self, diffusers, options):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, **options)
        unet = tiny.unet(diffusers)
        scheduler.set_timesteps(10)
        ours = self.ours(load(unet, scheduler=scheduler, quiet=True), scheduler)
        assert difference(ours, self.theirs(unet, scheduler)) < TOLERANCE

    @pytest.mark.slow
    def test_samples_are_those_of_the_pipeline_before_and_after_a_tilt(self, diffusers):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
        pipe = diffusers.DDIMPipeline(tiny.unet(diffusers), scheduler)
        pipe.set_progress_bar_config(disable=True)

        def theirs():
            generator = torch.Generator().manual_seed(5)
            made = pipe(3, generator, num_inference_steps=10, output_type="np")
            return torch.from_numpy(made.images).permute(0, 3, 1, 2)

        def images(field):
            return (self.ours(field, pipe.scheduler) / 2 + 0.5).clamp(0, 1)

        field, before = load(pipe, quiet=True), theirs()
        assert difference(images(field), before) < TOLERANCE
        tilted = brought_back(field, pipe.unet, (1, 8, 8))
        assert difference(images(tilted), theirs()) < TOLERANCE
        assert difference(images(tilted), before) > 1e-3

    def test_learned_variance_is_left_out(self, diffusers):
        torch.manual_seed(0)
        network = tiny.randomised(
            diffusers.DiTTransformer2DModel(
                in_channels=4,
                out_channels=8,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                patch_size=2,
                sample_size=8,
                num_embeds_ada_norm=10,
            )
        )
        scheduler = diffusers.DDIMScheduler()
        field = load(network, scheduler=scheduler)
        x, labels, k = draw(2, 4, 8, 8), torch.tensor([1, 2]), 300
        alpha = scheduler.alphas_cumprod[k].sqrt()
        sigma = (1 - scheduler.alphas_cumprod[k]).sqrt()
        z = (alpha + sigma) * x
        with torch.no_grad():
            noise = network(z, torch.full((2,), k), class_labels=labels).sample[:, :4]
            v = field(x, alpha / (alpha + sigma), {"class_labels": labels})
        assert difference(v, (z - sigma * noise) / alpha - noise) < TOLERANCE

    @pytest.mark.parametrize(
        "name",
        ["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"],
    )
    def test_any_scheduler_with_the_same_table_says_the_same(self, diffusers, name):
        unet = tiny.unet(diffusers)
        x, t = self.z, torch.tensor(0.4)
        one = load(unet, scheduler=diffusers.DDIMScheduler())
        other = load(unet, scheduler=getattr(diffusers, name)())
        torch.testing.assert_close(other(x, t), one(x, t), rtol=1e-5, atol=1e-5)

    def test_schedulers_without_a_table_are_refused(self, diffusers):
        with pytest.raises(ValueError, match="scheduler must have alphas_cumprod"):
            load(tiny.unet(diffusers), scheduler=diffusers.EDMEulerScheduler())
        with pytest.raises(ValueError, match="UNet2DModel itself does not say what it predicts"):
            load(tiny.unet(diffusers))


def test_half_precision_weights_under_a_single_precision_state(diffusers):
    pipe = tiny.stable_diffusion_3(diffusers)
    single = load(pipe, expanded={n: c[:1] for n, c in TestStableDiffusion3.cond.items()})
    half = copy.deepcopy(single).to(torch.bfloat16)
    x = TestStableDiffusion3.x0.clone().requires_grad_()
    v = half(x, torch.tensor(0.37))
    (gradient,) = torch.autograd.grad(v.sum(), x)
    assert v.dtype == gradient.dtype == torch.float32
    assert 0 < difference(v, single(x, torch.tensor(0.37))) < 0.03


def test_peft_layers_are_seen_through(diffusers):
    peft = package("peft")
    x, t, cond = TestStableDiffusion3.x0, torch.tensor(0.5), TestStableDiffusion3.cond
    transformer = tiny.stable_diffusion_3(diffusers).transformer
    plain = load(transformer)(x, t, cond).detach()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    field = load(peft.get_peft_model(transformer, config))
    assert difference(field(x, t, cond), plain) > 1e-3
    with field.network.disable_adapter():
        assert torch.equal(field(x, t, cond), plain)
