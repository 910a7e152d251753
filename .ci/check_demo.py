"""Check the folder that the demo wrote: both reports complete and finite, all pictures there."""

import json
import math
import sys
from pathlib import Path

TOY = (
    "target",
    "reward",
    "kernel",
    "steps",
    "reward_base",
    "reward_tilted",
    "reward_exact",
    "log_z",
    "log_z_exact",
    "log_weight_std_base",
    "log_weight_std",
    "ess",
    "path_kl",
    "w2_ratio",
    "mode_tv",
    "seconds",
)
PICTURES = (
    "densities.png",
    "paths.png",
    "control.png",
    "certificate.png",
    "training.png",
    "flow.gif",
)


def check(folder: Path) -> None:
    """Raise AssertionError naming what is missing or wrong."""
    report = json.loads((folder / "report.json").read_text())
    missing = [name for name in TOY if name not in report]
    assert not missing, f"report.json lacks {missing}"
    bad = [k for k, v in report.items() if v is None or (type(v) is float and not math.isfinite(v))]
    assert not bad, f"report.json has values that are not finite: {bad}"
    assert report["reward_tilted"] > report["reward_base"], "the tilt did not raise the reward"
    assert report["log_weight_std"] < report["log_weight_std_base"], "the certificate did not fall"
    for name in PICTURES:
        assert (folder / name).stat().st_size > 1000, f"{name} is empty"
    digits = json.loads((folder / "digits" / "report.json").read_text())
    assert digits["reward_tilted"] > digits["reward_base"], "the digits' reward did not rise"
    assert list((folder / "digits").glob("*.png")), "no picture of the digits"
    print(f"{folder}: reports and pictures are complete")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
