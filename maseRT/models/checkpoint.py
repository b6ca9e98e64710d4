"""Trained weights from a file: Lightning, plain PyTorch or safetensors. Pickles are read with weights_only."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from maseRT.config import CheckpointKind
from maseRT.errors import UsageError, did_you_mean, shortened
from maseRT.factories import load_module
from maseRT.models.lightning import is_lightning, original_epochs, original_learning_rate
from maseRT.models.quantizer_entries import holds_quantizers, split_quantizers

# Where training scripts put the state dict, in the order they are tried.
_NESTED = ("state_dict", "model_state_dict", "model", "model_state", "network", "net", "module", "weights", "params")
_SAVE_WEIGHTS = "save the weights: torch.save(model.state_dict(), path)"
# Classes of these modules run commands or code when they are made.
_NEVER_ADMITTED = (
    "asyncio",
    "builtins",
    "code",
    "ctypes",
    "importlib",
    "multiprocessing",
    "nt",
    "os",
    "pickle",
    "posix",
    "runpy",
    "shutil",
    "subprocess",
    "sys",
    "types",
)
# How torch names a class that it meets while loading: not listed beforehand, or made by one that was (numpy's dtypes).
_REFUSED = re.compile(r"(?:Unsupported global: GLOBAL |but got <class ')([\w.]+)")
# The functions that rebuild a numpy scalar or array, which take nothing but data.
_NUMPY_REBUILDERS = tuple(
    f"numpy.{core}.multiarray.{f}" for core in ("core", "_core") for f in ("scalar", "_reconstruct")
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file of trained weights holds.

    Attributes:
        state_dict: parameter and buffer names, as the file spells them, to CPU tensors.
        kind: the file's format.
        epochs: how many epochs the weights were trained for, where a Lightning file says so.
        learning_rate: the rate that training began with, where a Lightning file says so.
        amax: ranges of pytorch-quantization's quantizers, "conv1.input" -> [] and "conv1.weight" -> [C, 1, 1, 1]: in
            the shapes in which they broadcast against their tensors.
    """

    state_dict: dict[str, Tensor]
    kind: CheckpointKind
    epochs: int | None = None
    learning_rate: float | None = None
    amax: dict[str, Tensor] = field(default_factory=dict)


def load_checkpoint(path: Path, *, kind: str | None = None, allow_globals: Sequence[str] = ()) -> Checkpoint:
    """Read a checkpoint to CPU memory.

    Args:
        path: the file.
        kind: "pl", "pt", "safetensors" or "pytorch-quantization"; told from the file's content when None.
        allow_globals: names of the classes, other than tensors and plain containers, that its pickle may hold.

    Raises:
        UsageError: there is no such file, it is corrupt, of another kind, holds classes that are not admitted, or
            no state dict.
    """
    kinds = get_args(CheckpointKind)
    if kind is not None and kind not in kinds:
        raise UsageError(f"there is no checkpoint kind '{kind}'{did_you_mean(kind, kinds)}", where=str(path))
    start = _first_bytes(path)
    is_safetensors = start[8:9] == b"{"
    if (kind == "safetensors") != is_safetensors and kind in ("safetensors", "pl", "pt"):
        found = "a safetensors file" if is_safetensors else "no safetensors file"
        raise UsageError(
            f"said to be of kind '{kind}', but is {found}", where=str(path), fix="correct or leave out the kind"
        )
    content = _load_safetensors(path) if is_safetensors else _load_pickle(path, allow_globals)
    state_dict = _state_dict_in(content, path)
    lightning = not is_safetensors and is_lightning(content)
    if kind == "pl" and not lightning:
        raise UsageError(
            f"said to be of kind 'pl', but is no Lightning checkpoint: it holds {_listed(content)}",
            where=str(path),
            fix="correct or leave out the kind",
        )
    amax: dict[str, Tensor] = {}
    if kind == "pytorch-quantization" or (kind is None and holds_quantizers(state_dict)):
        state_dict, amax = split_quantizers(state_dict, where=str(path))
        kind = "pytorch-quantization"
    return Checkpoint(
        state_dict=state_dict,
        kind=cast(CheckpointKind, kind or ("safetensors" if is_safetensors else "pl" if lightning else "pt")),
        epochs=original_epochs(content) if lightning else None,
        learning_rate=original_learning_rate(content) if lightning else None,
        amax=amax,
    )


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        raise UsageError(
            f"no such checkpoint{did_you_mean(path.name, beside, listed=False)}",
            where=str(path),
            fix="check the path",
        ) from None
    except OSError as error:
        raise UsageError(
            f"cannot read the checkpoint: {error.strerror}", where=str(path), fix="name one file"
        ) from error
    if not start:
        raise UsageError("the checkpoint is empty", where=str(path), fix="save or copy it again")
    return start


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _corrupt(path, error) from error


def _load_pickle(path: Path, allow_globals: Sequence[str]) -> Any:
    if _starts_as_zip(path):
        _check_archive(path)
    with _admitted(allow_globals, path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            refused = _refused_globals(path, error)
            if refused:
                raise _not_admitted(path, refused, allow_globals) from error
            raise _corrupt(path, error) from error


def _check_archive(path: Path) -> None:
    """Refuse TorchScript, which torch.load would run, archives of other kinds, and damaged ones.

    Those are archives with records that differ from their checksums, which torch.load ignores.
    An archive in which no record fits was written without checksums (torch.serialization.set_crc32_options).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                raise UsageError(
                    "is a TorchScript archive, not a checkpoint",
                    where=str(path),
                    fix=_SAVE_WEIGHTS,
                )
            if any(name.endswith("/archive_format") for name in names):
                raise UsageError(
                    "is a torch.export archive, not a checkpoint",
                    where=str(path),
                    fix="save the weights: torch.save(torch.export.load(path).state_dict, path)",
                )
            if not any(name.endswith("/data.pkl") for name in names):
                raise UsageError(
                    f"was not written by torch.save, or is corrupt: a zip archive of {shortened(names)}",
                    where=str(path),
                    fix=_SAVE_WEIGHTS,
                )
            damaged = [name for name in names if not _is_intact(archive, name)]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _corrupt(path, error) from error
    if damaged and len(damaged) < len(names):
        raise _corrupt(path, zipfile.BadZipFile(f"wrong checksum of {damaged[0]}"))


def _is_intact(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as record:
            while record.read(1 << 20):
                pass
    except Exception:  # a damaged header may claim encryption, compression, any length
        return False
    return True


@contextmanager
def _admitted(names: Sequence[str], path: Path) -> Iterator[None]:
    """Let torch.load make objects of the named classes for the duration."""
    with torch.serialization.safe_globals([(_class_named(name, path), name) for name in names]):
        yield


def _class_named(name: str, path: Path) -> Any:
    """Import what an allow_globals entry names.

    Raises:
        UsageError: it cannot be imported, is no class, or could run code.
    """
    where = "[model] allow_globals"
    module_name, _, attribute = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")) or not module_name:
        raise UsageError(f"'{name}' is not package.module.Class", where=where, fix='for example "argparse.Namespace"')
    if module_name == "__main__":
        raise UsageError(
            f"'{name}' was defined in the script that saved {path.name}, and cannot be found from here",
            where=where,
            fix="save the weights alone: torch.save(model.state_dict(), path)",
        )
    if module_name.partition(".")[0] in _NEVER_ADMITTED:
        raise UsageError(f"'{name}' could run code, and is never admitted", where=where, fix="save the weights alone")
    module = load_module(module_name, where=where)
    found = getattr(module, attribute, None)
    if found is None:
        public = [word for word in vars(module) if not word.startswith("_")]
        hint = did_you_mean(attribute, public, listed=False)
        raise UsageError(f"{module_name} has no '{attribute}'{hint}", where=where)
    if not isinstance(found, type) and name not in _NUMPY_REBUILDERS:
        raise UsageError(
            f"'{name}' is no class; loading would call it",
            where=where,
            fix="save the weights alone: torch.save(model.state_dict(), path)",
        )
    return found


def _refused_globals(path: Path, error: Exception) -> list[str]:
    """Return the names in the pickle that torch.load does not admit, read without running it."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the format before torch 1.6 has no such listing
        names = []
    return names or _REFUSED.findall(str(error))[:1]


def _not_admitted(path: Path, refused: list[str], allow_globals: Sequence[str]) -> UsageError:
    line = ", ".join(f'"{name}"' for name in sorted({*refused, *allow_globals}))
    return UsageError(
        f"holds objects other than tensors: {', '.join(refused)}",
        where=str(path),
        fix=f"if you trust this file: [model] allow_globals = [{line}]; "
        "or save the weights alone: torch.save(model.state_dict(), path)",
    )


def _corrupt(path: Path, error: Exception) -> UsageError:
    fix = "save or copy the file again"
    if not _starts_as_zip(path) and not isinstance(error, EOFError):
        return UsageError("is no checkpoint, or corrupt", where=str(path), fix=fix)
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    first = text.strip().partition("\n")[0] or type(error).__name__
    return UsageError(f"is corrupt or truncated ({first})", where=str(path), fix=fix)


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict: the object itself, or what lies under one of the usual keys."""
    candidates = [content]
    if isinstance(content, Mapping):
        candidates += [content[key] for key in _NESTED if key in content]
    for candidate in candidates:
        if isinstance(candidate, nn.Module):
            return dict(candidate.state_dict())
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return {str(key): value.detach() for key, value in candidate.items()}
    raise UsageError(
        f"holds no state dict, but {_listed(content)}",
        where=str(path),
        fix="save it with torch.save(model.state_dict(), path)",
    )


def _listed(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [str(key) for key in content]
    return f"the keys {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}" if keys else "an empty dict"
