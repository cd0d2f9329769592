"""Does a wheel hold the package, all of it and nothing else? `python .ci/wheel_files.py WHEEL TREE`

TREE is a clean copy of what the wheel was built from. pyproject.toml lists what is shipped; here is said what is not.
"""

import sys
import zipfile
from pathlib import Path

NOT_SHIPPED = {"tests", "examples", "docs"}  # and folders whose names begin with a dot
ROOT_FILES = {"__init__.py", "py.typed"}
METADATA = {
    *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"),
    *("licenses/LICENSE", "licenses/models/demo/NOTICE"),
}


def expected(tree: Path, info: str) -> set[str]:
    """Every file a wheel of this tree holds; info: the name of its metadata folder."""
    folders = [
        path for path in tree.iterdir() if path.is_dir() and path.name not in NOT_SHIPPED and path.name[0] != "."
    ]
    files = {path.relative_to(tree).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {f"dit_trt/{name}" for name in files | ROOT_FILES} | {f"{info}/{name}" for name in METADATA}


def main(wheel: Path, tree: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {entry.filename: archive.read(entry) for entry in archive.infolist() if not entry.is_dir()}
    wanted = expected(tree, "-".join(wheel.name.split("-")[:2]) + ".dist-info")
    faults = [f"missing: {name}" for name in sorted(wanted - found.keys())]
    faults += [f"not of the package: {name}" for name in sorted(found.keys() - wanted)]
    for name in sorted(wanted & found.keys()):
        if name.startswith("dit_trt/") and found[name] != (tree / name.removeprefix("dit_trt/")).read_bytes():
            faults.append(f"differs from the tree: {name}")
    if faults:
        sys.exit("\n".join([f"{wheel.name}:", *faults]))
    print(f"{wheel.name}: {len(found)} files, those of the tree, {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
