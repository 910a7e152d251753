"""What `load` recognises and says, what it refuses, and what a loaded field is as a module."""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import pretrained_fakes as fakes
from helpers.pretrained_fakes import DIM, F64, MIXTURE, canonical_velocity
from torch import nn

from adjoint import TiltConfig, tilt
from flows import MLPVelocity, OnCanonicalPath
from flows.field import Guided, frozen
from flows.pretrained import (
    CONVENTIONS,
    Convention,
    Pretrained,
    diffusers_diffusion,
    diffusers_flow,
    load,
)
from flows.pretrained.azula import Inverted
from flows.pretrained.diffusers_flow import forward_flow, reversed_flow
from flows.pretrained.edm import convention as edm
from flows.schedule import Cosine

CONDOT = fakes.scheduler("CondOTScheduler")
X = torch.randn(6, 2, 1, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
LABEL = torch.randn(6, DIM, generator=torch.Generator().manual_seed(1), dtype=F64)
T = torch.tensor(0.3, dtype=F64)


def flow(**options):
    """A flow_matching field with the condition ``label``."""
    network = fakes.FlowMatchingNet(path="CondOTScheduler")
    return load(network, scheduler=CONDOT, quiet=True, **options)


class TestChoice:
    def test_it_says_in_one_line_what_it_chose(self, capsys):
        load(fakes.SD3Transformer2DModel())
        said = capsys.readouterr()
        assert said.err == (
            "SD3Transformer2DModel: diffusers flow, reversed time: v = -network(x, 1000 (1 - t)), "
            "predicts velocity, exact for 0 <= t <= 1\n"
        )
        assert not said.out
        load(fakes.SD3Transformer2DModel(), quiet=True)
        assert not capsys.readouterr().err

    def test_it_describes_what_it_chose(self):
        matcher = fakes.matcher("ExactOptimalTransportConditionalFlowMatcher", sigma=0.1)
        field = load(fakes.UNetModel(path=fakes.linear), scheduler=matcher, quiet=True)
        text = field.describe()
        assert "UNetModel, 1 parameters" in text
        assert "torchcfm, ExactOptimalTransportConditionalFlowMatcher" in text
        assert "optimal-transport couplings" in text
        assert "sigma = 0.1" in text
        assert field.convention.name in repr(field)

    def test_a_pipeline_is_its_transformer_or_unet_and_its_scheduler(self):
        scheduler = fakes.diffusers_scheduler("epsilon")
        unet, transformer = fakes.UNet2DModel(kind="noise"), fakes.SD3Transformer2DModel()
        module = "diffusers.pipelines.pipeline_utils"
        pipe = fakes.thing("DiffusionPipeline", "P", module, unet=unet, scheduler=scheduler)
        assert load(pipe).network is unet
        assert load(pipe).prediction == "noise"
        other = fakes.diffusers_scheduler("v_prediction")
        assert load(pipe, scheduler=other).prediction == "v_prediction"
        pipe = fakes.thing(
            "DiffusionPipeline", "P", module, transformer=transformer, scheduler=None
        )
        assert load(pipe).network is transformer
        empty = fakes.thing("DiffusionPipeline", "P", module, scheduler=None)
        with pytest.raises(ValueError, match="pipeline with a transformer or a unet, got P"):
            load(empty)

    def test_subclasses_are_recognised(self):
        class Mine(fakes.SD3Transformer2DModel):
            pass

        assert load(Mine()).convention.name.startswith("diffusers flow, reversed time")

    def test_wrappers_are_seen_through(self):
        class OptimizedModule(nn.Module):  # what torch.compile makes
            def __init__(self, module):
                super().__init__()
                self._orig_mod = module

            def forward(self, *args, **kwargs):
                return self._orig_mod(*args, **kwargs)

        network = fakes.SD3Transformer2DModel()
        cond = {"encoder_hidden_states": LABEL, **POOLED}
        for wrap in (nn.DataParallel, OptimizedModule):
            field = load(wrap(network), quiet=True)
            assert list(field.parameters()) == [network.scale]
            assert torch.equal(field(X, T, cond), load(network, quiet=True)(X, T, cond))

    def test_a_convention_by_name(self):
        field = load(fakes.ActionExpert(), convention="pi0")
        assert field.convention.name.startswith("flow policy, reversed")
        with pytest.raises(ValueError, match=r"must be one of flow_matching, .*'pi1'"):
            load(fakes.ActionExpert(), convention="pi1")

    def test_a_convention_of_ones_own(self):
        class Mine(nn.Module):
            def forward(self, x, t, y):
                alpha, sigma, _, _ = fakes.cosine(t)
                norm = alpha + sigma
                x, t = x / norm[:, None], alpha / norm
                return y * (MIXTURE.clean(x, t) - MIXTURE(x, t))

        def call(network, x, t, extras):
            return network(x, t, **extras)

        convention = Convention("mine", call, Cosine(), "noise", own=("x", "t"))
        x = X.flatten(1)
        v = load(Mine(), convention=convention)(x, T, {"y": torch.ones_like(x)})
        torch.testing.assert_close(v, MIXTURE(x, T), rtol=1e-12, atol=1e-12)

    def test_the_directions_of_time_by_hand(self):
        sd3, lumina = fakes.SD3Transformer2DModel(), fakes.Lumina2Transformer2DModel()
        cond = {"encoder_hidden_states": LABEL}
        ours = load(sd3, convention=reversed_flow(sd3, 1000.0))
        assert torch.equal(ours(X, T, cond | POOLED), load(sd3)(X, T, cond | POOLED))
        ours, cond = load(lumina, convention=forward_flow(lumina)), {**cond, **MASK}
        assert torch.equal(ours(X, T, cond), load(lumina)(X, T, cond))

    def test_noise_levels_by_hand(self):
        network = fakes.EDMPrecond()
        field = load(network, convention=edm(network, sigma_min=0.1, sigma_max=9.0))
        assert (field.t_min, field.t_max) == pytest.approx((0.1, 1 / 1.1))


class TestArguments:
    """Arguments beside state and time: named where they lack, apart from those of a reward."""

    def test_conditions_of_the_reward_alone_are_not_the_networks(self):
        cond = {"label": LABEL, "prompt": torch.arange(6)}
        with pytest.raises(ValueError, match=r"\['prompt'\], which .* ignored=\['prompt'\]"):
            flow()(X, T, cond)
        given = flow(ignored=("prompt",))(X, T, cond)
        assert torch.equal(given, flow()(X, T, {"label": LABEL}))
        with pytest.raises(ValueError, match=r"must not name arguments .* \['label'\]"):
            flow(ignored=("label",))
        with pytest.raises(ValueError, match="ignored must be a list of names, got the string"):
            flow(ignored="prompt")

    @pytest.mark.parametrize("missing", ["pooled_projections", "encoder_hidden_states"])
    def test_arguments_that_only_seem_to_have_a_default_are_asked_for(self, missing):
        cond = {"encoder_hidden_states": LABEL, **POOLED}
        field = load(fakes.SD3Transformer2DModel(), quiet=True)
        field(X, T, cond)
        del cond[missing]
        with pytest.raises(ValueError, match=rf"SD3Transformer2DModel needs \['{missing}'\]"):
            field(X, T, cond)

    def test_a_distilled_network_asks_for_its_guidance_and_is_noted(self, capsys):
        network = fakes.FluxTransformer2DModel()
        network.config = SimpleNamespace(guidance_embeds=True)
        field = load(
            network, constants={"img_ids": torch.zeros(5, 3), "txt_ids": torch.zeros(2, 3)}
        )
        assert "distilled from guidance" in capsys.readouterr().err
        with pytest.raises(ValueError, match=r"needs \['guidance'\]"):
            field(X.flatten(2), T, {"encoder_hidden_states": LABEL, **POOLED})

    def test_what_is_expanded_can_be_viewed_in_another_shape(self):
        class Views(nn.Module):
            def __init__(self):
                super().__init__()
                self.one = nn.Parameter(torch.ones(()))

            def forward(self, x, t, tokens):
                return self.one * tokens.view(-1, 2).sum() * x

        field = load(
            Views(), scheduler=CONDOT, expanded={"tokens": torch.ones(1, 3, 2)}, quiet=True
        )
        x = torch.ones(4, 2)
        torch.testing.assert_close(field(x, torch.tensor(0.5)), 24 * x)

    def test_captions_padded_by_rows_of_zeros_are_cut(self):
        padded = torch.zeros(3, 4, 2, dtype=F64)
        padded[0, :2], padded[1, :4], padded[2, 1] = 1.0, 2.0, 3.0
        assert [len(c) for c in diffusers_flow.captions(padded)] == [2, 4, 2]

    def test_steps_that_are_whole_but_for_rounding_are_whole(self):
        k = torch.tensor([979.9999, 980.0001, 0.5, 979.99])
        assert diffusers_diffusion.whole_steps(k).tolist() == [980.0, 980.0, 0.5, k[3].item()]

    def test_the_noise_says_nothing_at_zero_terminal_snr(self):
        table = torch.linspace(0.99, 0, 10, dtype=F64)
        unet = fakes.UNet2DModel(kind="noise")
        with pytest.raises(ValueError, match="zero terminal SNR"):
            load(unet, scheduler=fakes.diffusers_scheduler("epsilon", table), quiet=True)
        load(unet, scheduler=fakes.diffusers_scheduler("v_prediction", table), quiet=True)

    @pytest.mark.parametrize("scheduler", [None, "epsilon"])
    def test_a_transformer_that_is_not_known_is_not_taken_for_a_diffusion(self, scheduler):
        class WanTransformer3DModel(fakes.ModelMixin):
            pass

        scheduler = scheduler and fakes.diffusers_scheduler(scheduler)
        with pytest.raises(ValueError, match="give convention=reversed_flow"):
            load(WanTransformer3DModel(), scheduler=scheduler)


MASK = {"encoder_attention_mask": torch.ones(6, 2)}
POOLED = {"pooled_projections": torch.zeros(6, 2)}


class TestRefusals:
    def test_an_unknown_class_hears_what_is_known_and_what_to_do(self):
        with pytest.raises(ValueError, match="no convention is known for") as raised:
            load(nn.Linear(2, 2))
        for part in ("torch.nn.modules.linear.Linear", *CONVENTIONS, "Convention("):
            assert part in str(raised.value)

    def test_what_an_unknown_class_hears_to_do_leads_to_a_field_that_tilt_trains(self):
        class Net(nn.Linear):  # its time must be (B,)
            def forward(self, x, t):
                return super().forward(x) * t[:, None]

        network = Net(2, 2)
        with pytest.raises(ValueError, match="no convention is known for") as raised:
            load(network)
        advice = re.search(r"convention=(Convention\(.*\)), with", str(raised.value)).group(1)
        known = {"Convention": Convention, "schedule": Cosine(), "prediction": "noise"}
        field = load(network, convention=eval(advice, known), quiet=True)
        config = TiltConfig(
            iterations=2, steps=3, batch_size=4, base_samples=64, certificate_samples=0
        )
        trained = tilt(field, lambda x, cond: x.sum(1), shape=(2,), config=config).field.network
        assert isinstance(trained, Net)
        assert not torch.equal(trained.weight, network.weight)

    @pytest.mark.parametrize(
        ("network", "expected"),
        [
            (fakes.UNet2DModel(), "must have alphas_cumprod .* itself does not say"),
            (fakes.UNetModel(), "scheduler must be the torchcfm matcher"),
            (fakes.NCSNpp(), "scheduler must be the SDE"),
        ],
    )
    def test_models_that_do_not_know_their_path_ask_for_it(self, network, expected):
        with pytest.raises(ValueError, match=expected):
            load(network)

    def test_a_flow_of_unknown_direction(self):
        scheduler = fakes.diffusers_scheduler("flow_prediction")
        with pytest.raises(ValueError, match=r"got UNet2DModel; look at its pipeline and give"):
            load(fakes.UNet2DModel(), scheduler=scheduler)

    def test_a_flow_matching_model_without_a_scheduler(self):
        with pytest.raises(ValueError, match=r"one of CondOTScheduler, .*got NoneType"):
            load(fakes.FlowMatchingNet(), convention="flow_matching")

    def test_bridges_and_perceptrons_without_time(self):
        bridge = fakes.matcher("SchrodingerBridgeConditionalFlowMatcher")
        with pytest.raises(ValueError, match="Schrödinger bridge"):
            load(fakes.UNetModel(), scheduler=bridge)
        network = fakes.MLP()
        network.time_varying = False
        with pytest.raises(ValueError, match="time_varying=True"):
            load(network, scheduler=fakes.matcher("TargetConditionalFlowMatcher"))

    def test_a_flow_transformer_with_a_scheduler_of_something_else(self):
        transformer = fakes.SD3Transformer2DModel()
        with pytest.raises(ValueError, match="scheduler must be one of a flow"):
            load(transformer, scheduler=fakes.diffusers_scheduler("epsilon"))
        load(transformer, scheduler=fakes.diffusers_scheduler("flow_prediction"), quiet=True)

    def test_schedulers_where_none_is_needed(self):
        denoiser = fakes.Denoiser(schedule="VPSchedule")
        for network, name in ((denoiser, "azula"), (fakes.EDMPrecond(), "EDM")):
            with pytest.raises(ValueError, match=f"scheduler must be None for {name}"):
                load(network, scheduler=fakes.thing("S", "Mine", "my.schedules"))

    def test_a_schedule_that_is_not_monotone(self):
        denoiser = fakes.Denoiser(schedule="VPSchedule")
        denoiser.schedule = lambda t: (2 - t + (t > 0.8), 1 + t)
        with pytest.raises(ValueError, match=r"alpha / sigma falling .* towards t = 0\.8"):
            load(denoiser)
        bumpy = fakes.diffusers_scheduler("epsilon", fakes.ALPHAS_CUMPROD.flip(0).roll(3))
        with pytest.raises(ValueError, match="alphas / sigmas must be strictly monotone"):
            load(fakes.UNet2DModel(), scheduler=bumpy)

    def test_things_that_are_no_network(self):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module or a pipeline.*function"):
            load(lambda x, t: x)
        with pytest.raises(TypeError, match="MLPVelocity, a velocity field already"):
            load(MLPVelocity(2))
        with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module, got function"):
            Pretrained(lambda x: x, Convention("mine", lambda n, x, t, e: x))

    def test_networks_that_are_called_otherwise(self):
        with pytest.raises(ValueError, match=r"Linear.forward does not take \['t', 'x'\]"):
            load(nn.Linear(2, 2), scheduler=CONDOT)
        with pytest.raises(ValueError, match=r"Linear.forward must take state and timestep"):
            load(nn.Linear(2, 2), scheduler=fakes.diffusers_scheduler("epsilon"))


class TestConditions:
    def test_a_misspelt_name_is_refused(self):
        with pytest.raises(
            ValueError,
            match=r"cond names \['labels'\], which FlowMatchingNet does not take: "
            r"it takes \['label'\]",
        ):
            flow()(X, T, {"labels": LABEL})

    def test_a_name_that_the_network_would_swallow_is_refused(self):
        field = load(fakes.Denoiser(schedule="VPSchedule"))
        with pytest.raises(ValueError, match=r"takes none; its \*\*kwargs would swallow any name"):
            field(X, T, {"label": LABEL})
        field = load(fakes.Denoiser(schedule="VPSchedule"), conditions=["label"])
        torch.testing.assert_close(
            field(X, T, {"label": LABEL}),
            canonical_velocity(MIXTURE, X, T, LABEL),
            rtol=1e-10,
            atol=1e-10,
        )
        with pytest.raises(ValueError, match=r"forward does not take \['colour'\]"):
            flow(conditions=["colour"])

    def test_state_and_time_are_no_conditions(self):
        with pytest.raises(ValueError, match=r"cond names \['t'\]"):
            flow()(X, T, {"label": LABEL, "t": LABEL})

    def test_a_missing_condition_is_named(self):
        with pytest.raises(ValueError, match=r"FlowMatchingNet needs \['label'\], got only \[\]"):
            flow()(X, T)

    def test_a_condition_of_another_batch_is_named(self):
        with pytest.raises(
            ValueError, match=r"cond\['label'\] must have .* 6 of x, got .*\(5, 4\)"
        ):
            flow()(X, T, {"label": LABEL[:5]})
        with pytest.raises(TypeError, match=r"cond\['label'\] must be a tensor, got list"):
            flow()(X, T, {"label": [1.0]})

    def test_one_condition_for_all_samples(self):
        field = flow(expanded={"label": LABEL[:1]})
        expected = flow()(X, T, {"label": LABEL[:1].expand(6, DIM)})
        assert torch.equal(field(X, T), expected)
        with pytest.raises(ValueError, match=r"fixed at construction, got \['label'\]"):
            field(X, T, {"label": LABEL})

    def test_constants_come_as_they_are(self):
        seen = []

        class Net(nn.Module):
            def forward(self, x, t, ids, options=None):
                seen.append((ids, options))
                return x

        ids, options = torch.arange(3), {"scale": 1}
        field = load(Net(), scheduler=CONDOT, constants={"ids": ids, "options": options})
        field(X, T)
        assert torch.equal(seen[0][0], ids)
        assert seen[0][1] is options

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"constants": {"lable": 1}}, r"constants names \['lable'\]"),
            ({"expanded": {"lable": LABEL[:1]}}, r"expanded names \['lable'\]"),
            ({"expanded": {"label": LABEL}}, r"expanded\['label'\] must be .*, got \(6, 4\)"),
            ({"expanded": {"label": 3.5}}, r"must be a tensor \(1, \*\), got float"),
            (
                {"expanded": {"label": LABEL[:1]}, "constants": {"label": 1}},
                r"must not share names, got \['label'\]",
            ),
        ],
    )
    def test_what_is_fixed_is_checked_at_construction(self, options, expected):
        with pytest.raises(ValueError, match=expected):
            flow(**options)

    def test_guidance_composes(self):
        guided = Guided(flow(), 2.5, {"label": torch.zeros(1, DIM, dtype=F64)})
        zero = canonical_velocity(MIXTURE, X, T, torch.zeros_like(LABEL))
        full = canonical_velocity(MIXTURE, X, T, LABEL)
        expected = zero + 2.5 * (full - zero)
        torch.testing.assert_close(guided(X, T, {"label": LABEL}), expected, rtol=1e-10, atol=1e-10)


class TestModule:
    def test_weights_are_shared_and_train(self):
        network = fakes.FlowMatchingNet(path="CondOTScheduler")
        field = load(network, scheduler=CONDOT)
        assert field.network is network
        assert list(field.parameters()) == [network.scale]
        field(X, T, {"label": LABEL}).sum().backward()
        assert float(network.scale.grad) != 0

    def test_the_state_dict_holds_the_network_and_nothing_else(self):
        field = flow(expanded={"label": LABEL[:1]})
        names = {f"model.network.{name}" for name in field.network.state_dict()}
        assert set(field.state_dict()) == names

    def test_copies_have_weights_of_their_own_and_the_names_of_the_original(self):
        field = flow(expanded={"label": LABEL[:1]})
        for clone in (copy.deepcopy(field), frozen(field)):
            with torch.no_grad():
                clone.network.scale.mul_(2)
            assert float(field.network.scale.detach()) == 1
            torch.testing.assert_close(clone(X, T), 2 * field(X, T), rtol=1e-14, atol=0)
        field.network.load_state_dict(clone.network.state_dict())
        assert torch.equal(clone(X, T), field(X, T))

    def test_what_is_fixed_moves_with_the_module(self):
        field = flow(expanded={"label": LABEL[:1]}, constants={}).to("meta")
        assert field.model.extra_label.is_meta

    def test_half_precision_weights_under_a_single_precision_state(self):
        seen = []

        class Net(nn.Linear):
            def forward(self, x, t, y, n):
                seen.append((x.dtype, t.dtype, y.dtype, n.dtype))
                return super().forward(x) + y + t[:, None]

        net, y = Net(3, 3, dtype=torch.bfloat16), torch.randn(5, 3)
        field = load(net, scheduler=CONDOT, conditions=["y", "n"])
        x = torch.randn(5, 3, requires_grad=True)
        v = field(x, torch.tensor(0.5), {"y": y, "n": torch.arange(5)})
        half = torch.bfloat16
        assert seen == [(half, half, half, torch.int64)]
        assert v.dtype == torch.float32
        (gradient,) = torch.autograd.grad(v.sum(), x)
        assert gradient.dtype == torch.float32
        expected = net.weight.float().sum(0).expand(5, 3)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0.02)

    def test_times_of_diffusers_networks_stay_in_the_precision_of_the_state(self):
        seen = []

        class Net(fakes.SD3Transformer2DModel):
            def forward(self, hidden_states, timestep=None, return_dict=True):
                seen.append(timestep)
                return (hidden_states,)

        load(Net().bfloat16())(X.float(), torch.tensor(0.0123))
        assert seen[0].dtype == torch.float32
        assert float(seen[0][0]) == pytest.approx(987.7, abs=1e-3)

    def test_the_scale_of_the_noise_at_the_start(self):
        scheduler = fakes.diffusers_scheduler("epsilon")
        field = load(fakes.UNet2DModel(kind="noise"), scheduler=scheduler)
        alpha, sigma, _, _ = fakes.ddpm(torch.tensor([999.0], dtype=F64))
        assert field.prior_scale() == pytest.approx(float(1 / (alpha + sigma)), abs=1e-12)
        assert field.prior_scale(0.5) == pytest.approx(math.sqrt(0.5))
        assert flow().prior_scale() == 1

    def test_t_range_narrows(self):
        field = flow(t_range=(0.1, 0.9))
        assert (field.t_min, field.t_max) == (0.1, 0.9)

    def test_a_field_is_tilted_like_any_other(self):
        class Net(nn.Linear):
            def forward(self, x, t, label):
                return super().forward(x) + label

        torch.manual_seed(0)
        network = Net(2, 2)
        before = copy.deepcopy(network.state_dict())
        result = tilt(
            load(network, scheduler=CONDOT),
            lambda x, cond: x.sum(1),
            shape=(2,),
            config=TiltConfig(
                iterations=2,
                steps=3,
                batch_size=4,
                base_samples=64,
                certificate_samples=0,
                refine_fraction=0.0,
            ),
            cond_sampler=lambda n, generator: {"label": torch.zeros(n, 2)},
        )
        assert all(torch.equal(v, before[name]) for name, v in network.state_dict().items())
        trained = result.field.network
        assert isinstance(trained, Net)
        assert trained.state_dict().keys() == before.keys()
        assert not torch.equal(trained.weight, network.weight)


def test_an_inverted_schedule_keeps_its_precision():
    schedule = Inverted(fakes.AZULA["CosineSchedule"])
    times = torch.linspace(0, 1, 101, dtype=F64)
    back = schedule.snr_inverse(schedule.snr(times))
    torch.testing.assert_close(schedule.snr(back), schedule.snr(times), rtol=1e-10, atol=0)
    single = schedule.snr_inverse(schedule.snr(times).float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), times, rtol=0, atol=1e-6)


def test_by_hand_it_is_the_same():
    network = fakes.NCSNpp(kind="noise")
    loaded = load(network, scheduler=fakes.sde("VPSDE", beta_0=0.1, beta_1=20.0))

    def model(z, tau, cond):
        return network(z, 999 * (1 - tau).expand(len(z)))

    by_hand = OnCanonicalPath(model, loaded.schedule, "noise")
    assert torch.equal(loaded(X, T), by_hand(X, T))
