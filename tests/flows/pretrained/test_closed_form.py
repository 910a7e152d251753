"""Every convention against Gaussian and mixture posteriors in closed form, told in its own terms.

`load` finds the convention by class, as a user's call would.
"""

from typing import NamedTuple

import pytest
import torch
from helpers import pretrained_fakes as fakes
from helpers.pretrained_fakes import DIM, F64, GAUSSIAN, MIXTURE, canonical_velocity

from flows.autodiff import velocity_and_vjp
from flows.path import MARGIN
from flows.pretrained import load

TIMES = torch.tensor([0.0, 1e-3, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999, 1.0], dtype=F64)
EACH = 6
MATCHER = fakes.matcher("ExactOptimalTransportConditionalFlowMatcher")
TRIGONOMETRIC = fakes.matcher("VariancePreservingConditionalFlowMatcher")
VPSDE = fakes.sde("VPSDE", beta_0=0.1, beta_1=20.0)
VESDE = fakes.sde("VESDE", sigma_min=0.01, sigma_max=50.0)
DDPM_ENDS = tuple(
    float(a / (a + s)) for k in (999, 0) for a, s in [fakes.ddpm(torch.tensor([float(k)]))[:2]]
)
VP_START = float(
    fakes.vp(torch.zeros(1, dtype=F64))[0] / sum(fakes.vp(torch.zeros(1).double())[:2])
)


class Case(NamedTuple):
    """A network, its options for `load`, its condition's name and shape, and its limits by hand."""

    network: type
    facts: dict
    options: dict
    cond: str | None
    limits: tuple[float, float] = (0.0, 1.0)
    shape: tuple[int, ...] = (2, 1, 2)
    cond_shape: tuple[int, ...] = (DIM,)


def flow_matching(name, limits=(0.0, 1.0), **facts):
    options = {"scheduler": fakes.scheduler(name, **facts)}
    return Case(fakes.FlowMatchingNet, {"path": name}, options, "label", limits)


def ddpm(network, kind, cond="class_labels", **options):
    scheduler = fakes.diffusers_scheduler(kind)
    return Case(
        network, {"kind": _KINDS[kind]}, {"scheduler": scheduler, **options}, cond, DDPM_ENDS
    )


_KINDS = {"epsilon": "noise", "sample": "clean", "v_prediction": "v_prediction"}
PROMPT = {"encoder_hidden_states": torch.zeros(1, 2, 2, dtype=F64)}
CASES = {
    "flow_matching_condot": flow_matching("CondOTScheduler"),
    "flow_matching_cosine": flow_matching("CosineScheduler"),
    "flow_matching_linear_vp": flow_matching("LinearVPScheduler"),
    "flow_matching_polynomial": flow_matching("PolynomialConvexScheduler", (MARGIN, 1.0), n=2),
    "flow_matching_vp": flow_matching("VPScheduler", (VP_START, 1.0), beta_min=0.1, beta_max=20.0),
    "torchcfm_unet": Case(fakes.UNetModel, {"path": fakes.linear}, {"scheduler": MATCHER}, "y"),
    "torchcfm_mlp": Case(fakes.MLP, {}, {"scheduler": MATCHER}, None, shape=(DIM,)),
    "torchcfm_state_first": Case(fakes.StateFirst, {}, {"scheduler": MATCHER}, "y"),
    "torchcfm_cosine": Case(
        fakes.UNetModel, {"path": fakes.cosine}, {"scheduler": TRIGONOMETRIC}, "y"
    ),
    "sd3": Case(
        fakes.SD3Transformer2DModel,
        {},
        {"expanded": {"pooled_projections": torch.zeros(1, 2)}},
        "encoder_hidden_states",
        cond_shape=(2, 2),
    ),
    "flux": Case(
        fakes.FluxTransformer2DModel,
        {},
        {
            "constants": {"img_ids": torch.zeros(5, 3), "txt_ids": torch.zeros(2, 3)},
            "expanded": {
                "guidance": torch.tensor([3.5]),
                "pooled_projections": torch.zeros(1, 2),
            },
        },
        "encoder_hidden_states",
        shape=(2, 2),
    ),
    "qwen_image": Case(
        fakes.QwenImageTransformer2DModel,
        {},
        {
            "constants": {"img_shapes": [[(1, 2, 2)]]},
            "expanded": {"encoder_hidden_states_mask": torch.ones(1, 2, dtype=torch.bool)},
        },
        "encoder_hidden_states",
        shape=(1, 4),
    ),
    "sana": Case(fakes.SanaTransformer2DModel, {}, {}, "encoder_hidden_states"),
    "lumina2": Case(
        fakes.Lumina2Transformer2DModel,
        {},
        {"expanded": {"encoder_attention_mask": torch.ones(1, 2)}},
        "encoder_hidden_states",
    ),
    "z_image": Case(fakes.ZImageTransformer2DModel, {}, {}, "cap_feats", cond_shape=(2, 2)),
    "unet_epsilon": ddpm(fakes.UNet2DModel, "epsilon"),
    "unet_sample": ddpm(fakes.UNet2DModel, "sample"),
    "unet_v_prediction": ddpm(fakes.UNet2DModel, "v_prediction"),
    "stable_diffusion_xl": ddpm(
        fakes.UNet2DConditionModel,
        "epsilon",
        "encoder_hidden_states",
        expanded={"text_embeds": torch.zeros(1, 3), "time_ids": torch.zeros(1, 6)},
    ),
    "dit_learned_variance": ddpm(fakes.DiTTransformer2DModel, "epsilon"),
    "adm_learned_variance": ddpm(fakes.ADM, "epsilon", "y"),
    **{
        f"azula_{name}": Case(
            fakes.Denoiser, {"schedule": name}, {"conditions": ["label"]}, "label", limits
        )
        for name, limits in {
            "VESchedule": (1 / 1001, 1 / 1.001),
            "VPSchedule": (1e-3 / (1e-3 + 1), 1 / 1.001),
            "CosineSchedule": (1e-3 / (1e-3 + 1), 1 / 1.001),
            "RectifiedSchedule": (1e-3 / (1e-3 + 1), 1 / 1.001),
            "DecaySchedule": (1e-3 / (1e-3 + 1), 1 / 1.001),
        }.items()
    },
    "edm": Case(fakes.EDMPrecond, {}, {}, "class_labels", (1 / 81, 1 / 1.002)),
    "k_diffusion": Case(
        fakes.DiscreteSchedule, {}, {"conditions": ["cond"]}, "cond", (1 / 15.5, 1 / 1.03)
    ),
    "score_sde_vp": Case(
        fakes.NCSNpp, {"kind": "noise"}, {"scheduler": VPSDE}, None, (VP_START, 1.0)
    ),
    "score_sde_ve": Case(
        fakes.NCSNpp, {"kind": "score"}, {"scheduler": VESDE}, None, (1 / 51, 1 / 1.01)
    ),
    "fql": Case(fakes.ActorVectorField, {}, {}, "observations", shape=(DIM,)),
    "pi0": Case(fakes.ActionExpert, {}, {"convention": "pi0"}, "state", shape=(2, 2)),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def problem(case, batch):
    """States and conditions; zeros for a network that takes none."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, *case.shape, generator=g, dtype=F64)
    shift = torch.randn(batch, *case.cond_shape, generator=g, dtype=F64)
    if case.cond is None:
        return x, torch.zeros(batch, DIM, dtype=F64), None
    return x, shift, {case.cond: shift}


def adapted(case, law=MIXTURE):
    return load(case.network(law, **case.facts), **case.options, quiet=True)


@EVERY
def test_limits(case):
    field = adapted(case)
    assert (field.t_min, field.t_max) == pytest.approx(case.limits, rel=1e-6, abs=1e-12)


@EVERY
@pytest.mark.parametrize("law", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_velocity_and_input_gradient_are_exact_from_noise_to_data(case, law):
    field = adapted(case, law)
    t = TIMES.repeat_interleave(EACH)
    x, shift, cond = problem(case, len(t))
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    v, product = velocity_and_vjp(field, x, t, cotangent, cond)
    held = t.clamp(field.t_min, field.t_max)

    def exact(x, t, cond=None):
        return canonical_velocity(law, x, held, shift)

    expected = velocity_and_vjp(exact, x, t, cotangent)
    torch.testing.assert_close(v, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(product, expected[1], rtol=1e-10, atol=1e-10)


@EVERY
def test_a_scalar_time_is_a_batch_of_equal_ones(case):
    field = adapted(case)
    x, _, cond = problem(case, EACH)
    for t in TIMES:
        alone = field(x, t, cond)
        torch.testing.assert_close(alone, field(x, t.expand(EACH), cond), rtol=1e-14, atol=1e-14)


@EVERY
def test_single_precision_state_over_a_double_network(case):
    field = adapted(case)
    x, shift, cond = problem(case, EACH)
    v = field(x.float(), torch.tensor(0.4), cond)
    assert v.dtype == torch.float32
    expected = canonical_velocity(MIXTURE, x, torch.tensor(0.4, dtype=F64), shift)
    torch.testing.assert_close(v.double(), expected, rtol=2e-4, atol=2e-4)
