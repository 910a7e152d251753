"""``tilt`` given bad input: one clear error each, before any training, and no harm done."""

import math
import re
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers.linear_tilt import BASE, FAST, SLOPES, Shift, Slope, run, with_options
from torch import nn

from adjoint.arguments import device_of
from adjoint.checks import check_direction
from adjoint.tilt import TiltConfig, tilt
from flows.field import Residual, batch_time
from flows.mixture import GaussianMixture
from flows.networks.mlp import MLPVelocity
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import ProgressBar
from flows.training.checkpoint import CheckpointError
from flows.training.fit import TrainingDiverged
from flows.training.loggers import CSVLogger


class Untouched(Shift):
    """A model that no bad input may reach, but for the check at four states."""

    def forward(self, x, t, cond=None):
        if len(x) > 4:
            raise AssertionError("training has begun")
        return super().forward(x, t, cond)


@pytest.mark.parametrize(
    ("reward", "error", "match"),
    [
        (lambda x, c: x, ValueError, r"shape \(4, 2\).*expected one value per sample"),
        (lambda x, c: x.sum(), ValueError, r"reward returned shape \(\)"),
        (lambda x, c: x.detach().sum(1), ValueError, "not differentiable"),
        (
            lambda x, c: torch.from_numpy(x.detach().numpy()).sum(1),
            ValueError,
            "not differentiable",
        ),
        (lambda x, c: (x > 0).all(1), TypeError, "floating-point"),
        (lambda x, c: torch.nan * x.sum(1), ValueError, "reward is not finite"),
        (lambda x, c: x.sum(1).log(), ValueError, "reward is not finite"),
        (lambda x, c: (x.sum(1) * 0).sqrt(), ValueError, "gradient is not finite"),
        (lambda x: x.sum(1), TypeError, "two arguments"),
        ("digits", TypeError, "reward must be a callable"),
        (lambda x, c: x[:, 0] - x[:, 0].mean(), ValueError, "not depend on the other samples"),
        (lambda x, c: x[:, 0].softmax(0), ValueError, "not depend on the other samples"),
        (lambda x, c: x[:, 0] * torch.rand(len(x)), ValueError, "second call .*dropout"),
        (lambda x, c: (8 * x[:, 0]).round() + 0 * x[:, 1], ValueError, "gradient of 0"),
    ],
)
def test_bad_rewards_are_refused_before_training(reward, error, match):
    with pytest.raises(error, match=match):
        run(reward=reward, model=Untouched())


@pytest.mark.parametrize(
    ("base", "error", "match"),
    [
        (lambda x, t, c=None: x[:, :1], ValueError, r"base returned shape \(64, 1\)"),
        (lambda x, t, c=None: x.sum(1), ValueError, r"base returned shape \(64,\)"),
        (lambda x, t, c=None: x.long(), TypeError, "base must return a floating-point"),
        (lambda x, t, c=None: torch.nan * x, ValueError, "base returned NaN or infinite"),
        (
            lambda x, t, c=None: x / (batch_time(t, x) < 0.9),
            ValueError,
            "base does not lead to finite samples",
        ),
        (lambda x, t, c=None: x * t, ValueError, r"base fails for x .* at a time of shape \(64,\)"),
        (lambda x, t, c=None: 1e5 * x, ValueError, "base does not lead to finite samples"),
    ],
)
def test_bad_bases_are_refused_before_training(base, error, match):
    with pytest.raises(error, match=match):
        tilt(base, Slope(), shape=(2,), config=FAST, model=Untouched())


def test_a_base_that_is_random_is_no_base_that_mixes_up_times():
    def noisy(x, t, cond=None):
        return BASE(x, t) + 0.5 * torch.randn_like(x)

    found = tilt(noisy, Slope(), shape=(2,), config=with_options(iterations=1), model=Shift())
    assert bool(found.field.w.any())  # it was trained


@pytest.mark.parametrize("one", [lambda t: t[0], lambda t: t[-1], lambda t: t.mean()])
def test_a_base_that_takes_one_time_for_all_states_is_refused(one):
    """It is right wherever all times of a batch are equal, so in samples, and wrong in the loss."""

    def careless(x, t, cond=None):
        return BASE(x, t if t.ndim == 0 else one(t).expand(len(t)))

    with pytest.raises(ValueError, match=r"base must evaluate each state at its own time .* \d+%"):
        tilt(careless, Slope(), shape=(2,), config=FAST, model=Untouched())


@pytest.mark.slow
def test_a_base_that_follows_the_model_is_refused():
    model = MLPVelocity(2, hidden=(4,))
    before = [p.detach().clone() for p in model.parameters()]
    for base in (lambda x, t, c=None: model(x, t), torch.no_grad()(lambda x, t, c: model(x, t))):
        with pytest.raises(ValueError, match="base must not change while model is trained"):
            tilt(base, Slope(), shape=(2,), config=FAST, model=model)
    assert all(map(torch.equal, before, model.parameters()))
    frozen_part = MLPVelocity(2, hidden=(4,))
    residual = Residual(frozen_part, model)  # its trained part is not in the base
    frozen_part.requires_grad_(False)
    tilt(lambda x, t, c=None: frozen_part(x, t), Slope(), shape=(2,), config=FAST, model=residual)


def test_a_conditional_base_without_conditions_is_refused():
    base = MLPVelocity(2, hidden=(4,), cond_dims={"c": 1})
    with pytest.raises(ValueError, match=r"cond must name \['c'\]"):
        tilt(base, Slope(), shape=(2,), config=FAST)


def sampler_of(*values):
    return lambda n, generator: values[0] if len(values) == 1 else dict([values])


@pytest.mark.parametrize(
    ("sampler", "error", "match"),
    [
        ({"c": torch.zeros(3, 1)}, TypeError, "cond_sampler must be a callable .*, got dict"),
        (sampler_of(torch.zeros(3, 1)), TypeError, "a mapping of names to tensors .*got Tensor"),
        (sampler_of("c", [0, 1]), TypeError, "must return tensors, got list as 'c'"),
        (sampler_of("c", torch.tensor(1.0)), ValueError, r"64 conditions 'c', got shape \(\)"),
        (sampler_of("c", torch.zeros(3, 1)), ValueError, r"conditions 'c', got shape \(3, 1\)"),
    ],
)
def test_what_is_no_sampler_of_conditions_is_refused(sampler, error, match):
    base = MLPVelocity(2, hidden=(4,), cond_dims={"c": 1})
    with pytest.raises(error, match=match):
        tilt(base, Slope(), shape=(2,), config=FAST, cond_sampler=sampler)


def of_no_condition(x, t, cond=None):
    return x * cond["y"]


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (of_no_condition, r"conditions \[\]: TypeError: 'NoneType'"),
        (lambda x, t: -x, r"called as base\(x, t, cond\).*TypeError: .* takes 2 positional"),
    ],
)
def test_a_base_that_cannot_be_called_so_is_refused(base, match):
    with pytest.raises(ValueError, match=match):
        tilt(base, Slope(), shape=(2,), config=FAST)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"config": {"steps": 5}}, TypeError, "config must be a TiltConfig, got dict"),
        ({"shape": ()}, ValueError, r"shape must have a dimension, got \(\)"),
        ({"callbacks": [CSVLogger]}, TypeError, "Callback, got the class CSVLogger"),
        ({"callbacks": ProgressBar()}, TypeError, "callbacks must be a sequence, got <flows"),
        ({"callbacks": [print]}, TypeError, "Callback, got <built-in function print>"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_any_work(options, error, match):
    def base(x, t, cond=None):
        raise AssertionError("work has begun")

    with pytest.raises(error, match=match):
        tilt(base, Slope(), **{"shape": (2,), "config": FAST, **options})


def test_the_device_is_that_of_the_base_where_none_is_named():
    there = nn.Linear(2, 2, device="meta")
    assert device_of(there, None) == torch.device("meta")
    assert device_of(lambda x, t, cond: x, there) == torch.device("meta")
    assert device_of(lambda x, t, cond: x, None) == torch.device("cpu")


def test_a_progress_bar_is_shown_before_and_after_training_too(capsys):
    config = replace(FAST, iterations=2, certificate_samples=16)
    run(config)
    assert capsys.readouterr().err == ""
    run(config, callbacks=[ProgressBar("tilt")])
    err = capsys.readouterr().err
    assert all(name in err for name in ("preparation: ", "tilt: ", "certificate: "))


def test_a_closed_form_of_images_needs_a_model():
    def base(x, t, cond=None):
        return -x

    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\).*needs model="):
        tilt(base, lambda x, c: x.sum((1, 2, 3)), shape=(1, 2, 2), config=FAST)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kernel": "heun"}, "kernel must be one of .*got 'heun'"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"shift": 0.0}, "shift must be positive and finite, got 0.0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"temperature": math.nan}, "temperature must be positive and finite, got nan"),
        ({"temperature": math.inf}, "temperature must be positive and finite, got inf"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"late_fraction": 1.5}, r"late_fraction must lie in \[0, 1\], got 1.5"),
        (
            {"late_fraction": 0.5, "early_fraction": -0.1},
            r"early_fraction must lie in \[0, 1\], got -0.1",
        ),
        ({"late_fraction": 0.0, "early_fraction": 0.0}, "select none of 20 steps"),
        ({"clip": -1.0}, "clip must be at least 0.*got clip=-1.0"),
        ({"clip": math.nan}, "clip must be at least 0.*got clip=nan"),
        ({"clip": 1.0, "clip_quantile": True}, "0 where clip_quantile is on, got clip=1.0"),
        ({"clip": 1.0, "control_variates": True}, "control_variates must be False where clip"),
        ({"replay_size": -1}, "replay_size must be at least 0, got -1"),
        ({"replay_size": 100}, "replay_size must be 0 or at least batch_size=128, got 100"),
        ({"min_ess": 1.5}, r"min_ess must lie in \[0, 1\], got 1.5"),
        ({"losses_per_rollout": 0}, "losses_per_rollout must be at least 1, got 0"),
        ({"losses_per_rollout": 2}, "losses_per_rollout=2 needs a replay buffer"),
        ({"certificate_samples": -1}, "certificate_samples must be at least 0, got -1"),
        ({"micro_batch": -1}, "micro_batch must be at least 0, got -1"),
        ({"reward_batch": -2}, "reward_batch must be at least 0, got -2"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, r"seed must lie in \[0, 2\*\*63\), got 9223372036854775808"),
        ({"weight_decay": math.inf}, "weight_decay must be finite, got inf"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        TiltConfig(**options)


NUMBERS = [f.name for f in fields(TiltConfig) if f.type in ("int", "float", "int | None")]


@pytest.mark.parametrize("name", NUMBERS)
def test_nan_is_no_value_of_any_option(name):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*\bnan\b"):
        TiltConfig(**{name: math.nan})


class Poison:
    """The linear reward until its evaluation number ``at``, then NaN."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, x, cond=None):
        self.calls += 1
        value = x @ SLOPES.to(x)
        return value * torch.nan if self.calls > self.at else value


@pytest.mark.slow
def test_nan_in_training_stops_it_and_keeps_the_last_good_checkpoint(tmp_path):
    path, log = tmp_path / "c.pt", tmp_path / "log.csv"
    config = with_options(iterations=30, checkpoint_every=4)
    poison = Poison(5 + 22)  # five evaluations are the checks before training
    match = r"loss is nan in iteration 23; the last good checkpoint is .*c.pt \(iteration 20\)"
    with pytest.raises(TrainingDiverged, match=match):
        run(config, reward=poison, checkpoint=path, callbacks=[CSVLogger(log, every=1)])
    state = checkpoints.load(path)
    assert state["iteration"] == 20
    assert bool(state["module"]["w"].isfinite().all())
    assert len(log.read_text().splitlines()) == 1 + 22
    resumed = run(config, checkpoint=path, resume=True, callbacks=[CSVLogger(log, every=1)])
    assert torch.equal(resumed.field.w, run(config).field.w)  # as if nothing had happened
    assert len(log.read_text().splitlines()) == 1 + 30


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tilt_records_gradients_in_any_mode_of_the_caller(mode):
    config = with_options(iterations=3, certificate_samples=0)
    model = Shift()
    with mode():
        found = run(config, model=model)
    assert torch.equal(found.field.w, run(config).field.w)


@pytest.mark.parametrize(
    ("call", "slopes"),
    [
        (lambda x, t, cond=None: -BASE(x, t), r"\+1\.\d\d at t = 0 and -1\.00 at"),
        (lambda x, t, cond=None: -BASE(x, 1 - t), None),
        (lambda x, t, cond=None: BASE(x, 1 - t), r"\+1\.00 at t = 0 and -1\.\d\d at"),
        (lambda x, t, cond=None: 3 * BASE(x, t), r"-3\.\d\d at t = 0 and \+3\.00 at"),
        (BASE, None),
    ],
    ids=["sign", "sign and direction", "direction", "scale", "right"],
)
def test_a_base_with_other_slopes_than_those_of_a_flow_is_warned_of(call, slopes):
    """The time-reversed flow between two Gaussians is itself a flow, between others."""
    few = with_options(iterations=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tilt(call, Slope(), shape=(2,), config=few, model=Shift(), dtype=torch.float64)
    found = [str(w.message) for w in caught if "velocity changes with x" in str(w.message)]
    assert len(found) == (slopes is not None)
    if slopes is not None:
        assert re.search(slopes, found[0])


@pytest.mark.parametrize(("states", "spread"), [(1, 0.0), (4, 4.0)])
def test_a_right_base_is_not_warned_of_at_one_state_nor_at_conditions_far_apart(states, spread):
    """The mean of the data given the condition is no slope of the velocity."""

    def conditional(x, t, cond):
        return cond["mean"] + (2 * t - 1) * (x - t * cond["mean"]) / ((1 - t) ** 2 + t**2)

    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        noise, more, mean = torch.randn(3, states, 1, generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_direction(conditional, noise, spread * mean + more, {"mean": spread * mean})


def test_modules_whose_hooks_do_not_survive_a_copy_are_refused():
    base = MLPVelocity(2, hidden=(8,))
    base.last._hf_hook = object()
    with pytest.raises(ValueError, match="the part 'last' has hooks of accelerate"):
        tilt(base, Slope(), shape=(2,), config=FAST)


def finished(tmp_path, **options):
    """A checkpoint of a short run with a replay buffer, its path and its options."""
    path = tmp_path / "c.pt"
    config = with_options(iterations=3, replay_size=32, **options)
    run(config, checkpoint=path, identity={"base": "gaussian"})
    return path, config


def test_a_finished_run_is_not_trained_again(tmp_path):
    path, config = finished(tmp_path)
    reward = Slope()
    found = run(config, reward=reward, checkpoint=path, resume=True, identity={"base": "gaussian"})
    assert reward.sizes == [4, 2] + [4096] * 3  # the checks before training
    assert torch.equal(found.field.w, checkpoints.load(path)["module"]["w"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "identity", "match"),
    [
        ({}, {"base": "ring"}, "base: 'gaussian' in the checkpoint, expected 'ring'"),
        ({}, {}, "base: 'gaussian' in the checkpoint, expected 'absent'"),
        ({"steps": 7}, {"base": "gaussian"}, "steps: 5 in the checkpoint, expected 7"),
        ({"temperature": 2.0}, {"base": "gaussian"}, "temperature: 1.0 in the checkpoint"),
        ({"seed": 1}, {"base": "gaussian"}, "seed: 0 in the checkpoint, expected 1"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_problem_is_refused(tmp_path, options, identity, match):
    path, config = finished(tmp_path)
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"another run; .*{match}"):
        run(replace(config, **options), checkpoint=path, resume=True, identity=identity)
    assert path.read_bytes() == content


@pytest.mark.parametrize("factor", [-1.0, 2.0])
def test_a_checkpoint_toward_another_reward_is_warned_of(tmp_path, factor):
    path, config = finished(tmp_path)

    def resume(reward):
        return run(
            config, reward=reward, checkpoint=path, resume=True, identity={"base": "gaussian"}
        )

    with pytest.warns(UserWarning, match="the reward is not the one that the checkpoint was"):
        resume(lambda x, cond: factor * (x @ SLOPES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a little random, or a constant more, is the same
        resume(lambda x, cond: x @ SLOPES + 7 + 0.01 * torch.randn(len(x)))


def test_a_resume_of_nothing_is_refused():
    with pytest.raises(ValueError, match="resume must be False without checkpoint, the file"):
        run(resume=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "a"},
        {"batch_size": 2.5},
        {"seed": "x"},
        {"iterations": True},
        {"lr": "1e-3"},
        {"importance": 1},
        {"kernel": 3},
    ],
    ids=str,
)
def test_options_of_another_type_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(TypeError, match=rf"{name} must be of type \w+, got {value!r}"):
        TiltConfig(**wrong)


def test_numbers_of_other_libraries_are_options(tmp_path):
    numbers = {"iterations": np.int64(2), "steps": np.int32(4), "lr": np.float32(0.5)}
    path = tmp_path / "c.pt"
    run(with_options(**numbers, temperature=2), checkpoint=path)
    assert checkpoints.load(path)["config"]["lr"] == 0.5


@pytest.mark.slow
def test_damaged_checkpoints_and_pickles_with_code_are_refused(tmp_path):
    path, config = finished(tmp_path)
    whole, marker = path.read_bytes(), tmp_path / "executed"

    def resume():
        run(config, checkpoint=path, resume=True, identity={"base": "gaussian"})

    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated, damaged or not a checkpoint"):
            resume()

    class Bomb:
        def __reduce__(self):
            return marker.touch, ()

    for state in (Bomb(), {"identity": Bomb()}):
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=r"was refused.*could run code"):
            resume()
    assert not marker.exists()
    path.write_bytes(whole)
    resume()


def test_an_unwritable_checkpoint_is_known_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"checkpoint: cannot write .*below"):
        run(checkpoint=tmp_path / "file" / "below" / "c.pt", model=Untouched())
    with pytest.raises(OSError, match=r"checkpoint: cannot write .*it is a folder"):
        run(checkpoint=tmp_path, model=Untouched())
    with pytest.raises(OSError, match="logger: cannot write"):
        run(callbacks=[CSVLogger(tmp_path / "file" / "log.csv")])


def test_a_model_is_checked_too():
    with pytest.raises(ValueError, match=r"model returned shape \(4, 1\)"):
        run(model=Narrow())


class Narrow(Shift):
    """A model that drops a coordinate."""

    def forward(self, x, t, cond=None):
        return super().forward(x, t, cond)[:, :1]


@pytest.mark.parametrize("shape", [2, (2.0,), "2", (0,), (-1,), (2, 0), (True,)])
def test_a_shape_is_a_tuple_of_sizes(shape):
    with pytest.raises(ValueError, match="shape must be a tuple of sizes"):
        tilt(lambda x, t, c=None: x, Slope(), shape=shape)


def test_sizes_of_other_libraries_are_a_shape():
    assert tilt(BASE, Slope(), shape=(np.int64(2),), config=with_options(iterations=1)).shape == (
        2,
    )


class Counted:
    """The base, counting the states at which it is evaluated."""

    def __init__(self):
        self.states = 0

    def __call__(self, x, t, cond=None):
        self.states += len(x)
        return BASE(x, t)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"model": lambda x, t, c: x}, TypeError, "model must be an nn.Module or None, got functi"),
        ({"model": Shift}, TypeError, "model must be an nn.Module or None, got type"),
        ({"model": Shift().requires_grad_(False)}, ValueError, "model must have a parameter that"),
        ({"identity": "mine"}, TypeError, "identity must be a mapping of names .*, got str"),
        ({"identity": {"a": torch.ones(1)}}, TypeError, r"identity\['a'\] must be .*got Tensor"),
        ({"identity": {1: "a"}}, TypeError, "identity must have names of type str, got 1"),
        ({"reward": lambda x, c: x}, ValueError, "expected one value per sample"),
        ({"reward": lambda x, c: x.detach().sum(1)}, ValueError, "not differentiable"),
        ({"dtype": "float32"}, ValueError, "dtype must be one of .*, got 'float32'"),
        ({"dtype": torch.int64}, ValueError, "dtype must be one of .*, got torch.int64"),
        ({"dtype": torch.float8_e5m2}, ValueError, "dtype must be one of .*, got torch.float8"),
        ({"device": "warp"}, ValueError, "device must be one that is there, got 'warp'"),
        ({"device": "xla"}, ValueError, "device must be one that is there, got 'xla'"),
        ({"device": "meta"}, ValueError, "device must be one that holds numbers, got 'meta'"),
    ],
)
def test_what_few_states_show_is_refused_before_the_base_is_measured(options, error, match):
    base = Counted()
    arguments = {"reward": Slope(), "model": Shift(), "shape": (2,), "dtype": torch.float64}
    arguments |= options
    with pytest.raises(error, match=match):
        tilt(base, arguments.pop("reward"), config=FAST, **arguments)
    assert base.states < 400


def test_a_closed_form_of_images_is_refused_before_it_is_measured():
    base = Counted()
    with pytest.raises(ValueError, match="needs model="):
        tilt(
            lambda x, t, c=None: base(x[..., 0], t)[..., None],
            lambda x, c: x.sum((1, 2)),
            shape=(2, 1),
            config=FAST,
        )
    assert base.states < 400


@pytest.mark.slow
def test_a_reward_that_few_samples_carry_is_not_blamed_on_the_base(recwarn):
    """r = 60 x under N(0, 1): the exact log Z is 1800, and a single sample makes both estimates."""
    base = GaussianMixture.isotropic(torch.zeros(1, 1), 1.0)
    config = TiltConfig(iterations=1, batch_size=16, certificate_samples=512, base_samples=512)
    found = tilt(base, lambda x, c: 60 * x[:, 0], shape=(1,), config=config)
    assert (found.log_z_ode_stderr, found.certificate_base.log_z_stderr) == (math.inf, math.inf)
    assert found.log_z_ode < 300
    assert not [w for w in recwarn if "log Z" in str(w.message)]


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [False, True])
def test_a_base_that_is_no_flow_of_independent_noise_is_noticed(conditional):
    """The optimal-transport flow of N(0, 1) to N(0, 9): its chain samples another law."""

    def transport(x, t, cond=None):
        stretch = 2.0 if cond is None else cond["c"]
        return stretch * x / (1 + stretch * batch_time(t, x))

    def stretches(n, generator):
        return {"c": 1.9 + 0.2 * torch.rand(n, 1, generator=generator)}

    config = TiltConfig(steps=20, iterations=1, batch_size=16, certificate_samples=2000)
    with pytest.warns(UserWarning, match=r"ODE gives log Z = 1\.\d+.*memoryless chain 0\.\d+"):
        tilt(
            transport,
            lambda x, c: 0.5 * x[:, 0],
            shape=(1,),
            config=config,
            cond_sampler=stretches if conditional else None,
        )


@pytest.mark.parametrize("samples", [64, 100, 127])
def test_a_small_certificate_of_conditions_is_not_taken_for_one_of_a_single_law(samples):
    """log Z differs by four from condition to condition, of which it has two at least."""

    def sampler(n, generator):
        return {"c": (torch.arange(n, dtype=torch.float64) % 2)[:, None]}

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*log Z")
        found = tilt(
            BASE,
            lambda x, cond: 4 * cond["c"][:, 0] + x @ SLOPES.to(x),
            shape=(2,),
            config=with_options(iterations=1, certificate_samples=samples),
            model=Shift(),
            cond_sampler=sampler,
            dtype=torch.float64,
        )
    assert found.certificate.groups == 2
    assert "log_z (flow" not in str(found)
    assert float(found.certificate_base.grouped.mean(1).diff()) == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize(
    ("old", "new"),
    [("late", "late_fraction"), ("refresh", "losses_per_rollout"), ("graph", "cuda")],
)
def test_a_former_name_of_an_option_is_refused_by_its_new_one(old, new):
    with pytest.raises(TypeError, match=f"the argument '{old}' was renamed to '{new}"):
        TiltConfig(**{old: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'leten'"):
        TiltConfig(leten=1)
