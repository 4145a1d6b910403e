"""Download the freely licensed packages that the data set of captioned images is made of.

Packages are downloaded by ``apt-get download`` and ``npm pack`` into ``RAW/archives`` and
unpacked, not installed, into ``RAW/<package>``.  Existing files are kept, so an interrupted run
can be started again.  A package that fails is one line on stderr; the others are still fetched.

    python recipes/data/fetch.py --raw RAW
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from qt_resources import extract_images

DEBIAN_PACKAGES = (
    "openclipart-png",
    "tuxpaint-stamps-default",
    "dataset-fashion-mnist",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
    "gnome-backgrounds",
    "mate-backgrounds",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "endless-sky-data",
    "gcompris-qt-data",
    "wamerican",
)
NPM_PACKAGES = ("emoji-datasource-google@16.0.0", "@lobehub/fluent-emoji-3d@1.1.0")


class FetchError(RuntimeError):
    """A package could not be fetched or unpacked."""


def run(command: list[str], cwd: Path) -> str:
    """Run a client in `cwd`; return its stdout. Raises FetchError with its last message."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"the program {command[0]!r} is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise FetchError(f"{' '.join(command)} failed ({done.returncode}): {lines[-1]}")
    return done.stdout


def find_archive(folder: Path, pattern: str) -> Path | None:
    """The newest archive in `folder` that matches `pattern`, if there is one."""
    found = sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name))
    return found[-1] if found else None


def fetch_archive(command: list[str], archives: Path, pattern: str) -> Path:
    """Get one archive with `command`, unless `archives` holds it.

    It is downloaded to a temporary folder, so that an incomplete archive is never used.
    """
    archive = find_archive(archives, pattern)
    if archive is not None:
        return archive
    scratch = archives / "partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    run(command, cwd=scratch)
    fresh = find_archive(scratch, pattern)
    if fresh is None:
        raise FetchError(f"{' '.join(command)} left no file like {pattern}")
    archive = fresh.rename(archives / fresh.name)
    shutil.rmtree(scratch)
    return archive


def unpack(archive: Path, target: Path) -> None:
    """Unpack a .deb or .tgz into `target`, which appears only when it is complete."""
    scratch = target.with_name(target.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if archive.suffix == ".deb":
        run(["dpkg-deb", "-x", str(archive.resolve()), str(scratch.resolve())], cwd=scratch)
        for resources in sorted(scratch.rglob("*.rcc")):
            extract_images(resources)
    else:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
        except (tarfile.TarError, OSError) as error:
            raise FetchError(f"cannot unpack {archive.name}: {error}") from error
    scratch.rename(target)


def archive_version(archive: Path) -> str:
    """The version of a fetched package, from its metadata."""
    if archive.suffix == ".deb":
        field = ["dpkg-deb", "-f", str(archive.resolve()), "Version"]
        return run(field, cwd=archive.parent).strip()
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/package.json")
        if member is None:
            raise FetchError(f"{archive.name} has no package.json")
        return str(json.load(member)["version"])


def fetch_package(name: str, command: list[str], pattern: str, raw: Path) -> str:
    """Fetch and unpack one package; return its version."""
    archives = raw / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    archive = fetch_archive(command, archives, pattern)
    target = raw / name
    if not target.is_dir():
        unpack(archive, target)
    return archive_version(archive)


def main(argv: list[str] | None = None) -> int:
    """Fetch everything; the exit status is the number of packages that failed."""
    parser = argparse.ArgumentParser(description="Fetch the packages of the captioned data set.")
    parser.add_argument("--raw", type=Path, required=True, help="folder for the packages")
    raw = parser.parse_args(argv).raw
    jobs = [(p, ["apt-get", "download", p], f"{p}_*.deb") for p in DEBIAN_PACKAGES]
    for spec in NPM_PACKAGES:
        # The name that npm gives its archives
        name = spec.rsplit("@", 1)[0].removeprefix("@").replace("/", "-")
        jobs.append((name, ["npm", "pack", "--silent", spec], f"{name}-*.tgz"))
    versions: dict[str, str] = {}
    failed = 0
    for name, command, pattern in jobs:
        try:
            versions[name] = fetch_package(name, command, pattern, raw)
            print(f"{name} {versions[name]}", flush=True)
        except (FetchError, OSError) as error:
            failed += 1
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "versions.json").write_text(json.dumps(versions, indent=2, sort_keys=True) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
