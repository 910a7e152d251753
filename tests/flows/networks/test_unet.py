"""The UNet velocity: inputs that matter, inputs that do not, what it refuses, whether it learns."""

import pytest
import torch

from flows.field import Guided
from flows.mixture import GaussianMixture
from flows.networks.unet import Block, UNetVelocity


def network(**options):
    torch.manual_seed(0)
    return UNetVelocity(2, **{"widths": (4, 8, 8), "classes": 3, **options})


def inputs(batch=5):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 12, generator=g)
    t = torch.rand(batch, generator=g)
    return x, t, {"label": torch.randint(4, (batch,), generator=g)}


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    block = Block(3, 4)
    h, e = torch.randn(2, 3, 4, 4), torch.randn(2, 4)
    a, b = block.film(e).chunk(2, dim=1)
    z = (1 + a[:, :, None, None]) * block.first(h * torch.sigmoid(h)) + b[:, :, None, None]
    torch.testing.assert_close(block(h, e), h + block.second(z * torch.sigmoid(z)))


def test_scalar_time_equals_a_batch_of_it_and_images_do_not_see_each_other():
    net, (x, t, cond) = network(), inputs()
    v = net(x, t, cond)
    assert v.shape == x.shape
    torch.testing.assert_close(net(x, t[:1], cond), net(x, t[:1].expand(5), cond))
    torch.testing.assert_close(net(x, t[0], cond), net(x, t[:1].expand(5), cond))
    alone = net(x[2:3], t[2:3], {"label": cond["label"][2:3]})
    torch.testing.assert_close(v[2:3], alone, rtol=1e-4, atol=1e-5)


def test_every_input_matters_at_every_pixel():
    """A change of one pixel reaches the opposite corner, by the coarse resolutions."""
    net, (x, t, cond) = network(), inputs()
    v = net(x, t, cond)
    assert not torch.allclose(v, net(x, t / 2, cond))
    other = {"label": (cond["label"] + 1) % 4}
    assert ((net(x, t, other) - v).flatten(1).abs().amax(1) > 1e-4).all()
    moved = x.clone()
    moved[:, :, 0, 0] += 1
    assert (net(moved, t, cond) - v)[:, :, -1, -1].abs().min() > 1e-7
    assert network(classes=0)(x, t).isfinite().all()


def test_fine_detail_passes_by_the_coarse_resolutions():
    net, (x, t, cond) = network(), inputs()
    for up in net.up:
        torch.nn.init.zeros_(up.weight)
    v = net(x, t, cond)
    moved = x.clone()
    moved[:, :, 7, 11] += 1
    change = (net(moved, t, cond) - v).abs().amax(1)
    assert change[:, 7, 11].min() > 1e-3
    assert change[:, 0, 0].max() == 0  # out of the reach of the finest convolutions


def test_it_knows_where_a_pixel_lies():
    """Of a constant image a convolution alone would give the same in the whole interior."""
    net = UNetVelocity(1, widths=(4,))
    v = net(torch.zeros(1, 1, 32, 32), torch.tensor(0.5))[0, 0, 8:-8, 8:-8]
    assert v.std() > 1e-3


def test_activations_keep_their_scale():
    torch.manual_seed(0)
    net = UNetVelocity(3, widths=(32, 64, 64), blocks=2)
    kept = []
    for module in net.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda m, i, out: kept.append(float(out.detach().std())))
    net(torch.randn(16, 3, 16, 16), torch.rand(16))
    assert len(kept) == 10
    assert min(kept) > 0.5
    assert max(kept) < 10


def test_zero_init_starts_at_zero_and_can_leave_it():
    net, (x, t, cond) = network(zero_init=True), inputs()
    v = net(x, t, cond)
    assert torch.equal(v, torch.zeros_like(v))
    (v - 1).square().sum().backward()
    assert net.last.weight.grad.abs().max() > 0


def test_guidance_by_the_label_that_stands_for_none():
    net, (x, t, cond) = network(), inputs()
    none = {"label": torch.full((5,), 3)}
    expected = net(x, t, none) + 2 * (net(x, t, cond) - net(x, t, none))
    guided = Guided(net, 2.0, {"label": torch.tensor([3])})
    torch.testing.assert_close(guided(x, t, cond), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3, 8, 12)}, r"x must have shape \(B, 2, H, W\).*got \(5, 3, 8, 12\)"),
        ({"x": torch.zeros(5, 2, 8, 10)}, "multiples of 4"),
        ({"x": torch.zeros(5, 16)}, r"got \(5, 16\)"),
        ({"t": torch.zeros(4)}, r"t must be a scalar or \(5,\), got shape \(4,\)"),
        ({"cond": None}, r"cond must name \['label'\], got \[\]"),
        ({"cond": {"lable": torch.zeros(5)}}, r"got \['lable'\]"),
        (
            {"cond": {"label": torch.zeros(5, 1)}},
            r"cond\['label'\] must have shape \(5,\), got \(5, 1\)",
        ),
    ],
)
def test_bad_inputs(change, message):
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=message):
        network()(*{"x": x, "t": t, "cond": cond, **change}.values())


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        ([0.2, 3.7], TypeError, r"cond\['label'\] must be integers, got torch.float32"),
        ([1j, 0], TypeError, "must be integers, got torch.complex64"),
        ([0, 4], ValueError, r"cond\['label'\] must be from 0 to 3, got 4"),
        ([-1, 0], ValueError, "must be from 0 to 3, got -1"),
    ],
)
def test_bad_labels(label, error, message):
    x, t, _ = inputs(2)
    with pytest.raises(error, match=message):
        network()(x, t, {"label": torch.tensor(label)})


@pytest.mark.slow
def test_labels_of_any_integer_type_and_in_compiled_functions_without_a_look_at_their_range():
    net, (x, t, cond) = network(widths=(4,)), inputs()
    v = net(x, t, cond)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(net(x, t, {"label": cond["label"].to(dtype)}), v)
    assert net(x[:0], t[:0], {"label": cond["label"][:0]}).shape == (0, 2, 8, 12)
    compiled = torch.compile(net, fullgraph=True, backend="eager")  # the look would break the graph
    torch.testing.assert_close(compiled(x, t, cond), v)


@pytest.mark.parametrize(
    "options", [{"widths": ()}, {"widths": (4, 0)}, {"blocks": 0}, {"classes": -1}]
)
def test_bad_sizes(options):
    with pytest.raises(ValueError, match="must be positive"):
        network(**options)


def test_an_image_among_the_conditions_is_seen_where_it_lies():
    net, (x, t, cond) = network(images={"guess": 3}), inputs()
    cond["guess"] = torch.randn(5, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    v = net(x, t, cond)
    moved = cond["guess"].clone()
    moved[2, 1, 0, 0] += 1
    change = (net(x, t, {**cond, "guess": moved}) - v).abs().amax(1)
    assert change[2].argmax() in (0, 1, 12, 13)  # at that pixel, or beside it
    assert change[[0, 1, 3, 4]].max() < 1e-5
    for bad, message in (
        ({"label": cond["label"]}, r"must name \['guess', 'label'\]"),
        ({**cond, "guess": moved[:, :2]}, r"must have shape \(5, 3, 8, 12\), got \(5, 2, 8, 12\)"),
    ):
        with pytest.raises(ValueError, match=message):
            net(x, t, bad)
    for images in ({"guess": 0}, {"label": 1}):
        with pytest.raises(ValueError, match="images must have"):
            network(images=images)


@pytest.mark.slow
def test_learns_the_velocity_of_a_mixture_of_images():
    """Regression on the exact velocity of four images: far better than the best linear one."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(2)
    mixture = GaussianMixture.isotropic(2 * torch.randn(4, 16, generator=g).sign(), 0.3)
    net = UNetVelocity(1, widths=(16, 16))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def error(n):
        t = torch.rand(n, generator=g)
        x1 = mixture.sample(n, generator=g)
        x = t[:, None] * x1 + (1 - t[:, None]) * torch.randn(n, 16, generator=g)
        v = mixture(x, t)
        found = net(x.reshape(-1, 1, 4, 4), t).flatten(1)
        return (found - v).square().sum() / v.square().sum()

    for _ in range(100):
        optimizer.zero_grad()
        error(128).backward()
        optimizer.step()
    with torch.no_grad():
        assert error(2000) < 0.1
