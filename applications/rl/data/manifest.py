"""The manifest of a data file, which tells where the data come from and whether they changed.

``NAME.json`` next to ``NAME.npz`` records the versions that made the data, the seed, the counts,
the fraction of states that meet each task's goal, and the files' SHA-256.  Versions matter: MuJoCo
3.5 changed the contact physics of cubes, scene, puzzles and ants, and an agent trained on data of
one version meets other dynamics in the other.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flows.training import write_json

PACKAGES = ("ogbench", "mujoco", "gymnasium", "numpy")
"""Packages that the data depend on."""
PHYSICS = ("ogbench", "mujoco")
"""Packages that determine the dynamics of the environments."""


class DataError(ValueError):
    """Data are missing, damaged, or not as expected."""


def versions() -> dict[str, str]:
    """Return the versions of Python and `PACKAGES`; ``absent`` where one is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def checksum(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def manifest_path(data: Path) -> Path:
    """Return the path of a data file's manifest; training and validation files share one."""
    return data.with_name(data.name.removesuffix(".npz").removesuffix("-val") + ".json")


def write_manifest(data: Path, content: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """Write the manifest of ``data``, with the installed versions and the checksums of ``files``.

    Returns:
        the content of the manifest.

    Raises:
        OSError: the manifest cannot be written.
    """
    manifest = {
        **content,
        "versions": versions(),
        "files": {path.name: {"sha256": checksum(path), **_size(path)} for path in files},
    }
    write_json(manifest_path(data), manifest, "manifest")
    return manifest


def read_manifest(data: Path) -> dict[str, Any] | None:
    """Read the manifest of ``data``; ``None`` if there is none, as for downloaded files.

    Raises:
        DataError: the file is not a manifest.
    """
    path = manifest_path(data)
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not a manifest: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{path} is not a manifest: it has no entry 'files'")
    return manifest


def verify(data: Path) -> dict[str, str]:
    """Check ``data`` against its manifest, if it has one.

    Returns:
        the versions of the packages that made the data; empty without a manifest.

    Warns:
        UserWarning: the data were made with another version of OGBench or MuJoCo.

    Raises:
        DataError: the checksum of the file differs, or the manifest does not list the file.
    """
    manifest = read_manifest(data)
    if manifest is None:
        return {}
    expected = manifest["files"].get(data.name)
    if expected is None:
        raise DataError(f"{manifest_path(data)} does not list {data.name}; remove it or the data")
    found = checksum(data)
    if found != expected.get("sha256"):
        raise DataError(
            f"{data} is not the file that its manifest describes: SHA-256 is {found[:12]}…, "
            f"expected {str(expected.get('sha256'))[:12]}…; make or download it again"
        )
    made, running = dict(manifest.get("versions", {})), versions()
    differing = [
        f"{name} {made[name]} (running: {running[name]})"
        for name in PHYSICS
        if name in made and made[name] != running[name]
    ]
    if differing:
        warnings.warn(f"{data} was made with {', '.join(differing)}", stacklevel=3)
    return made


def _size(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size}
