"""Jobs on Ray, which is started on this machine or found as a cluster by its address.

A job is one task of Ray.  When its worker or node dies, it is submitted again, and training
continues from the last checkpoint on any node.  So all nodes must have the same folder of runs, as
on a shared file system, and also this package and the data.  A death counts only if there was no
new checkpoint since the death before.  A long run on machines that are taken away every hour is
therefore kept, and a run that kills its worker each time is given up.  (Ray's own retries count all
deaths, or none where memory was short.)

Ray's own messages are switched off.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from applications.common.errors import RunError
from applications.rl.sweep import folders
from applications.rl.sweep.plan import Job, Run, State, slots
from applications.rl.sweep.worker import Train, one_line, work
from flows.training import prepare_process

PATIENCE = 5.0
"""Seconds to wait for an answer from an address."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # nothing of what nodes report is printed
    "RAY_worker_niceness": "0",  # at 15, Ray's own, a shared machine would hardly let them run
}
"""Environment variables for Ray, read when it is imported; those set already are left alone."""
OBJECTS = 80 * 2**20
"""Size in bytes of Ray's object store, which jobs hardly use."""


@contextmanager
def engine(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Start Ray or connect to a cluster, for the duration of the context.

    If this process is connected to Ray already, that connection is used and kept.

    Arguments:
        address: address of a cluster: ``HOST:PORT``, ``ray://HOST:PORT``, or ``auto`` for the
            cluster of this machine; None starts Ray here, which ends with the context.
        cpus: number of CPUs of a Ray that is started; all of the machine if not given.

    Raises:
        ImportError: Ray is not installed.
        RunError: there is no cluster at the address, or it cannot be used; one line.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ImportError("a sweep needs Ray: pip install 'adjoint-matching[cluster]'") from error
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address is None:
        options |= {"address": "local", "num_cpus": cpus, "object_store_memory": OBJECTS}
        options |= {"include_dashboard": False}
    else:
        check_address(address)
        options |= {"address": address}
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        where = address or "this machine"
        raise RunError(f"address: Ray cannot use {where}: {one_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse an address without a Ray server at once; Ray itself would try it for minutes.

    Raises:
        RunError: there is no connection within `PATIENCE`, or the server does not speak HTTP/2, as
            all servers of Ray do.
    """
    if address in ("auto", "local"):  # Ray finds these at once or fails at once
        return
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        place = (parts.hostname or "", parts.port or 0)
    except ValueError:
        place = ("", 0)
    if not all(place):
        raise RunError(f"address must be HOST:PORT, ray://HOST:PORT or auto, got {address!r}")
    try:
        with socket.create_connection(place, PATIENCE) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":  # with TLS the handshake differs
                return
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, *[0] * 5]))
            answer = connection.recv(9)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"address: no Ray cluster answers at {address} ({reason})") from error
    if answer[3:4] != b"\x04":  # a SETTINGS frame, the first frame of an HTTP/2 server
        raise RunError(f"address: the server at {address} is no Ray cluster")


def room(cpus: float, gpus: float) -> int:
    """Count the jobs with these CPUs and GPUs that the nodes can run at a time, now."""
    import ray

    fits = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        places = [slots(has.get(k, 0), n) for k, n in (("CPU", cpus), ("GPU", gpus)) if n]
        fits += min(places)
    return fits


def execute(
    jobs: Sequence[Job],
    train: Train,
    *,
    cpus: float,
    gpus: float,
    retries: int,
    poll: float,
) -> Iterator[dict[Run, State]]:
    """Train all jobs; yield the states of all runs repeatedly until every run has ended.

    Arguments:
        jobs: jobs whose configurations have ``resume`` set.
        train: picklable function that a job calls in its worker.
        cpus, gpus: CPUs and GPUs of a job.
        retries: number of deaths in a row without a new checkpoint that a job survives.
        poll: seconds between two looks.
    """
    import ray

    environment = {"TQDM_DISABLE": "1"}
    if "OGBENCH_DATA" in os.environ:
        environment["OGBENCH_DATA"] = os.environ["OGBENCH_DATA"]
    task = ray.remote(_work).options(
        num_cpus=cpus, num_gpus=gpus, max_retries=0, runtime_env={"env_vars": environment}
    )
    states = {run: State() for job in jobs for run in job.runs}
    waiting: dict[Any, _Attempt] = {}

    def submit(job: Job, deaths: int, in_row: int) -> None:
        name = uuid.uuid4().hex
        attempt = _Attempt(job, deaths, in_row, folders.checkpoint_stamp(job))
        waiting[task.remote(job, name, train)] = attempt
        states.update({run: State("submitted", "", name, deaths) for run in job.runs})

    try:
        for job in jobs:
            submit(job, 0, 0)
        while waiting:
            yield dict(states)
            # Waiting for fewer would return at once when one is ready; this looks once in `poll`.
            ready, _ = ray.wait([*waiting], num_returns=len(waiting), timeout=poll)
            for reference in ready:
                attempt = waiting.pop(reference)
                job, deaths = attempt.job, attempt.deaths
                try:
                    notes = ray.get(reference)
                except ray.exceptions.RayTaskError as error:  # the task could not start
                    notes = dict.fromkeys(job.config.seeds, one_line(error.cause))
                except ray.exceptions.RayError as error:
                    moved = folders.checkpoint_stamp(job) != attempt.stamp
                    in_row = 0 if moved else attempt.in_row + 1
                    if in_row <= retries:
                        submit(job, deaths + 1, in_row)
                        continue
                    deaths += 1
                    what = f"workers died without a new checkpoint, {in_row} in a row; the last: "
                    notes = dict.fromkeys(job.config.seeds, what + one_line(error))
                for run in job.runs:
                    note = notes.get(run.seed, "")
                    states[run] = State("failed" if note else "done", note, deaths=deaths)
        yield dict(states)
    finally:
        for reference in waiting:  # in a cluster, jobs would outlive this process
            ray.cancel(reference, force=True)


@dataclass(frozen=True)
class _Attempt:
    """A submission of a job: the deaths before it, and the times of its checkpoints then."""

    job: Job
    deaths: int
    in_row: int
    stamp: tuple[int, ...]


def _work(job: Job, attempt: str, train: Train) -> dict[int, str]:
    import ray

    prepare_process()
    return work(job, attempt, train, ray.get_runtime_context().get_node_id())
