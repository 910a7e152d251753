"""Networks with the classes and calls of other packages that predict a mixture in closed form.

Each network holds its own α, σ, α̇ and σσ̇ at its native times, written down here and nowhere read
from the package.  Data are X1 = M + c with M from a mixture and c the condition, (B, 4) or as many
numbers in another shape, so that a condition that does not arrive, or not in its place, is seen:
at native (α, σ), with x = (z - α c)/(α + σ) and t = α/(α + σ),

    x̂1 = E[M | x] + c,   x̂0 = E[M | x] - v(x, t),   score = score_t(x)/(α + σ).
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from flows.mixture import GaussianMixture

F64 = torch.float64
DIM = 4
MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.2, 0.3], dtype=F64),
    torch.randn(3, DIM, generator=torch.Generator().manual_seed(1), dtype=F64),
    torch.stack([torch.diag(torch.tensor(d, dtype=F64)) for d in
                 ([0.1, 0.4, 0.2, 0.3], [0.5, 0.1, 0.2, 0.1], [0.3, 0.3, 0.6, 0.2])]),
)  # fmt: skip
GAUSSIAN = GaussianMixture(
    torch.ones(1, dtype=F64),
    torch.tensor([[0.3, -0.8, 0.5, 0.1]], dtype=F64),
    torch.diag(torch.tensor([0.2, 0.5, 0.1, 0.9], dtype=F64))[None],
)


def canonical_velocity(law, x, t, shift):
    """v(x, t | c) = v(x - t c, t) + c, in the shape of x."""
    time = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
    c = shift.reshape(len(x), DIM)
    return (law(x.flatten(1) - time * c, t) + c).reshape(x.shape)


def of(module):
    """Put a class into a module, as far as its name tells."""

    def rename(cls):
        cls.__module__ = module
        return cls

    return rename


class Fake(nn.Module):
    """Predicts ``law``; the output is multiplied by a parameter that is 1."""

    def __init__(self, law=MIXTURE, **facts):
        super().__init__()
        self.laws = (law,)  # no submodule: moving a fake leaves the law where it is
        self.scale = nn.Parameter(torch.ones((), dtype=F64))
        self.facts = SimpleNamespace(**facts)

    def predict(self, kind, z, coefficients, shift):
        alpha, sigma, alpha_dot, sigma_sigma_dot = (c.reshape(-1, 1) for c in coefficients)
        assert len(alpha) == len(z), "times must come as (B,)"
        c = torch.zeros(len(z), DIM, dtype=z.dtype) if shift is None else shift.reshape(-1, DIM)
        norm = alpha + sigma
        x, t = (z.flatten(1) - alpha * c) / norm, (alpha / norm).reshape(-1)
        (law,) = self.laws
        m = law.clean(x, t)
        x1, x0, score = m + c, m - law(x, t), law.score(x, t) / norm
        value = {
            "velocity": alpha_dot * x1 - sigma_sigma_dot * score,
            "clean": x1,
            "noise": x0,
            "score": score,
            "v_prediction": alpha * x0 - sigma * x1,
        }[kind]
        return self.scale * value.reshape(z.shape)


def linear(t):
    return t, 1 - t, torch.ones_like(t), -(1 - t)


def vp(t):
    T = 0.5 * (1 - t) ** 2 * 19.9 + (1 - t) * 0.1
    alpha, rate = torch.exp(-T / 2), (1 - t) * 19.9 + 0.1
    return alpha, torch.sqrt(-torch.expm1(-T)), rate * alpha / 2, -rate * alpha**2 / 2


def cosine(t):
    a = math.pi / 2 * t
    return a.sin(), a.cos(), math.pi / 2 * a.cos(), -math.pi / 2 * a.sin() * a.cos()


PATHS = {
    "CondOTScheduler": linear,
    "CosineScheduler": cosine,
    "LinearVPScheduler": lambda t: (t, (1 - t**2).sqrt(), torch.ones_like(t), -t),
    "PolynomialConvexScheduler": lambda t: (t**2, 1 - t**2, 2 * t, -2 * t * (1 - t**2)),
    "VPScheduler": vp,
}


def thing(base, name, module, **facts):
    """An object of a class ``name`` derived from one named ``base``, with these attributes."""
    parent = of(module)(type(base, (SimpleNamespace,), {}))
    return of(module)(type(name, (parent,), {}))(**facts)


def scheduler(name, **facts):
    """A scheduler of flow_matching."""
    return thing("Scheduler", name, "flow_matching.path.scheduler.scheduler", **facts)


def matcher(name, sigma=0.0):
    """A matcher of torchcfm."""
    module = "torchcfm.conditional_flow_matching"
    return thing("ConditionalFlowMatcher", name, module, sigma=sigma)


def sde(name, **facts):
    """An SDE of score_sde."""
    return thing("SDE", name, "sde_lib", **facts)


# flow_matching -----------------------------------------------------------------------------------


@of("my.flows")
class FlowMatchingNet(Fake):
    def forward(self, x, t, label):
        return self.predict("velocity", x, PATHS[self.facts.path](t), label)


# torchcfm ----------------------------------------------------------------------------------------


@of("torchcfm.models.unet.unet")
class UNetModel(Fake):
    def forward(self, t, x, y=None, *args, **kwargs):
        return self.predict("velocity", x, self.facts.path(t), y)


@of("torchcfm.models.models")
class MLP(Fake):
    time_varying = True

    def forward(self, x):
        return self.predict("velocity", x[:, :-1], linear(x[:, -1]), None)


@of("my.flows")
class StateFirst(Fake):
    def forward(self, x, t, y):
        return self.predict("velocity", x, linear(t), y)


# diffusers, flows --------------------------------------------------------------------------------


def noise_to_data(net, z, sigma, shift):
    """noise - data at level σ."""
    return -net.predict("velocity", z, linear(1 - sigma), shift)


@of("diffusers.models.transformers.transformer_sd3")
class SD3Transformer2DModel(Fake):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        joint_attention_kwargs=None,
        return_dict=True,
    ):
        assert not return_dict
        return (noise_to_data(self, hidden_states, timestep / 1000, encoder_hidden_states),)


@of("diffusers.models.transformers.transformer_flux")
class FluxTransformer2DModel(Fake):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        guidance=None,
        return_dict=True,
    ):
        assert img_ids.shape == (5, 3)
        assert txt_ids.shape == (2, 3)
        assert guidance.shape == hidden_states.shape[:1]
        return (noise_to_data(self, hidden_states, timestep, encoder_hidden_states),)


@of("diffusers.models.transformers.transformer_qwenimage")
class QwenImageTransformer2DModel(Fake):
    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        encoder_hidden_states_mask=None,
        timestep=None,
        img_shapes=None,
        return_dict=True,
    ):
        assert img_shapes == [[(1, 2, 2)]]
        assert encoder_hidden_states_mask.dtype == torch.bool
        return (noise_to_data(self, hidden_states, timestep, encoder_hidden_states),)


@of("diffusers.models.transformers.sana_transformer")
class SanaTransformer2DModel(Fake):
    config = SimpleNamespace(timestep_scale=0.01)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        timestep,
        encoder_attention_mask=None,
        return_dict=True,
    ):
        out = noise_to_data(self, hidden_states, timestep / 10, encoder_hidden_states)
        return (torch.cat([out, torch.full_like(out, 7.0)], 1),)


@of("diffusers.models.transformers.transformer_lumina2")
class Lumina2Transformer2DModel(Fake):
    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_attention_mask,
        return_dict=True,
    ):
        return (self.predict("velocity", hidden_states, linear(timestep), encoder_hidden_states),)


@of("diffusers.models.transformers.transformer_z_image")
class ZImageTransformer2DModel(Fake):
    def forward(self, x, t, cap_feats, return_dict=True, patch_size=2):
        z = torch.stack(x)
        assert z.ndim == 5
        assert z.shape[2] == 1
        assert isinstance(cap_feats, list)
        out = self.predict("velocity", z, linear(t), torch.stack(cap_feats))
        return (list(out.unbind()), {})


# diffusers, diffusion ----------------------------------------------------------------------------

ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)


def ddpm(k):
    """α and σ at fractional steps, linear in log-SNR; α̇ and σσ̇ are not asked for."""
    log_snr = (ALPHAS_CUMPROD.log() - (1 - ALPHAS_CUMPROD).log()).numpy()
    value = torch.from_numpy(np.interp(k.numpy(), np.arange(1000), log_snr))
    none = torch.full_like(value, math.nan)
    return torch.sigmoid(value).sqrt(), torch.sigmoid(-value).sqrt(), none, none


def diffusers_scheduler(kind, alphas_cumprod=ALPHAS_CUMPROD):
    """One with a table."""
    return thing(
        "SchedulerMixin",
        "DDIMScheduler",
        "diffusers.schedulers.scheduling_ddim",
        alphas_cumprod=alphas_cumprod,
        config=SimpleNamespace(prediction_type=kind),
    )


@of("diffusers.models.modeling_utils")
class ModelMixin(Fake):
    pass


class UNet2DModel(ModelMixin):
    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert not return_dict
        return (self.predict(self.facts.kind, sample, ddpm(timestep), class_labels),)


class UNet2DConditionModel(ModelMixin):
    config = SimpleNamespace(addition_embed_type="text_time")

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        class_labels=None,
        added_cond_kwargs=None,
        return_dict=True,
    ):
        assert set(added_cond_kwargs) == {"text_embeds", "time_ids"}
        shift = encoder_hidden_states
        return (self.predict(self.facts.kind, sample, ddpm(timestep), shift),)


class DiTTransformer2DModel(ModelMixin):
    def forward(self, hidden_states, timestep=None, class_labels=None, return_dict=True):
        out = self.predict("noise", hidden_states, ddpm(timestep), class_labels)
        return (torch.cat([out, torch.full_like(out, 7.0)], 1),)


@of("guided_diffusion.unet")
class ADM(Fake):
    def forward(self, x, timesteps, y=None):
        out = self.predict("noise", x, ddpm(timesteps), y)
        return torch.cat([out, torch.full_like(out, 7.0)], 1)


# azula -------------------------------------------------------------------------------------------


def _azula_variance_preserving(alpha):
    return alpha, torch.sqrt(1 - alpha**2 + 1e-6)


def _azula_rectified(t):
    return 1e-3 * t + 1 - t, t + 1e-3 * (1 - t)


AZULA = {
    "VESchedule": lambda t: (
        torch.ones_like(t),
        torch.exp(math.log(1e-3) + t * (math.log(1e3) - math.log(1e-3))),
    ),
    "VPSchedule": lambda t: _azula_variance_preserving(torch.exp(math.log(1e-3) * t**2)),
    "CosineSchedule": lambda t: _azula_variance_preserving(torch.cos(math.acos(1e-3) * t)),
    "RectifiedSchedule": _azula_rectified,
    "DecaySchedule": lambda t: _azula_rectified((1 - 0.1**t) / 0.9),
}


@of("azula.denoise")
class Denoiser(Fake):
    def __init__(self, law=MIXTURE, **facts):
        super().__init__(law, **facts)
        self.schedule = AZULA[self.facts.schedule]

    def forward(self, x_t, t, **kwargs):
        alpha, sigma = self.schedule(t)
        none = torch.full_like(alpha, math.nan)
        shift = kwargs.get("label")
        return SimpleNamespace(mean=self.predict("clean", x_t, (alpha, sigma, none, none), shift))


# EDM, k-diffusion, score_sde ---------------------------------------------------------------------


def exploding(sigma):
    return torch.ones_like(sigma), sigma, torch.zeros_like(sigma), sigma


@of("_imported_module_1234")
class EDMPrecond(Fake):
    sigma_min, sigma_max = 0, math.inf

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        return self.predict("clean", x, exploding(sigma), class_labels)


@of("k_diffusion.external")
class DiscreteSchedule(Fake):
    sigma_min, sigma_max = torch.tensor(0.03), torch.tensor(14.5)

    def forward(self, input, sigma, **kwargs):
        return self.predict("clean", input, exploding(sigma), kwargs.get("cond"))


@of("models.ncsnpp")
class NCSNpp(Fake):
    def forward(self, x, time_cond):
        if self.facts.kind == "noise":  # labels 999 s
            return self.predict("noise", x, vp(1 - time_cond / 999), None)
        return self.predict("score", x, exploding(time_cond), None)


# policies ----------------------------------------------------------------------------------------


@of("agents.fql")
class ActorVectorField(Fake):
    def forward(self, observations, actions, times=None, is_encoded=False):
        assert times.shape == (len(actions), 1)
        return self.predict("velocity", actions, linear(times[:, 0]), observations)


@of("my.robot")
class ActionExpert(Fake):
    def forward(self, x_t, time, state):
        return noise_to_data(self, x_t, time, state)
