"""Wrappers of velocity fields against fields whose value and Jacobian are known by hand."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from flows.autodiff import velocity_and_vjp
from flows.field import Guided, Residual, batch_time, check_cond, check_velocity, frozen
from flows.mixture import GaussianMixture
from flows.networks.mlp import MLPVelocity
from flows.path import velocity_from_score

F64 = torch.float64
G = torch.Generator().manual_seed(0)
A = torch.randn(3, 3, generator=G, dtype=F64)
X, C = torch.randn(2, 5, 3, generator=G, dtype=F64)
T = torch.linspace(0, 1, 5, dtype=F64)
HALF = torch.tensor(0.5, dtype=F64)


class Linear(nn.Module):
    """v = x Aᵀ + t + Σ cond, with A a parameter; dropout shows the mode it runs in."""

    def __init__(self, matrix=A, dropout=0.0):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, t, cond=None):
        v = x @ self.matrix.mT + batch_time(t, x)
        return self.dropout(v + sum((cond or {}).values()))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


class TestVelocityAndVjp:
    @pytest.mark.parametrize("t", [HALF, T], ids=["scalar", "batch"])
    def test_linear(self, t):
        v, product = velocity_and_vjp(Linear(), X, t, C)
        close(v, X @ A.mT + t.reshape(-1, 1))
        close(product, C @ A)

    def test_nonlinear_and_in_time(self):
        v, product = velocity_and_vjp(lambda x, t, c: (t[:, None] * x @ A.mT).sin(), X, T, C)
        inner = T[:, None] * X @ A.mT
        close(v, inner.sin())
        close(product, T[:, None] * ((inner.cos() * C) @ A))

    def test_rows_do_not_mix(self):
        _, product = velocity_and_vjp(Linear(), X, HALF, C * (torch.arange(5) == 2)[:, None])
        assert bool((product[[0, 1, 3, 4]] == 0).all())
        assert bool((product[2] != 0).all())

    def test_conditions_arrive(self):
        v, product = velocity_and_vjp(Linear(), X, HALF, C, {"shift": C})
        close(v, X @ A.mT + 0.5 + C)
        close(product, C @ A)

    def test_nothing_else_receives_a_gradient(self):
        field, x = Linear(), X.clone().requires_grad_()
        with torch.no_grad():
            v, product = velocity_and_vjp(field, x, HALF, C)
        close(product, C @ A)
        assert field.matrix.grad is None
        assert x.grad is None
        assert not v.requires_grad
        assert not product.requires_grad

    def test_a_constant_field_has_a_zero_jacobian(self):
        bias = nn.Parameter(torch.ones(3, dtype=F64))
        for field in (lambda x, t, c: torch.ones_like(x), lambda x, t, c: bias.expand(5, 3)):
            v, product = velocity_and_vjp(field, X, HALF, C)
            assert bool((v == 1).all())
            assert torch.equal(product, torch.zeros_like(X))

    def test_a_frozen_field_still_has_an_input_jacobian(self):
        _, product = velocity_and_vjp(frozen(Linear()), X, HALF, C)
        close(product, C @ A)

    def test_a_lower_precision_field_is_served(self):
        def field(x, t, cond):
            return (x.to(torch.float32) @ A.float().mT).to(torch.float32)

        v, product = velocity_and_vjp(field, X, HALF, C)
        assert (v.dtype, product.dtype) == (torch.float32, F64)
        torch.testing.assert_close(product, C @ A, rtol=1e-5, atol=1e-5)


class TestInsideTransforms:
    def test_fields_with_stacked_weights(self):
        def one(weight):
            def field(x, t, cond):
                return functional_call(Linear(), {"matrix": weight}, (x, t))

            return velocity_and_vjp(field, X, HALF, C)

        v, product = torch.vmap(one)(torch.stack([A, 2 * A]).requires_grad_())
        close(v, torch.stack([X @ A.mT + 0.5, 2 * X @ A.mT + 0.5]))
        close(product, torch.stack([C @ A, 2 * C @ A]))
        assert not v.requires_grad
        assert not product.requires_grad

    def test_a_constant_field(self):
        v, product = torch.vmap(
            lambda x: velocity_and_vjp(lambda x, t, c: torch.ones_like(x), x, HALF, C)
        )(torch.stack([X, X]))
        assert bool((v == 1).all())
        assert torch.equal(product, torch.zeros(2, *X.shape, dtype=F64))

    @pytest.mark.slow
    def test_compiled_whole(self):
        field = Linear()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def run(x, c):
            return velocity_and_vjp(field, x, HALF, c)

        v, product = run(X, C)
        close(v, X @ A.mT + 0.5)
        close(product, C @ A)
        assert not v.requires_grad
        assert not product.requires_grad

    def test_what_torch_func_refuses_is_served_outside(self):
        def field(x, t, cond):
            return checkpoint(lambda x: (x @ A.mT).sin(), x, use_reentrant=False)

        v, product = velocity_and_vjp(field, X, HALF, C)
        close(v, (X @ A.mT).sin())
        close(product, ((X @ A.mT).cos() * C) @ A)


class TestFrozen:
    def test_a_copy_in_evaluation_mode_without_gradients(self):
        field = Linear(dropout=0.5)
        copy = frozen(field)
        assert not copy.training
        assert field.training
        assert [p.requires_grad for p in copy.parameters()] == [False]
        assert field.matrix.requires_grad
        with torch.no_grad():
            field.matrix.zero_()
        close(copy(X, HALF), X @ A.mT + 0.5)

    def test_a_function_is_returned_as_it_is(self):
        def field(x, t, cond=None):
            return x

        assert frozen(field) is field


class TestResidual:
    def test_is_the_sum(self):
        field = Residual(Linear(), Linear(2 * A))
        v, product = velocity_and_vjp(field, X, T, C, {"shift": C})
        close(v, 3 * X @ A.mT + 2 * T[:, None] + 2 * C)
        close(product, 3 * C @ A)

    def test_only_the_correction_learns(self):
        base = Linear()
        field = Residual(base, Linear(0 * A))
        optimiser = torch.optim.SGD(field.parameters(), lr=1.0)
        field(X, HALF).sum().backward()
        optimiser.step()
        assert torch.equal(field.base.matrix, A)
        close(field.correction.matrix, -X.sum(0).expand(3, 3))
        with torch.no_grad():
            base.matrix.zero_()  # the caller's module is its own
        assert torch.equal(field.base.matrix, A)

    def test_training_mode_reaches_the_correction_only(self):
        field = Residual(Linear(dropout=0.5), Linear(dropout=0.5))
        assert nn.Sequential(field).train()[0] is field
        assert (field.base.dropout.training, field.correction.dropout.training) == (False, True)
        field.eval()
        assert (field.base.dropout.training, field.correction.dropout.training) == (False, False)

    def test_a_function_may_be_the_base(self):
        field = Residual(lambda x, t, cond=None: 2 * x, Linear())
        close(field.train()(X, HALF), 2 * X + X @ A.mT + 0.5)


class TestGuided:
    null = {"label": torch.tensor([[10.0, 20.0, 30.0]], dtype=F64)}

    @pytest.mark.parametrize("weight", [0.0, 1.0, 2.5, -1.0])
    def test_extrapolates_from_the_unconditional(self, weight):
        field = Guided(Linear(), weight, self.null)
        v, product = velocity_and_vjp(field, X, T, C, {"label": C})
        expected = X @ A.mT + T[:, None] + (1 - weight) * self.null["label"] + weight * C
        torch.testing.assert_close(v, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(product, C @ A, rtol=1e-13, atol=1e-13)

    def test_other_conditions_are_kept_in_both_branches(self):
        field = Guided(Linear(), 3.0, self.null)
        cond = {"label": C, "state": 7 * C}
        plain = field(X, HALF, {"label": C})
        torch.testing.assert_close(field(X, HALF, cond), plain + 7 * C, rtol=1e-13, atol=1e-13)
        assert set(cond) == {"label", "state"}
        assert cond["label"] is C

    def test_null_conditions_move_with_the_module(self):
        field = Guided(Linear(), 2.0, self.null).float()
        assert field(X.float(), HALF, {"label": C.float()}).dtype == torch.float32
        assert "null_label" in field.state_dict()

    def test_any_name_serves(self):
        field = Guided(Linear(), 0.0, {"names": torch.zeros(1, 3, dtype=F64)})
        close(field(X, HALF, {"names": C}), X @ A.mT + 0.5)

    def test_integer_labels(self):
        table = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
        labels = torch.tensor([0, 1, 2, 0, 1])
        field = Guided(lambda x, t, c: table[c["label"]], 1.5, {"label": torch.tensor([3])})
        torch.testing.assert_close(
            field(X, HALF, {"label": labels}), 1.5 * table[labels] - 0.5 * table[3].expand(5, 3)
        )

    def test_guidance_of_a_residual(self):
        field = Guided(Residual(Linear(), Linear(0 * A)), 2.0, self.null)
        expected = X @ A.mT + 1.0 + 2 * (2 * C - self.null["label"])
        torch.testing.assert_close(field(X, HALF, {"label": C}), expected, rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize("t", [HALF, T, T[:1], 0.5], ids=["scalar", "batch", "one", "float"])
    def test_one_evaluation_gives_the_numbers_of_two(self, t):
        sizes, dims = [], {"label": 3, "state": 3}
        torch.manual_seed(0)
        network = MLPVelocity(3, hidden=(16, 16), cond_dims=dims).to(F64)
        network.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
        cond = {"state": 2 * C, "label": C}
        guided = Guided(network, 3.0, {"label": self.null["label"] / 10})
        null = guided.null_label.expand(5, 3)
        time = t.expand(5) if isinstance(t, torch.Tensor) and t.ndim else t
        v, product = velocity_and_vjp(guided, X, t, C, cond)
        assert sizes == [10]
        (v_u, p_u), (v_c, p_c) = (
            velocity_and_vjp(network, X, time, C, {**cond, "label": label}) for label in (null, C)
        )
        torch.testing.assert_close(v, v_u + 3 * (v_c - v_u), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(product, p_u + 3 * (p_c - p_u), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
    def test_of_a_mixture_is_the_flow_of_the_guided_score(self, weight):
        """∇ log p_t(x|c)^w p_t(x)^{1-w}, with class and whole known at every time."""
        means = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.0, 2.0]], dtype=F64)
        stds = torch.tensor([0.5, 0.8, 0.3], dtype=F64)
        whole = GaussianMixture.isotropic(means, stds)
        classes = [GaussianMixture.isotropic(means[k], stds[k]) for k in ([0, 1], [2])]
        laws = [*classes, whole]

        def field(x, t, cond):
            every = torch.stack([law(x, t) for law in laws])
            return every[cond["label"], torch.arange(len(x))]

        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
        x, t = x.requires_grad_(), torch.tensor([0.1, 0.3, 0.5, 0.6, 0.8, 0.95], dtype=F64)
        labels = torch.tensor([0, 1, 0, 1, 1, 0])
        v = Guided(field, weight, {"label": torch.tensor([2])})(x, t, {"label": labels})
        log_class = torch.stack([law.log_prob(x, t) for law in classes])[labels, torch.arange(6)]
        log_density = weight * log_class + (1 - weight) * whole.log_prob(x, t)
        (score,) = torch.autograd.grad(log_density.sum(), x)
        torch.testing.assert_close(v, velocity_from_score(x, score, t), rtol=1e-12, atol=1e-12)

    def test_the_null_field_gives_the_unconditional_velocity(self):
        field = Guided(Linear(2 * A), 3.0, self.null, null_field=Linear())
        v_u, v_c = X @ A.mT + self.null["label"], 2 * X @ A.mT + C
        expected = v_u + 3 * (v_c - v_u) + T[:, None]
        torch.testing.assert_close(field(X, T, {"label": C}), expected, rtol=1e-13, atol=1e-13)

    def test_a_null_condition_takes_the_dtype_of_the_condition(self):
        def field(x, t, cond):
            assert cond["label"].dtype == torch.bfloat16
            return x + cond["label"].to(x)

        guided = Guided(field, 2.0, {"label": torch.ones(1, 3)})
        v = guided(X.float(), HALF, {"label": torch.zeros(5, 3, dtype=torch.bfloat16)})
        torch.testing.assert_close(v, X.float() + 1 - 2)

    @pytest.mark.parametrize("cond", [None, {}, {"lable": C}])
    def test_a_missing_condition_is_named(self, cond):
        with pytest.raises(ValueError, match=r"cond lacks \['label'\]"):
            Guided(Linear(), 2.0, self.null)(X, HALF, cond)

    @pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
    def test_a_null_condition_stands_for_one_sample(self, shape):
        with pytest.raises(ValueError, match=r"null_cond\['label'\] must have leading size 1"):
            Guided(Linear(), 2.0, {"label": torch.zeros(shape)})

    def test_a_condition_that_fits_neither_batch_nor_null_is_named(self):
        guided = Guided(Linear(), 2.0, self.null)
        with pytest.raises(ValueError, match=r"cond\['label'\] must have the leading size 5 of x"):
            guided(X, HALF, {"label": C[:1]})
        with pytest.raises(ValueError, match=r"null_cond\['label'\] of shape \(1, 3\) does not"):
            guided(X, HALF, {"label": torch.zeros(5, 2, 3, dtype=F64)[:, :, :2]})

    @pytest.mark.parametrize("weight", [float("nan"), float("inf")])
    def test_the_weight_is_finite(self, weight):
        with pytest.raises(ValueError, match="weight must be finite"):
            Guided(Linear(), weight, self.null)


class TestChecks:
    @pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3)])
    def test_times_broadcast_against_states(self, shape):
        x, t = torch.zeros(shape, dtype=F64), torch.arange(4.0)
        ones = [1] * (len(shape) - 1)
        assert batch_time(t, x).shape == (4, *ones)
        assert batch_time(0.5, x).shape == (1, *ones)
        assert batch_time(batch_time(t, x), x).shape == (4, *ones)
        assert batch_time(t, x).dtype == F64
        assert batch_time(t, x).flatten().tolist() == [0, 1, 2, 3]

    def test_conditions(self):
        check_cond(None, X)
        check_cond({"label": C, "index": torch.arange(5)}, X)
        for bad in (C[:4], C[:1], torch.tensor(0.0)):
            with pytest.raises(ValueError, match=r"cond\['b'\] must have the leading size 5"):
                check_cond({"a": C, "b": bad}, X)

    def test_velocities(self):
        assert check_velocity(X, C) is X
        with pytest.raises(
            ValueError, match=r"net returned shape \(5, 1\) for x of shape \(5, 3\)"
        ):
            check_velocity(X[:, :1], X, "net")
        with pytest.raises(TypeError, match=r"net must return a floating.* got torch.int64"):
            check_velocity(X.long(), X, "net")
        with pytest.raises(TypeError, match="got tuple"):
            check_velocity((X,), X)
