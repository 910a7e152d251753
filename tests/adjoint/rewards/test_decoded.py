"""Rewards of decoded samples against linear decoders, and what the decoder costs."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers.linear_tilt import run, with_options
from helpers.tilt_problems import S2
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adjoint.rewards.check import check_reward
from adjoint.rewards.decoded import decoded
from adjoint.rewards.reward import Reward

F64 = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(7, 3, generator=G, dtype=F64)
W = torch.randn(5, 3, generator=G, dtype=F64)
A = torch.randn(5, generator=G, dtype=F64).square()
SCALE, SHIFT = 0.4, 0.3
Y = (X / SCALE + SHIFT) @ W.mT


def quadratic(y, cond=None):
    return -0.5 * (y.square() * A.to(y)).sum(1)


class Linear(nn.Module):
    """y = W z, remembering the sizes and dtypes of its inputs."""

    def __init__(self, matrix=W):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())
        self.seen = []

    def forward(self, z):
        self.seen.append((len(z), z.dtype))
        return z @ self.matrix.mT


class Autoencoder(nn.Module):
    """What diffusers' autoencoders look like from outside; its forward is not the decoder."""

    def __init__(self, matrix=W, **config):
        super().__init__()
        self.decoder = Linear(matrix)
        self.config = SimpleNamespace(**config)

    def forward(self, x):
        raise AssertionError("encodes and decodes")

    def decode(self, z):
        z = z.movedim(1, -1)  # channels are the second dimension
        return SimpleNamespace(sample=self.decoder(z).movedim(-1, 1))


def in_latents(gradient):
    """∇_x of a reward whose ∇_y is given."""
    return gradient @ W / SCALE


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 3, 100])
def test_a_quadratic_of_a_linear_decoder(chunk, recompute):
    decoder = Linear()
    options = {"scale": SCALE, "shift": SHIFT, "chunk": chunk, "recompute": recompute}
    reward = decoded(quadratic, decoder, **options)
    value, gradient, _ = reward.value_and_gradient(X)
    close(value, quadratic(Y))
    close(gradient, in_latents(-A * Y))
    assert not value.requires_grad
    assert not gradient.requires_grad
    sizes = {0: [7], 1: [1] * 7, 3: [3, 3, 1], 100: [7]}[chunk]
    twice = [size for size in sizes for _ in range(2)]
    assert [size for size, _ in decoder.seen] == (twice if recompute else sizes)
    decoder.seen.clear()
    with torch.no_grad():
        close(reward(X), value)
    assert [size for size, _ in decoder.seen] == sizes


def test_conditions_follow_their_samples_into_the_chunks():
    weights = torch.randn(7, 5, generator=G, dtype=F64)
    reward = decoded(lambda y, c: (y * c["w"]).sum(1), Linear(), scale=SCALE, shift=SHIFT, chunk=3)
    value, gradient, _ = reward.value_and_gradient(X, {"w": weights})
    close(value, (Y * weights).sum(1))
    close(gradient, in_latents(weights))
    with pytest.raises(ValueError, match=r"cond\['w'\] must have the leading size 7"):
        reward(X, {"w": weights[:6]})
    with pytest.raises(ValueError, match=r"needs a condition.*cond names \['v'\]"):
        reward(X, {"v": weights})


def test_transformations_of_the_reward_act_on_images():
    def gradient(reward):
        return decoded(reward, Linear(), scale=SCALE, shift=SHIFT).value_and_gradient(X)[1]

    inside = Reward(lambda y, c: (y > 0).to(y).sum(1), gradient=lambda y, c: torch.cos(y))
    close(gradient(inside), in_latents(torch.cos(Y)))
    close(gradient(inside.scaled(3.0)), 3 * in_latents(torch.cos(Y)))
    for reward in (
        inside.capped(1.2),
        Reward(quadratic, smoothing=0.5),
        Reward(quadratic) - inside,
    ):
        close(gradient(reward), in_latents(reward.value_and_gradient(Y)[1]))


def test_a_cap_of_the_decoded_reward_is_on_the_latents_gradient():
    free = in_latents(-A * Y)
    norms = free.norm(dim=1, keepdim=True)
    cap = float(norms.median())
    reward = decoded(quadratic, Linear(), scale=SCALE, shift=SHIFT, chunk=2).capped(cap)
    expected = free * (cap / norms).clamp_max(1)
    value, gradient, _ = reward.value_and_gradient(X)
    close(gradient, expected)
    close(value, quadratic(Y))
    close((-2 * reward).value_and_gradient(X)[1], -2 * expected)
    hot = 0.1 * free
    close(reward.scaled(0.1).value_and_gradient(X)[1], hot * (cap / (0.1 * norms)).clamp_max(1))


def test_terms_inside_and_outside():
    def bright(y, cond=None):
        return y.sum(1)

    inside = decoded(Reward(quadratic) + 2 * Reward(bright), Linear(), chunk=3)
    outside = decoded(quadratic, Linear()) + 2 * decoded(bright, Linear())
    for reward in (inside, outside):
        _, gradient, terms = reward.value_and_gradient(X)
        y = X @ W.mT
        assert list(terms) == ["quadratic", "bright"]
        close(terms["quadratic"], quadratic(y))
        close(terms["bright"], 2 * y.sum(1))
        close(gradient, (2 - A * y) @ W)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kind", ["module", "method", "autoencoder"])
def test_no_gradient_reaches_the_decoder(kind, chunk, recompute):
    model = Autoencoder(scaling_factor=SCALE, shift_factor=SHIFT)
    decoder = {"module": model.decoder, "method": model.decoder.forward, "autoencoder": model}[kind]
    options = {"scale": SCALE, "shift": SHIFT, "chunk": chunk, "recompute": recompute}
    reward = decoded(quadratic, decoder, **options)
    x = X.clone().requires_grad_()
    (3 * reward(x)).sum().backward()
    close(x.grad, 3 * in_latents(-A * Y))
    reward.value_and_gradient(X)
    (matrix,) = model.parameters()
    assert matrix.grad is None
    assert matrix.requires_grad
    assert torch.equal(matrix, W)
    with torch.no_grad():  # shared, not copied
        matrix.zero_()
    assert not reward(X).any()


def test_the_decoder_computes_in_its_own_dtype_and_the_rest_in_that_of_the_latents():
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        decoder = Linear().to(torch.float32)
        if dtype is not None:
            decoder = decoder.to(dtype)
        seen = []

        def reward(y, cond, seen=seen):
            seen.append(y.dtype)
            return quadratic(y)

        options = {"scale": SCALE, "shift": SHIFT, "dtype": dtype}
        value, gradient, _ = decoded(reward, decoder, **options).value_and_gradient(X)
        assert {kind for _, kind in decoder.seen} == {expected}
        assert seen == [F64]
        assert (value.dtype, gradient.dtype) == (F64, F64)
        rtol = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[expected]
        error = (gradient - in_latents(-A * Y)).norm() / gradient.norm()
        assert 0 < float(error) < rtol


STD, MEAN = [0.5, 2.0, 1.5], [0.1, -0.2, 0.3]


@pytest.mark.parametrize(
    ("config", "given", "scale", "shift"),
    [
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, {}, 0.5, 0.1),
        ({"scaling_factor": 0.5, "shift_factor": None, "latents_mean": None}, {}, 0.5, 0.0),
        ({"scaling_factor": 0.5}, {}, 0.5, 0.0),
        ({"latents_mean": MEAN, "latents_std": STD}, {}, [2.0, 0.5, 1 / 1.5], MEAN),
        (
            {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
            {},
            [1.0, 0.25, 1 / 3],
            MEAN,
        ),
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, {"scale": 3.0}, 3.0, 0.1),
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, {"shift": 7.0}, 0.5, 7.0),
        ({}, {"scale": 2.0}, 2.0, 0.0),
    ],
)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2), (4, 3, 1, 2, 2)])
def test_scale_and_shift_are_those_of_the_autoencoder(config, given, scale, shift, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    reward = decoded(lambda y, c: y.flatten(1).sum(1), Autoencoder(**config), **given)
    column = [-1, *([1] * (x.ndim - 2))]
    scale, shift = (torch.tensor(v, dtype=F64).reshape(column) for v in (scale, shift))
    y = torch.einsum("dc,bc...->bd...", W, x / scale + shift)
    value, gradient, _ = reward.value_and_gradient(x)
    torch.testing.assert_close(value, y.flatten(1).sum(1), rtol=1e-6, atol=1e-6)
    expected = W.sum(0).reshape(column) / scale
    torch.testing.assert_close(gradient, expected.expand(shape), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_tilt_of_a_linear_decoded_reward_is_exact():
    matrix, slopes = W[:, :2], torch.tensor([0.5, -0.3, 0.2, 0.1, -0.4], dtype=F64)
    decoder = Linear(matrix)
    reward = decoded(lambda y, c: y @ slopes, decoder, scale=1.3, shift=5.0, chunk=10)
    found = run(with_options(base_samples=512, eval_batch_size=64), reward=reward)
    exact = S2 * slopes @ matrix / 1.3
    torch.testing.assert_close(found.field.w.detach(), exact, rtol=0.015, atol=1e-3)
    assert max(size for size, _ in decoder.seen) == 10


class Peak(TorchDispatchMode):
    """Largest number of bytes that tensors made inside hold at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if self.known.get(storage.data_ptr()) is not storage:
                    self.known[storage.data_ptr()] = storage
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.release, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def release(self, size):
        self.now -= size


def sines(n):
    """n activations of the size of the input."""

    def chain(z, cond=None):
        for _ in range(n):
            z = z.sin()
        return z

    return chain


def test_memory_is_that_of_one_chunk_and_of_decoder_or_reward():
    """In units of one sample: 10 activations of the decoder, 8 of the reward, 16 samples."""
    x = torch.randn(16, 1000)

    def peak(call, **options):
        reward = decoded(lambda y, c: sines(8)(y).sum(1), sines(10), **options)
        with Peak() as memory:
            call(reward)
        return memory.most / (4 * 1000)

    def gradient(reward):
        reward.value_and_gradient(x)

    assert peak(gradient, recompute=False) >= 16 * 18
    assert 16 * 10 <= peak(gradient) <= 16 * 15.5  # besides: latents, image, its gradient
    assert 2 * 10 <= peak(gradient, chunk=2) <= 2 * 15.5 + 2 * 16  # and the result of each chunk

    def backward(reward):
        reward(x.clone().requires_grad_()).sum().backward()

    assert peak(backward, recompute=False) >= 16 * 18
    assert peak(backward, chunk=2) <= 2 * 24 + 3 * 16


@pytest.mark.parametrize(
    ("decoder", "options", "error", "match"),
    [
        (3.0, {}, TypeError, "decoder must be callable or have a method decode, got float"),
        (Linear(), {"chunk": -1}, ValueError, "chunk must be at least 0, got -1"),
        (Linear(), {"scale": 0.0}, ValueError, "scale must be finite and not 0"),
        (Linear(), {"scale": torch.tensor([1.0, torch.nan])}, ValueError, "scale must be finite"),
        (Autoencoder(), {}, ValueError, "scale must be given: the config of Autoencoder names"),
        (lambda z: z[:1], {}, ValueError, r"decoder returned shape \(1, 3\) for latents of shape"),
        (lambda z: (z,), {}, TypeError, "decoder must return a floating-point tensor, got tuple"),
        (lambda z: z.long(), {}, TypeError, "got torch.int64"),
        (lambda z: z.detach(), {}, ValueError, "decoder is not differentiable"),
        (torch.no_grad()(lambda z: 2 * z), {}, ValueError, "decoder is not differentiable"),
    ],
)
def test_bad_decoders_are_refused(decoder, options, error, match):
    with pytest.raises(error, match=match):
        check_reward(decoded(lambda y, c: y.sum(1), decoder, **options), X)


def test_a_decoder_that_ignores_the_latents_has_a_zero_gradient():
    weight = torch.ones(7, 3, requires_grad=True)
    _, gradient, _ = decoded(lambda y, c: y.sum(1), lambda z: 2 * weight).value_and_gradient(X)
    assert torch.equal(gradient, torch.zeros_like(X))


@pytest.fixture(scope="module")
def vae():
    diffusers = pytest.importorskip("diffusers", reason="needs the extra interop (diffusers)")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_diffusers_autoencoder_is_decoded_as_its_pipelines_do(vae, chunk):
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    reward = decoded(lambda y, c: y.square().mean((1, 2, 3)), vae, chunk=chunk)
    value, gradient, _ = reward.value_and_gradient(x)
    latents = x.clone().requires_grad_()
    image = vae.decode(latents / 1.5305 + 0.0609, return_dict=False)[0]
    assert image.shape == (3, 3, 8, 8)
    expected = image.square().mean((1, 2, 3))
    (slope,) = torch.autograd.grad(expected.sum(), latents)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6)
    reward(latents).sum().backward()
    torch.testing.assert_close(latents.grad, slope, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
