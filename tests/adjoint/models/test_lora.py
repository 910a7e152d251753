"""Low-rank adapters: what they add, what they leave alone, and a tilt with them."""

import copy

import pytest
import torch
from helpers.tilt_problems import PROBLEMS
from torch import nn
from torch.utils.checkpoint import checkpoint

from adjoint.evaluator import velocity_along
from adjoint.models.lora import load_adapters, lora, merge, prepare_dropout, save_adapters
from adjoint.tilt import TiltConfig, tilt
from flows.autodiff import velocity_and_vjp
from flows.field import Residual, frozen
from flows.networks.mlp import MLPVelocity
from flows.training import TrainerConfig
from flows.training import checkpoint as checkpoints
from flows.training.callbacks import Callback
from flows.training.checkpoint import CheckpointError
from flows.training.fit import fit_flow
from flows.training.trainer import Trainer

pytest.importorskip("peft", reason="low-rank adapters need the package peft (extra lora)")

T = torch.tensor(0.4)


def network(seed=0, hidden=(16, 16)):
    torch.manual_seed(seed)
    return MLPVelocity(2, hidden=hidden)


def points(n=5, *shape):
    return torch.randn(n, *(shape or (2,)), generator=torch.Generator().manual_seed(1))


def randomised(model, scale=1.0):
    """The model with random adapters, B too."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator).mul_(scale)
    return model


def test_layers_that_are_read_and_not_called_are_no_targets():
    """In evaluation mode an encoder layer reads its weights past any adapter."""
    field = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            "last": nn.Linear(4, 4),
        }
    )
    model, _ = lora(field, rank=2)
    adapted = [name for name, m in model.named_modules() if hasattr(m, "get_delta_weight")]
    assert adapted == ["last"]
    with pytest.raises(ValueError, match=r"that are called as such, got 'encoder\.linear1'"):
        lora(field, rank=2, targets=("linear1",))


class Images(nn.Module):
    """Convolutions, attention, statistics and dropout on (B, 1, 4, 4), each block checkpointed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Conv2d(4, 1, 1)

    def block(self, h):
        h = self.drop(self.norm(self.depthwise(self.first(h).tanh())))
        tokens = h.flatten(2).mT
        return self.last((tokens + self.attention(tokens, tokens, tokens)[0]).mT.reshape(h.shape))

    def forward(self, x, t, cond=None):
        for _ in range(2):
            x = x + checkpoint(self.block, x, use_reentrant=False)
        return x


def storages(*modules):
    return {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}


# --- model and base ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, Images])
def test_base_and_untrained_model_are_the_field_to_the_bit(make):
    field = make().eval()
    x = points(5, *((1, 4, 4) if make is Images else (2,)))
    with torch.no_grad():
        before = field(x, T)
        model, base = lora(field, rank=2)
        assert torch.equal(base(x, T), before)
        assert torch.equal(model.eval()(x, T), before)
        assert torch.equal(field(x, T), before)
        randomised(model)
        assert not torch.allclose(model(x, T), before, atol=1e-2)
        assert torch.equal(base(x, T), before)
        assert torch.equal(field(x, T), before)


def test_adapters_are_the_product_of_their_factors_times_the_scale():
    field = network()
    model, _ = lora(field, rank=3, alpha=6, targets=("layers.1",))
    randomised(model)
    layer, h = model.layers[1], points(7, 16)
    change = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = h @ (field.layers[1].weight + change).mT + field.layers[1].bias
    torch.testing.assert_close(layer(h), expected)
    assert layer.lora_A["default"].weight.shape == (3, 16)


def test_only_adapters_are_trained_and_all_share_one_copy_of_the_weights():
    field = network()
    model, base = lora(field)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert not any(p.requires_grad for module in (field, base) for p in module.parameters())
    trainer = Trainer(model, lambda m, g: (m(points(), T).square().sum(), {}), TrainerConfig())
    everything = (field, base, frozen(base), frozen(Residual(base, nn.Linear(1, 1)).base))
    assert storages(*everything) == storages(field)
    both = storages(*everything, model, trainer.ema)
    assert len(both) == len(storages(field)) + 2 * len(trained)


def test_the_base_stays_as_it_is_whatever_the_model_is_doing():
    """Its mode, its statistics, its gradient in x, and what it recomputes in a backward pass."""
    field = (
        Images().eval().requires_grad_(False)
    )  # attention computes in another way with gradients
    x, cotangent = points(6, 1, 4, 4), points(6, 1, 4, 4).cos()
    v, product = velocity_and_vjp(field, x, T, cotangent)
    model, base = lora(field, rank=2)
    randomised(model).train()
    base.train()
    loss = model(x, T).square().sum()
    leaf = x.clone().requires_grad_(True)
    mixed = base(leaf, T)
    loss.backward()  # between the forward and the backward pass of the base
    (gradient,) = torch.autograd.grad(mixed, leaf, cotangent)
    assert torch.equal(mixed, v)
    assert torch.equal(gradient, product)
    found = velocity_and_vjp(frozen(base), x, T, cotangent)
    assert torch.equal(found[0], v)
    assert torch.equal(found[1], product)
    assert all(p.grad is None for p in base.parameters())
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in adapters)
    assert not torch.equal(model.norm.running_mean, field.norm.running_mean)


def test_layers_are_chosen_by_full_names_and_ends_of_names():
    def chosen(field, targets):
        model, _ = lora(field, targets=targets)
        return {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}

    everything = {"layers.0", "layers.1", "scales", "shifts", "last"}
    assert chosen(network(), None) == everything
    assert chosen(network(), ("last", "layers.1")) == {"last", "layers.1"}
    assert chosen(Residual(lambda x, t, c: x, network()), ["0", "last"]) == {
        "correction.layers.0",
        "correction.last",
    }
    assert chosen(Images(), None) == {"first", "last"}  # not what is never called


def test_adapters_of_weights_in_half_precision_are_in_float32():
    field = network().bfloat16()
    model, base = lora(field)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x, t = points().bfloat16(), T.bfloat16()
    assert model(x, t).dtype == base(x, t).dtype == torch.bfloat16
    randomised(model, 0.3)
    merged = merge(model)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    expected, plain = model(x, t), base(x, t)
    field.load_state_dict(merged)
    torch.testing.assert_close(field(x, t), expected, rtol=0.05, atol=0.05)
    assert not torch.allclose(plain, expected, rtol=0.1, atol=0.1)


def test_the_seed_determines_the_adapters_and_the_global_generator_plays_no_part():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other = (lora(network(), seed=seed)[0] for seed in (0, 0, 1))
    torch.set_rng_state(state)
    lora(first_field := network())
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    name = "last.lora_A.default.weight"
    a, b, c = (dict(model.named_parameters())[name] for model in (first, same, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert first_field.last.weight.requires_grad is False


# --- files and plain weights ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, Images])
def test_merged_weights_are_those_of_the_plain_field(make):
    field = make().eval()
    model, _ = lora(field, rank=2, alpha=5)
    randomised(model).eval()
    x = points(5, *((1, 4, 4) if make is Images else (2,)))
    expected, before = model(x, T), copy.deepcopy(field.state_dict())
    merged = merge(model)
    assert merged.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())
    plain = make().eval()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(x, T), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge(field)


def test_files_hold_the_adapters_only_and_are_those_of_peft(tmp_path):
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    path = tmp_path / "new" / "adapters.safetensors"
    model, _ = lora(network(), rank=2, alpha=3)
    save_adapters(randomised(model), path)
    other, _ = lora(network(), rank=2, alpha=3, seed=1)
    load_adapters(other, path)
    assert torch.equal(model(points(), T), other(points(), T))
    theirs = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = load_file(path)
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], value) for name, value in theirs.items())
    assert path.stat().st_size < 10_000


def test_files_of_other_adapters_are_refused_and_change_nothing(tmp_path):
    path = tmp_path / "adapters.safetensors"
    save_adapters(randomised(lora(network(), rank=2, alpha=2)[0]), path)
    cases = [
        (lora(network(), rank=3, alpha=3)[0], r"weight is \(2, 16\) in the file.*\(3, 16\)"),
        (lora(network(), rank=2, alpha=4)[0], r"scale is 1\.0 in the file, expected 2\.0"),
        (lora(network(), rank=2, targets=("last",))[0], r"layers\.0.*expected absent"),
        (lora(network(hidden=(16, 16, 16)), rank=2)[0], "absent in the file"),
    ]
    for model, match in cases:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match=f"does not fit the adapters .*{match}"):
            load_adapters(model, path)
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        load_adapters(lora(network(), rank=2)[0], path)
    with pytest.raises(FileNotFoundError):
        load_adapters(lora(network(), rank=2)[0], tmp_path / "absent")
    with pytest.raises(ValueError, match="no adapters; make them by lora"):
        save_adapters(network(), path)


# --- a tilt --------------------------------------------------------------------------------------

CONFIG = TiltConfig(
    iterations=60,
    steps=5,
    batch_size=64,
    lr=0.02,
    ema_decay=0.9,
    certificate_samples=1000,
    base_samples=1000,
    checkpoint_every=20,
    refine_fraction=0.0,
)


@pytest.fixture(scope="module")
def trained():
    """A small network that was fitted to a mixture."""
    mixture = copy.deepcopy(PROBLEMS["square"].base).float()
    config = TrainerConfig(iterations=300, lr=5e-3, ema_decay=0.99)
    field = network(hidden=(32, 32))
    fit_flow(field, lambda n, g: mixture.sample(n, generator=g), config=config, batch_size=256)
    return field.state_dict()


def fields(state, seed=0):
    field = network(hidden=(32, 32))
    field.load_state_dict(state)
    return field, *lora(field, rank=4, seed=seed)


@pytest.mark.slow
def test_a_tilt_raises_the_reward_and_changes_adapters_only(trained):
    field, model, base = fields(trained)
    x, t = points(9), torch.tensor(0.6)
    before = field(x, t)
    found = tilt(base, PROBLEMS["square"].reward, shape=(2,), config=CONFIG, model=model)
    assert found.certificate.reward > found.certificate_base.reward + 0.5
    assert found.certificate.log_weight_std < 0.6 * found.certificate_base.log_weight_std
    assert torch.equal(field(x, t), before)
    assert torch.equal(found.base(x, t), before)
    assert all(torch.equal(value, trained[name]) for name, value in field.state_dict().items())
    # Of two adapters, the one that was trained and its average.
    adapters = sum(p.requires_grad for p in model.parameters())
    assert len(storages(field, model, base, found.base, found.field)) == (
        len(storages(field)) + 2 * adapters
    )
    chain = found.certificate_base.samples
    again = tilt(base, PROBLEMS["square"].reward, shape=(2,), config=CONFIG, model=model)
    assert torch.equal(again.certificate_base.samples, chain)  # after training, too
    expected = found.field(x, t)
    field.load_state_dict(merge(found.field), assign=True)  # for the field's own pipeline
    torch.testing.assert_close(field(x, t), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.field(x, t), expected)  # its weights are not written over


@pytest.mark.slow
def test_a_tilt_resumes_exactly_on_its_own_base_only(trained, tmp_path):
    class Stop(Callback):
        def on_step(self, trainer, iteration, metrics):
            if iteration == 50:
                raise KeyboardInterrupt

    def run(state, **options):
        _, model, base = fields(state)
        found = tilt(
            base, PROBLEMS["square"].reward, shape=(2,), config=CONFIG, model=model, **options
        )
        return found.field.state_dict()

    path = tmp_path / "c.pt"
    whole = run(trained)
    with pytest.raises(KeyboardInterrupt):
        run(trained, checkpoint=path, callbacks=[Stop()])
    held = checkpoints.load(path)
    assert held["iteration"] == 40
    assert all("lora_" in name or "frequencies" in name for name in held["module"])
    other = {name: value + 1e-6 for name, value in trained.items()}
    with pytest.raises(CheckpointError, match=r"another run; base.*frozen_weights"):
        run(other, checkpoint=path, resume=True)
    field, _, base = fields(trained)
    stronger, _ = lora(field, rank=4, alpha=8)
    with pytest.raises(
        CheckpointError, match=r"adapters: '1\.0' in the checkpoint, expected '2\.0'"
    ):
        tilt(
            base,
            PROBLEMS["square"].reward,
            shape=(2,),
            config=CONFIG,
            model=stronger,
            checkpoint=path,
            resume=True,
        )
    resumed = run(trained, checkpoint=path, resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


@pytest.mark.slow
def test_dropout_of_adapters_is_for_training_only(trained):
    field, _, _ = fields(trained)
    model, _ = lora(field, dropout=0.5)
    randomised(model)
    xs, t = points(4)[None].expand(3, 4, 2), torch.tensor([0.1, 0.5, 0.9])
    model.eval()
    assert torch.equal(velocity_along(model, xs, t), velocity_along(model, xs, t))
    prepare_dropout(model)  # as the loss of a tilt does
    assert not torch.equal(velocity_along(model, xs, t), velocity_along(model, xs, t))
    assert not model.training
    second = Residual(model.requires_grad_(False), MLPVelocity(2, zero_init=True))
    prepare_dropout(second)  # not the adapters of a base
    assert torch.equal(velocity_along(second, xs, t), velocity_along(second, xs, t))


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (network, {"rank": 0}, "rank must be at least 1, got 0"),
        (network, {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        (network, {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        (network, {"targets": ("to_q",)}, r"got \['to_q'\]; ends of names: \['0', '1', 'last'"),
        (
            network,
            {"targets": ("last", "lst")},
            r"targets must name layers of field, got \['lst'\]",
        ),
        (network, {"targets": ()}, "targets must name layers of field, got none"),
        (network, {"targets": ("layers",)}, "got 'layers', a ModuleList"),
        (Images, {"targets": ("out_proj",)}, "called as such, got 'attention.out_proj'"),
        (Images, {"targets": ("depthwise",)}, "got 'depthwise', a Conv2d"),
        (lambda: nn.BatchNorm1d(2), {}, "no linear layer or ungrouped convolution"),
        (lambda: lora(network())[0], {}, "field must have no adapters, got .*unload_lora_weights"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(make, options, match):
    field = make()
    before = [(name, p.requires_grad) for name, p in field.named_parameters()]
    with pytest.raises(ValueError, match=match):
        lora(field, **options)
    assert [(name, p.requires_grad) for name, p in field.named_parameters()] == before


def test_a_function_has_nothing_to_adapt():
    with pytest.raises(TypeError, match="field must be a module, got function"):
        lora(lambda x, t, cond=None: x)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'adjoint-matching\[lora\]'"):
        lora(network())
