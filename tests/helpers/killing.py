"""Run a training in processes of its own and kill them by SIGKILL at random moments.

The training is a function ``train(*arguments, report)`` at the top level of a module.  It is called
with the same arguments every time, resumes by itself, and has ``report`` among its callbacks.
Waiting for a reported iteration, rather than for a time, makes the kills land in the midst of
training on machines of any speed.  The processes are forked from a server that has imported
PyTorch already, so that a kill costs a fraction of a second.
"""

import multiprocessing
import random
import signal
import time

from flows.training.callbacks import Callback

PRELOADED = ["torch", "torch._dynamo", "flows.training.fit", "applications.rl.training.train"]


class Report(Callback):
    """Sends the number of each iteration as soon as the other callbacks have seen it."""

    def __init__(self, connection):
        self.connection = connection

    def on_step(self, trainer, iteration, metrics):
        self.connection.send(iteration)


def run_with_kills(train, *arguments, iterations, kills, seed, longest_delay=0.01):
    """Kill ``train`` ``kills`` times, then let it finish; the first iteration of each process.

    Each kill comes a random time of at most ``longest_delay`` seconds after a random iteration.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    rng = random.Random(seed)
    targets = sorted(rng.sample(range(1, iterations * 9 // 10), kills))
    starts = []
    for target in [*targets, None]:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=train, args=(*arguments, Report(sender)), daemon=True)
        process.start()
        sender.close()
        first = None
        for iteration in _received(receiver):
            first = first or iteration
            if target is not None and iteration >= target:
                time.sleep(rng.uniform(0, longest_delay))
                process.kill()
                break
        process.join(timeout=60)
        assert process.exitcode == (0 if target is None else -signal.SIGKILL)
        starts.append(first)
    return starts


def _received(connection):
    with connection:
        while True:
            try:
                yield connection.recv()
            except (EOFError, OSError):  # the process has ended
                return
