"""The output folders of all commands: written whole or not at all, and never over something else.

What a command writes is marked: a folder by the file `.sam-split-output`, which says what kind of output it is and
which files belong to it; a zip archive, such as `torch.save` writes, by its comment. `--force` replaces nothing but a
marked output of the same kind.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


MARKER = ".sam-split-output"
PARTIAL = ".sam-split-partial"  # the end of the names of folders that a running command fills
MAY_LIE_IN_EMPTY_FOLDERS = {PARTIAL, "lost+found"}  # of a killed run, and of a fresh file system


@contextlib.contextmanager
def staged(
    destination: Path,
    kind: str,
    force: bool = False,
    sources: Iterable[str | Path | None] = (),
    grows: bool = False,
) -> Iterator[Path]:
    """Yields a temporary folder, whose files are in `destination` once the block has succeeded.

    A folder that exists, such as a mount point, stays the same folder. Models memory-mapped on replaced files stay
    valid.

    Args:
        destination: The folder to write. It may exist if it is empty.
        kind: What is written, such as "split model".
        force: Replaces an earlier output of the same kind.
        sources: What the output is made of. Names that are not local, and None, are left out.
        grows: Whether files are added to the output later; see `mark`.

    Raises:
        FileExistsError: If `destination` may not be written, or another run is writing to it.
    """
    destination = destination.resolve()
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is a file, expected a folder: choose another name.")
    require_replaceable(destination, kind, force, sources)
    beside, inside = destination.parent / f".{destination.name}{PARTIAL}", destination / PARTIAL
    in_place = destination.exists()
    with partial_folder(inside if in_place else beside, leftovers=(beside, inside)) as partial:
        new, replaced = partial / "new", partial / "replaced"
        new.mkdir()
        replaced.mkdir()
        yield new
        mark(new, kind, grows)
        if in_place:
            exchange(destination, new, replaced)
        else:
            new.rename(destination)


@contextlib.contextmanager
def staged_file(
    destination: Path, kind: str, force: bool = False, sources: Iterable[str | Path | None] = ()
) -> Iterator[Path]:
    """Yields a path for a zip archive, which is `destination` once the block has succeeded; else like `staged`.

    The block must call `mark_archive`.

    Raises:
        FileExistsError: If the destination is in use, or is not a file.
    """
    destination = destination.resolve()
    if destination.exists() and not destination.is_file():  # a folder, or a device, which would not be read to its end
        raise FileExistsError(f"{destination} is not a file: choose another name.")
    require_replaceable(destination, kind, force, sources)
    beside = destination.parent / f".{destination.name}{PARTIAL}"
    with partial_folder(beside, leftovers=(beside,)) as partial:
        new = partial / destination.name
        yield new
        os.replace(new, destination)


def require_replaceable(
    destination: Path, kind: str, force: bool = False, sources: Iterable[str | Path | None] = ()
) -> None:
    """Checks that nothing is lost if `destination`, a file or folder, is written.

    Raises:
        FileExistsError: If there is something else than, with `force`, an earlier output of this kind.
    """
    destination = destination.resolve()
    if not destination.exists() or (destination.is_dir() and is_empty(destination)):
        return
    for source in sources:
        if source is not None and holds(destination, Path(source)):
            raise FileExistsError(
                f"{destination} and {source}, which is read, are the same or lie in one another: choose another "
                "output."
            )
    if not force:
        occupied = "is not empty" if destination.is_dir() else "exists"
        raise FileExistsError(f"{destination} {occupied}: choose another, or replace an earlier output with --force.")
    if any(contains(destination, folder) for folder in (Path.cwd(), Path.home())):
        raise FileExistsError(f"{destination} is, or holds, the working folder or home: choose another output.")
    if not is_marked(destination, kind):
        raise FileExistsError(
            f"{destination} is not marked as an earlier output of this kind ({kind}), and --force replaces nothing "
            "else: choose another, or delete it yourself."
        )
    if foreign := foreign_files(destination):
        raise FileExistsError(
            f"{destination} also holds {', '.join(foreign[:5])}{' and more' if foreign[5:] else ''}, which no command "
            "wrote there: move it away, or choose another output."
        )


def is_empty(folder: Path) -> bool:
    """Whether nothing of value is in `folder`."""
    return all(path.name in MAY_LIE_IN_EMPTY_FOLDERS for path in folder.iterdir())


def holds(destination: Path, source: Path) -> bool:
    """Whether `destination` is `source`, one of its parents or children, or what a link in it leads to."""
    if not source.exists():
        return False
    links = [path for path in source.rglob("*") if path.is_symlink()] if source.is_dir() else []
    return contains(source, destination) or any(contains(destination, path) for path in [source, *links])


def contains(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or lies in it, by whatever name."""
    path = path.resolve()
    return path.exists() and any(os.path.samefile(folder, parent) for parent in (path, *path.parents))


def is_marked(output: Path, kind: str) -> bool:
    """Whether `output` says that it is an output of this kind."""
    if output.is_dir():
        return read_marker(output).get("kind") == kind
    mark = file_mark(kind).encode()
    with output.open("rb") as file:
        file.seek(-min(len(mark), output.stat().st_size), os.SEEK_END)
        return file.read() == mark


def file_mark(kind: str) -> str:
    """Returns the text that marks a file."""
    return f"sam-split output: {kind}."


def mark(folder: Path, kind: str, grows: bool = False) -> None:
    """Marks `folder` as an output of this kind, and all that it holds as belonging to it.

    With `grows`, what is added later belongs to it, too, whatever its name is.
    """
    files = None if grows else sorted(file_names(folder))
    (folder / MARKER).write_text(json.dumps({"kind": kind, "files": files}) + "\n", encoding="utf-8")


def foreign_files(output: Path) -> list[str]:
    """Returns the names of what has come into a marked folder since it was written."""
    files = read_marker(output).get("files") if output.is_dir() else None
    return [] if files is None else sorted(file_names(output) - set(files))


def file_names(folder: Path) -> set[str]:
    """Returns the paths, from `folder` on, of all files of an output."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return {path.as_posix() for path in paths if path.parts[0] not in {MARKER, *MAY_LIE_IN_EMPTY_FOLDERS}}


def read_marker(folder: Path) -> dict:
    """Returns what the marker of `folder` says; empty if there is none."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def mark_archive(path: Path, kind: str) -> None:
    """Appends a comment to a zip archive that has none; its last two bytes are the length of the comment."""
    comment = file_mark(kind).encode()
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(len(comment).to_bytes(2, "little") + comment)


@contextlib.contextmanager
def partial_folder(path: Path, leftovers: Iterable[Path]) -> Iterator[Path]:
    """Makes the folder `path`, which is removed in the end, and removes `leftovers` of killed runs.

    Raises:
        FileExistsError: If another run is using one of them.
    """
    for leftover in leftovers:
        if leftover.is_symlink() or leftover.is_file():
            raise FileExistsError(f"{leftover} is in the way, and no command wrote it: move it away.")
        if leftover.is_dir():
            with locked(leftover):
                shutil.rmtree(leftover)
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path.parent)) from error
    with locked(path):
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock on `folder`, which also ends with the process.

    Raises:
        FileExistsError: If another process holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"Another run writes to {folder}: wait for it, or choose another output.") from error
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(descriptor)


def exchange(folder: Path, new: Path, replaced: Path) -> None:
    """Moves what is in `folder` to `replaced`, and what is in `new` to `folder`; undoes it if that fails.

    The marker goes last and comes first, so that a killed run leaves a folder that `--force` replaces.
    """
    old = sorted((path for path in folder.iterdir() if path.name not in MAY_LIE_IN_EMPTY_FOLDERS), key=is_marker)
    moves = [(path, replaced / path.name) for path in old]
    moves += [(path, folder / path.name) for path in sorted(new.iterdir(), key=is_marker, reverse=True)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def is_marker(path: Path) -> bool:
    """Whether this is the file that marks an output."""
    return path.name == MARKER


def json_text(content: Any) -> str:
    """Returns JSON with null for what is not a number, as JSON has no NaN and other programs refuse it."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), indent=2) + "\n"
