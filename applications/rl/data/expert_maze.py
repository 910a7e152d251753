"""An expert for point mazes that follows shortest paths with noise, as in OGBench's data.

The maze is a grid of cells.  A breadth-first search from every goal cell gives, for every other
cell, the neighbour that is closest to it (the first of up, left, down, right among equals).  The
expert's action is the unit vector to the centre of that neighbour plus Gaussian noise of standard
deviation 0.5, clipped to [−1, 1].

``navigate``: the expert runs from a random cell to a random *vertex* (a cell that is not a
corridor), and to another vertex as soon as it is there, in episodes of 1000 transitions (2000 in
the giant maze).  ``stitch``: it runs from a random cell to a cell four cells away, in episodes of
200 transitions, so that the way to a task's goal has to be stitched together.
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import gymnasium
import numpy as np
from numpy.typing import NDArray

from applications.rl.environments.mujoco import import_ogbench
from applications.rl.environments.reproducible import NumpyStream, Reproducible
from applications.rl.environments.tasks import Task

Cell = tuple[int, int]

NOISE = 0.5
"""Standard deviation of the noise on each action."""
STITCH_DISTANCE = 4
"""Cells from the start to the goal of a ``stitch`` episode."""
_NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1))


def open_cells(maze: NDArray[Any]) -> list[Cell]:
    """List the open cells of ``maze`` (rows, columns; 0 is open), row by row."""
    return [(int(i), int(j)) for i, j in np.argwhere(maze == 0)]


def vertices(maze: NDArray[Any]) -> list[Cell]:
    """List the open cells that are not corridors: ends, bends and crossings."""

    def is_corridor(cell: Cell) -> bool:
        walls = tuple(bool(maze[cell[0] + di, cell[1] + dj]) for di, dj in _NEIGHBOURS)
        return walls in ((True, False, True, False), (False, True, False, True))

    return [cell for cell in open_cells(maze) if not is_corridor(cell)]


def distances(maze: NDArray[Any], goal: Cell) -> dict[Cell, int]:
    """Compute the length of the shortest path to ``goal`` from every connected cell."""
    found = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for di, dj in _NEIGHBOURS:
            neighbour = (cell[0] + di, cell[1] + dj)
            if maze[neighbour] == 0 and neighbour not in found:
                found[neighbour] = found[cell] + 1
                queue.append(neighbour)
    return found


def next_cells(maze: NDArray[Any], goal: Cell) -> dict[Cell, Cell]:
    """Map every cell to the next cell on a shortest path to ``goal``, or to itself at the goal."""
    lengths = distances(maze, goal)
    table = {}
    for cell in open_cells(maze):
        around = [(cell[0] + di, cell[1] + dj) for di, dj in _NEIGHBOURS]
        reachable = [cell, *(neighbour for neighbour in around if neighbour in lengths)]
        table[cell] = min(reachable, key=lambda cell: lengths.get(cell, len(lengths)))
    return table


class MazeCollector:
    """Plays episodes of the shortest-path expert in one point maze.

    Arguments:
        task: task with the maze and the kind of behaviour; its goal does not matter.
    """

    def __init__(self, task: Task) -> None:
        import_ogbench()
        env = gymnasium.make(
            f"{task.environment}-v0", terminate_at_goal=False, disable_env_checker=True
        )
        self.point = cast(Any, env.unwrapped)
        self.env = Reproducible(self.point)
        self.maze = self.point.maze_map
        self.stitches = task.kind == "stitch"
        self.cells, self.vertices = open_cells(self.maze), vertices(self.maze)
        self.tables = {goal: next_cells(self.maze, goal) for goal in self.cells}

    @staticmethod
    def protocol(task: Task) -> dict[str, Any]:
        """Return the facts that determine the data; ``episode`` is a number of transitions."""
        episode = 200 if task.kind == "stitch" else 2000 if "giant" in task.environment else 1000
        return {"expert": "shortest paths", "episode": episode, "noise": NOISE}

    def episode(self, seed: int, transitions: int) -> dict[str, NDArray[Any]]:
        """Play one episode, a function of ``seed``; return it in OGBench's layout.

        Returns:
            observations (T+1, 2), actions (T+1, 2), terminals (T+1,), qpos and qvel, where the last
            row is the state after the T-th transition, with an action without a next state.
        """
        rng = np.random.default_rng(seed)
        point = self.point
        start = self._pick(rng, self.cells)
        goal = self._first_goal(rng, start)
        places = {"task_info": {"init_ij": start, "goal_ij": goal}}
        observation, _ = self.env.reset(seed=seed, options=places)
        rows: dict[str, list[Any]] = {"observations": [], "actions": [], "qpos": [], "qvel": []}
        with NumpyStream(seed):
            for _ in range(transitions + 1):
                position = point.get_xy()
                way = self._centre(self.tables[goal][point.xy_to_ij(position)]) - position
                action = way / (np.linalg.norm(way) + 1e-6) + rng.normal(0.0, NOISE, 2)
                action = np.clip(action, -1.0, 1.0).astype(np.float32)
                rows["observations"].append(observation)
                rows["actions"].append(action)
                observation, _, _, _, info = point.step(action)
                rows["qpos"].append(info["prev_qpos"])
                rows["qvel"].append(info["prev_qvel"])
                if info["success"] and not self.stitches:
                    goal = self._pick(rng, self.vertices)
                    point.set_goal(goal_xy=self._centre(goal) + rng.uniform(-1.0, 1.0, 2))
        episode = {name: np.array(values, np.float32) for name, values in rows.items()}
        return episode | {"terminals": np.arange(transitions + 1) == transitions}

    def _first_goal(self, rng: np.random.Generator, start: Cell) -> Cell:
        if not self.stitches:
            return self._pick(rng, self.vertices)
        near = distances(self.maze, start)
        return self._pick(rng, [c for c in near if near[c] == STITCH_DISTANCE] or [start])

    def _pick(self, rng: np.random.Generator, cells: list[Cell]) -> Cell:
        return cells[rng.integers(len(cells))]

    def _centre(self, cell: Cell) -> NDArray[Any]:
        return np.array(self.point.ij_to_xy(cell))
