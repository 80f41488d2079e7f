"""A dataset as people have it, a Hub id, a file or a folder -> its rows, in their order."""

import codecs
import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
from datasets import Dataset, load_dataset_builder

from loop.config.knobs import Config
from loop.errors import DISK_IS_FULL, DataError, EnvironmentFault, HubError

FILE_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


@contextmanager
def _unreported() -> Iterator[None]:
    """Without a request to the library's makers, who count each load of a dataset otherwise."""
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


@_unreported()
def load_rows(config: Config, split: str) -> tuple[Dataset, str | None]:
    """One split, and the commit it resolved to where it came from the Hub. No token is passed."""
    name, path = config.dataset_name, Path(config.dataset_name)
    datasets.disable_progress_bars()
    try:
        if path.suffix in FILE_FORMATS:
            form = FILE_FORMATS[path.suffix]
            # A byte order mark is no text; the other readers drop it themselves.
            encoding = {"encoding": "utf-8-sig"} if form == "text" else {}
            files = str(_by_content(path))
            builder = load_dataset_builder(form, data_files=files, token=False, **encoding)
        elif path.is_file():
            kinds = f"found a {path.suffix} file, expected {', '.join(FILE_FORMATS)}"
            raise DataError(f"dataset_name: {kinds}; convert it")
        else:
            revision = config.dataset_revision
            builder = load_dataset_builder(
                name, name=config.dataset_config, revision=revision, token=False
            )
        builder.download_and_prepare()
        base = str(builder.base_path)
        on_hub = base.startswith("hf://") and "@" in base
        commit = base.split("@")[1].split("/")[0] if on_hub else None
        return builder.as_dataset(split=split), commit
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        download = f"hf download {name} --repo-type dataset --local-dir DIR"
        hint = f"is the network there, the name right? a gated one: {download}, then write DIR"
        raise HubError(f"dataset_name: {name}: {first_line(error)}; {hint}") from error
    except ImportError as error:  # of files that are no text: pictures, sounds, PDF
        kinds = ", ".join(FILE_FORMATS)
        raise DataError(f"dataset_name: {name}: holds no text; expected {kinds}") from error
    except StopIteration as error:
        raise DataError(f"dataset_name: {name}: holds no rows") from error
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in DISK_IS_FULL:
            hint = "free some space, or set HF_HOME to a folder on another disk"
            raise EnvironmentFault(f"the cache of datasets: {cause.strerror}; {hint}") from error
        reason = first_line(cause)
        reason = "holds no rows" if "corresponds to no data" in reason else reason
        kind = HubError if isinstance(error, OSError) and not path.exists() else DataError
        raise kind(f"dataset_name: {name}: {reason}") from error


def _by_content(path: Path) -> Path:
    """A link to `path` that is named by its content, which the library's cache then knows it by.

    The library itself goes by modification times and takes a name for a pattern. Text that is not
    UTF-8 is refused here with its offset, which the readers underneath do not tell."""
    if not path.is_file():
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        hint += f"in a recipe, ./{path.name} is the file beside it"
        raise DataError(f"dataset_name: found no file {path.absolute()}; {hint}")
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    offset, chunk = 0, b" "
    with path.open("rb") as file:
        while chunk:
            chunk, pending = file.read(1 << 20), len(decoder.getstate()[0])
            digest.update(chunk)
            try:
                if path.suffix != ".parquet":
                    decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise DataError(f"{path}: not UTF-8 at byte {at}; convert the file") from error
            offset += len(chunk)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    link = cache / "by-content" / digest.hexdigest() / f"rows{path.suffix}"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists() or link.resolve() != path.resolve():
        link.unlink(missing_ok=True)
        with suppress(FileExistsError):  # another run was faster
            link.symlink_to(path.resolve())
    return link


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
