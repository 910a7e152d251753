"""A Gaussian mixture as a flow: velocity, score, likelihood and tilt in closed form.

Let X1 ~ Σ_k w_k N(m_k, S_k) and X_t = t X1 + (1 - t) X0 with X0 ~ N(0, I).  Then X_t is a mixture
of N(t m_k, C_k), C_k = t² S_k + (1 - t)² I, and given component k both ends are Gaussian, so that
with the responsibilities γ_k(x) = P(k | X_t = x)

    E[X1 | X_t = x] = Σ γ_k (m_k + t S_k C_k⁻¹ (x - t m_k)),
    E[X0 | X_t = x] = Σ γ_k (1 - t) C_k⁻¹ (x - t m_k),
    score           = -Σ γ_k C_k⁻¹ (x - t m_k),
    v = E[X1 - X0 | X_t = x] = Σ γ_k (m_k + (t S_k - (1 - t) I) C_k⁻¹ (x - t m_k)).

Nothing divides by t or by 1 - t: C_k is at least the smaller of I/2 and S_k/2, and v is E[X1] - x
at t = 0 and x at t = 1.  With S_k = Q_k diag(λ_k) Q_kᵀ every matrix above is diagonal in the
eigenbasis of its component, so that one evaluation is two matrix products and elementwise work.

The tilt by r(x) = -½ xᵀA x + bᵀx keeps the family (complete the square in each component):

    S_k* = (S_k⁻¹ + A)⁻¹,   m_k* = S_k* (S_k⁻¹ m_k + b),
    log w_k* = log w_k + ½ log|S_k*| - ½ log|S_k| + ½ m_k*ᵀ S_k*⁻¹ m_k* - ½ m_kᵀ S_k⁻¹ m_k - log Z.

The tests use it as their reference: a flow whose tilt is known exactly, at every time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flows.field import Cond


class GaussianMixture(nn.Module):
    """A Gaussian mixture Σ_k w_k N(m_k, S_k) in d dimensions, with its exact velocity field.

    A module without parameters: ``to``, ``double`` and ``state_dict`` work, nothing trains.  Inputs
    of another dtype are computed in the mixture's dtype and returned in their own.

    Arguments:
        weights: w, shape (C,), positive; normalised to sum to one.
        means: m, shape (C, d); their dtype is that of the mixture.
        covariances: S, shape (C, d, d), symmetric positive definite.

    Raises:
        ValueError: a shape does not fit, a value is not finite, a weight is not positive, or a
            covariance is not symmetric positive definite.

    Example:
        >>> mixture = GaussianMixture.isotropic(torch.tensor([[-2.0], [2.0]]), std=0.5)
        >>> mixture(torch.zeros(1, 1), torch.tensor(0.5))
        tensor([[0.]])
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    log_weights: Tensor
    eigenvalues: Tensor
    basis: Tensor
    centres: Tensor
    broadcasts = True  # see `flows.field`

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        _check(weights, means, covariances)
        dtype = means.dtype
        w = weights.double() / weights.double().sum()
        S = covariances.double()
        eigenvalues, Q = torch.linalg.eigh(0.5 * (S + S.mT))
        _require_positive(eigenvalues[:, 0], "covariances must be positive definite")
        self.register_buffer("weights", w.to(dtype))
        self.register_buffer("means", means.clone())
        self.register_buffer("covariances", S.to(dtype))
        # Shaped to broadcast against (C, d, B): log w (C, 1), λ and Q_kᵀ m_k (C, d, 1), and all
        # Q_k side by side (d, C d).
        centres = torch.einsum("kij,ki->kj", Q, means.double())
        self.register_buffer("log_weights", w.log()[:, None].to(dtype))
        self.register_buffer("eigenvalues", eigenvalues[..., None].to(dtype))
        self.register_buffer("centres", centres[..., None].to(dtype))
        self.register_buffer("basis", Q.permute(1, 0, 2).flatten(1).to(dtype))

    @classmethod
    def isotropic(
        cls, means: Tensor, std: float | Tensor, weights: Tensor | None = None
    ) -> GaussianMixture:
        """Return a mixture of N(m_k, std_k² I), ``std`` a float or (C,), equal weights if None."""
        if means.ndim != 2:
            raise ValueError(f"means must have shape (C, d), got {tuple(means.shape)}")
        count, dim = means.shape
        scale = torch.as_tensor(std, dtype=means.dtype, device=means.device)
        if scale.ndim > 1 or scale.numel() not in (1, count):
            raise ValueError(f"std must be a scalar or ({count},), got shape {tuple(scale.shape)}")
        if not bool((scale > 0).all()):
            raise ValueError(f"std must be positive, got {scale.tolist()}")
        eye = torch.eye(dim, dtype=means.dtype, device=means.device)
        covariances = scale.expand(count)[:, None, None].square() * eye
        return cls(means.new_ones(count) if weights is None else weights, means, covariances)

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.means.shape[1]

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Return the velocity E[X1 - X0 | X_t = x], shape (B, d).

        ``t`` is a scalar or (B,), here and in every method; ``cond`` is ignored.  This method also
        takes x (S, B, d) with t (S, 1).
        """
        if x.ndim == 3:
            times = torch.as_tensor(t).expand(x.shape[:2]).flatten()
            return self.forward(x.flatten(0, 1), times).reshape(x.shape)
        time = self._time(x, t)
        return self._average(x, time, time * self.eigenvalues - (1 - time), self.centres)

    def clean(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return the posterior mean E[X1 | X_t = x], shape (B, d)."""
        time = self._time(x, t)
        return self._average(x, time, time * self.eigenvalues, self.centres)

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return the score ∇ log p_t(x) of the marginal at ``t``, shape (B, d)."""
        time = self._time(x, t)
        return self._average(x, time, -torch.ones_like(time), torch.zeros_like(self.centres))

    def log_prob(self, x: Tensor, t: Tensor | float = 1.0) -> Tensor:
        """Return the log density of the marginal at ``t`` in nats, shape (B,)."""
        log_joint, _, _ = self._components(x, self._time(x, t))
        return log_joint.logsumexp(0).to(x.dtype)

    def responsibilities(self, x: Tensor, t: Tensor | float = 1.0) -> Tensor:
        """Return the posterior probability of each component given X_t = x, shape (B, C)."""
        log_joint, _, _ = self._components(x, self._time(x, t))
        return log_joint.softmax(0).mT.to(x.dtype)

    def posterior_covariance(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return the posterior covariance Cov(X1 | X_t = x), shape (B, d, d).

        It is ((1 - t)²/t) times the Jacobian of ``clean``.  Within a component it is (1 - t)² S_k
        C_k⁻¹; the component means add their spread.
        """
        time = self._time(x, t)
        log_joint, whitened, c = self._components(x, time)
        gamma, Q = log_joint.softmax(0), self._eigenvectors()
        local = self.centres + time * self.eigenvalues * whitened
        local = torch.einsum("kij,kjb->kib", Q, local)  # E[X1 | x, k]
        spread = local - (gamma[:, None] * local).sum(0)
        within = gamma[:, None] * (1 - time).square() * self.eigenvalues / c
        covariance = torch.einsum("kij,kjb,klj->bil", Q, within, Q)
        return (covariance + torch.einsum("kb,kib,klb->bil", gamma, spread, spread)).to(x.dtype)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` independent samples of X1, shape (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(
            n, self.dim, generator=generator, dtype=self.means.dtype, device=self.means.device
        )
        factors = self._eigenvectors() * self.eigenvalues.mT.sqrt()  # F Fᵀ = S
        x = torch.empty_like(noise)
        for c in k.unique().tolist():  # a factor for each sample would take n d² numbers
            rows = (k == c).nonzero()[:, 0]
            x[rows] = torch.addmm(self.means[c], noise[rows], factors[c].mT)
        return x

    def marginal(self, t: float) -> GaussianMixture:
        """Return the distribution of X_t, a mixture of N(t m_k, t² S_k + (1 - t)² I).

        Raises:
            ValueError: ``t`` is outside [0, 1].
        """
        if not 0 <= t <= 1:
            raise ValueError(f"t must lie in [0, 1], got {t}")
        eye = torch.eye(self.dim, dtype=self.means.dtype, device=self.means.device)
        covariances = t**2 * self.covariances + (1 - t) ** 2 * eye
        weights = self.log_weights[:, 0].double().exp()  # may underflow in single precision
        return GaussianMixture(weights, t * self.means, covariances)

    def tilt(self, A: Tensor, b: Tensor) -> tuple[GaussianMixture, Tensor]:
        """Return the tilt p*(x) = p(x) exp(r(x)) / Z by r(x) = -½ xᵀA x + bᵀx, and log Z (scalar).

        Weights that underflow are kept at the smallest normal double, about 1e-308.

        Arguments:
            A: shape (d, d); only its symmetric part matters, it need not be definite.
            b: shape (d,).

        Raises:
            ValueError: a shape does not fit, or S_k⁻¹ + A is not positive definite for some k, for
                which the tilt is not a probability distribution.
        """
        dim = self.dim
        if A.shape != (dim, dim) or b.shape != (dim,):
            raise ValueError(
                f"A and b must have shapes ({dim}, {dim}) and ({dim},), "
                f"got {tuple(A.shape)} and {tuple(b.shape)}"
            )
        S, m = self.covariances.double(), self.means.double()
        A64, b64 = 0.5 * (A + A.mT).to(m), b.to(m)
        precision = torch.linalg.inv(S)
        smallest = torch.linalg.eigvalsh(0.5 * (precision + precision.mT) + A64)[:, 0]
        _require_positive(smallest, "A must keep S_k⁻¹ + A positive definite")
        # About each mean, r(m + y) = r(m) + gᵀy - ½ yᵀA y, so that nothing large cancels where S is
        # narrow: with M = (S⁻¹ + A)⁻¹ = (I + S A)⁻¹ S the mean moves by M g.
        spread = torch.eye(dim, dtype=m.dtype, device=m.device) + S @ A64
        M = torch.linalg.solve(spread, S)
        tilted_S = 0.5 * (M + M.mT)
        g = b64 - m @ A64
        moved = torch.einsum("kij,kj->ki", tilted_S, g)
        tilted_m = m + moved
        log_w = (
            self.log_weights[:, 0].double()
            + m @ b64
            - 0.5 * ((m @ A64) * m).sum(1)
            + 0.5 * (g * moved).sum(1)
            - 0.5 * torch.linalg.slogdet(spread)[1]
        )
        log_z = log_w.logsumexp(0)
        dtype = self.means.dtype
        weights = (log_w - log_z).exp().clamp_min(torch.finfo(torch.float64).tiny)
        return GaussianMixture(weights, tilted_m.to(dtype), tilted_S), log_z.to(dtype)

    def mean(self) -> Tensor:
        """Return the mean E[X1], shape (d,)."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Return the covariance Cov(X1), shape (d, d)."""
        spread = self.means - self.mean()
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        return within + torch.einsum("k,ki,kj->ij", self.weights, spread, spread)

    def _eigenvectors(self) -> Tensor:
        """Return Q, shape (C, d, d), with the eigenvectors of component k as the columns of Q_k."""
        return self.basis.reshape(self.dim, -1, self.dim).permute(1, 0, 2)

    def _time(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Check ``x`` and return ``t`` in the mixture's dtype, shape (1, 1, 1) or (1, 1, B)."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must have shape (B, {self.dim}), got {tuple(x.shape)}")
        return torch.as_tensor(t, dtype=self.means.dtype, device=x.device).reshape(1, 1, -1)

    def _components(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log w_k N(x; t m_k, C_k) (C, B), C_k⁻¹ (x - t m_k) and variances c (C, d, B or 1).

        C_k⁻¹ (x - t m_k) and c are in each component's eigenbasis.  The batch comes last: sums over
        a handful of dimensions or components are then vectorised.
        """
        y = _matmul(self.basis.mT, x.to(self.means.dtype).mT).unflatten(0, self.means.shape)
        y = y - time * self.centres
        c = time.square() * self.eigenvalues + (1 - time).square()
        whitened = y / c
        quadratic = torch.addcmul(c.log() + math.log(2 * math.pi), y, whitened).sum(1)
        # The floor keeps points finite whose square overflows.
        log_joint = (self.log_weights - 0.5 * quadratic).clamp_min(torch.finfo(y.dtype).min)
        return log_joint, whitened, c

    def _average(self, x: Tensor, time: Tensor, coefficient: Tensor, centres: Tensor) -> Tensor:
        """Return Σ_k γ_k Q_k (centres_k + coefficient · C_k⁻¹ (x - t m_k)), shape (B, d)."""
        log_joint, whitened, _ = self._components(x, time)
        local = torch.addcmul(centres, coefficient, whitened)
        weighted = (log_joint.softmax(0)[:, None] * local).flatten(0, 1)
        return _matmul(weighted.mT, self.basis.mT).to(x.dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply outside autocast: an exact reference must not be rounded to bfloat16."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _require_positive(smallest: Tensor, requirement: str) -> None:
    """Raise ValueError if one component's smallest eigenvalue, (C,), is not positive."""
    if not bool((smallest > 0).all()):
        k = int(smallest.argmin())
        raise ValueError(f"{requirement}; component {k} has eigenvalue {smallest[k].item():.6g}")


def _check(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    """Check shapes, signs and symmetry of the arguments of `GaussianMixture`."""
    if not means.is_floating_point():
        raise ValueError(f"means must be floating point, got {means.dtype}")
    shapes = [tuple(value.shape) for value in (weights, means, covariances)]
    if means.ndim != 2 or shapes != [shapes[1][:1], shapes[1], (*shapes[1], shapes[1][1])]:
        raise ValueError(
            "weights, means and covariances must have shapes (C,), (C, d) and (C, d, d), "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    for name, value in (("weights", weights), ("means", means), ("covariances", covariances)):
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {value.tolist()}")
    if not bool((weights > 0).all()):
        raise ValueError(f"weights must be positive, got {weights.tolist()}")
    asymmetry = float((covariances - covariances.mT).abs().max())
    if asymmetry > 1e-5 * float(covariances.abs().max()):
        raise ValueError(f"covariances must be symmetric, got a largest difference {asymmetry:.6g}")
