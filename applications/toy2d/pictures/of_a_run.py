"""The pictures of a finished run, from its samples, fields and logs."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from applications.common.lock import locked
from applications.toy2d.exact_tilt import GridTilt, ResampledTilt
from applications.toy2d.pictures import plane as pictures
from applications.toy2d.pictures.animation import flow_animation
from applications.toy2d.pictures.charts import certificate_histogram, training_curves
from applications.toy2d.run import Run
from flows import VelocityField, sample, uniform

CONTROL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
RESOLUTION = 160
CONTROL = r"$u = v_\mathrm{tilted} - v_\mathrm{base}$ over the tilted flow's density"
CURVES = ("loss", "reward", "log_weight_std", "path_kl", "grad_norm", "ess")


def plane_points(extent: float, resolution: int) -> Tensor:
    """Return the cell centres (R², 2) of the window, first coordinate slowest."""
    axis = (torch.arange(resolution) + 0.5) * (2 * extent / resolution) - extent
    return torch.cartesian_prod(axis, axis)


@torch.no_grad()
def control_on_grid(tilted: VelocityField, base: VelocityField, extent: float) -> Tensor:
    """Compute u = v_tilted - v_base at the times ``CONTROL_TIMES``, (T, R, R, 2) with R = 50."""
    points = plane_points(extent, 50)
    fields = [
        tilted(points, torch.tensor(t)) - base(points, torch.tensor(t)) for t in CONTROL_TIMES
    ]
    return torch.stack(fields).reshape(len(CONTROL_TIMES), 50, 50, 2)


def closed_form_densities(run: Run) -> tuple[Tensor | None, Tensor | None]:
    """Compute base and exact densities on the picture's cells where a closed form is known."""
    mixture = run.target.mixture
    if not isinstance(run.exact, GridTilt) or mixture is None:
        return None, None
    points = plane_points(run.target.extent, RESOLUTION)
    log_p = mixture.log_prob(points)
    r = run.reward(points) / run.config.temperature
    shape = (RESOLUTION, RESOLUTION)
    return log_p.exp().reshape(shape), (log_p + r - run.exact.log_z).exp().reshape(shape)


def save_pictures(run: Run) -> list[Path]:
    """Write every picture into the run's folder and return their paths.

    Raises:
        RunError: another run is in that folder by now.
        OSError: a picture cannot be written.
    """
    with locked(run.config.path):
        return _save_pictures(run)


def _save_pictures(run: Run) -> list[Path]:
    """Write the pictures into the folder, which is locked."""
    folder, extent = run.config.path, run.target.extent
    report, generator = run.report, torch.Generator().manual_seed(run.config.seed)
    reward_map = run.reward(plane_points(extent, RESOLUTION)).reshape(RESOLUTION, RESOLUTION)
    known_base, known_exact = closed_form_densities(run)
    x0 = torch.randn(4000, 2, generator=generator)
    times = uniform(60)
    paths = [
        sample(field, x0, grid=times, trajectory=True)
        for field in (run.tilted.base, run.tilted.field)
    ]
    moments = [round(60 * t) for t in CONTROL_TIMES]
    certificate, before = run.tilted.certificate, run.tilted.certificate_base
    assert certificate is not None
    assert before is not None
    title = f"{run.target.name}, tilted toward {run.reward.name}"
    temperature = run.config.temperature
    scaled = "" if temperature == 1 else " / temperature"
    heat = "" if temperature == 1 else f"; temperature {temperature:g}"
    subtitle = run.reward.description + heat
    if isinstance(run.exact, ResampledTilt):
        subtitle += "; exact tilt: the base's own samples, resampled (with repeats)"
    log_z, log_z_stderr = (float(report[f"log_z_exact{end}"]) for end in ("", "_stderr"))

    def triptych() -> Path:
        def caption(name: str) -> str:
            mean = float(report[name])
            return "too few effective samples" if math.isnan(mean) else f"mean reward {mean:.2f}"

        return pictures.triptych(
            folder / "densities.png",
            pictures.Layer(run.base_samples, known_base, caption("reward_base")),
            pictures.Layer(run.tilted_samples, None, caption("reward_tilted")),
            pictures.Layer(
                run.exact.sample(run.config.samples, generator),
                known_exact,
                caption("reward_exact"),
            ),
            extent=extent,
            reward=reward_map,
            title=title,
            subtitle=subtitle,
        )

    jobs = [
        triptych,
        lambda: pictures.particle_paths(
            folder / "paths.png",
            *paths,
            extent=extent,
            subtitle=f"the same noise carried by the base flow and by the tilted flow{heat}",
        ),
        lambda: pictures.control_field(
            folder / "control.png",
            control_on_grid(run.tilted.field, run.tilted.base, extent),
            torch.tensor(CONTROL_TIMES),
            extent=extent,
            samples=paths[1][moments],
            subtitle=CONTROL + heat,
        ),
        lambda: certificate_histogram(
            folder / "certificate.png",
            before.log_weights,
            certificate.log_weights,
            log_z_exact=None if math.isnan(log_z) else log_z,
            log_z_exact_stderr=log_z_stderr,
            subtitle=f"log-weights of trajectories; the exact tilt is one spike at log Z{heat}",
        ),
    ]
    if run.config.iterations:
        jobs.append(
            lambda: training_curves(
                folder / "training.png",
                folder / "tilt.csv",
                columns=CURVES,
                labels={"reward": f"reward{scaled}"},
                refined_from=run.config.tilt_options.refine_from,
                subtitle=heat.removeprefix("; "),
            )
        )
    if run.config.animation:
        jobs.append(
            lambda: flow_animation(
                folder / "flow.gif", *paths, extent=extent, times=times, reward=reward_map
            )
        )
    return [job() for job in tqdm(jobs, desc="pictures", leave=False)]
