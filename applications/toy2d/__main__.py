"""Command line: ``python -m applications.toy2d COMMAND``; `PROGRAM` names the commands."""

from __future__ import annotations

import sys

from applications.common.command_line import Command, Program
from flows.training import prepare_process

COMMANDS = "applications.toy2d.commands"

PROGRAM = Program(
    "python -m applications.toy2d",
    {
        "run": Command(
            COMMANDS, "RunConfig", "show_run", "tilt one flow in the plane toward one reward"
        ),
        "demo": Command(COMMANDS, "Demo", "show_demo", "both demonstrations, in minutes"),
        "gallery": Command(
            "applications.toy2d.gallery",
            "GalleryConfig",
            "show_gallery",
            "draw all targets and rewards in one figure",
        ),
        "digits": Command(
            COMMANDS, "DigitsConfig", "show_digits", "tilt a flow of handwritten digits"
        ),
        "list": Command(COMMANDS, "List", "show_list", "name the targets, rewards and kernels"),
    },
)
main, parse = PROGRAM.main, PROGRAM.parse

if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
