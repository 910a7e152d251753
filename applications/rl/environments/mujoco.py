"""Importing MuJoCo and OGBench without a display, or with one for pictures."""

from __future__ import annotations

import os
import sys

from applications.common.errors import RunError

_OFF = ("disable", "disabled", "off", "false", "0")


def prepare_mujoco(*, render: bool = False) -> None:
    """Choose the rendering backend of MuJoCo before it is imported, unless ``MUJOCO_GL`` is set.

    Without ``render``, rendering is disabled: on a machine without a display, creating a maze
    environment would abort the process.  With ``render``, EGL is chosen where there is no display.

    Raises:
        RunError: rendering is asked for, but MuJoCo runs without it already.
    """
    if not render:
        os.environ.setdefault("MUJOCO_GL", "disabled")
    elif os.environ.get("MUJOCO_GL", "").lower() in _OFF and "mujoco" in sys.modules:
        raise RunError(
            "MuJoCo was imported without rendering; set MUJOCO_GL=egl before the program starts"
        )
    elif os.environ.get("MUJOCO_GL", "").lower() in ("", *_OFF) and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = "glfw" if os.environ.get("DISPLAY") else "egl"


def import_ogbench() -> None:
    """Import OGBench, which registers its environments in Gymnasium.

    Raises:
        ImportError: OGBench is not installed; the message says how to install it.
    """
    prepare_mujoco()
    try:
        import ogbench  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "OGBench's tasks need the package's extra 'rl': "
            "pip install 'adjoint-matching[rl]', on Python 3.13 then also "
            f"pip install --no-deps ogbench dm_control ({error})"
        ) from error
