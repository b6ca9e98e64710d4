"""Models of timm, torchvision and transformers; each package is imported here alone, when its prefix is used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from maseRT.errors import MissingError, UsageError, did_you_mean

_WHERE = "[model] name"


class Logits(nn.Module):
    """A transformers classifier as one tensor in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of the model's main input (pixel values, token numbers, ...)."""
        logits: Tensor = self.model(x, return_dict=True).logits
        return logits


def build_from_package(
    package: str, name: str, arguments: dict[str, Any], *, num_classes: int | None, input_shape: tuple[int, ...]
) -> nn.Module:
    """Build `package:name` with random weights; `arguments` go to the package's own builder.

    Raises:
        UsageError: the package has no such model, or cannot build it with these arguments.
        MissingError: the package is not installed, or does not import.
    """
    library = _imported(package)
    try:
        model = PACKAGES[package](library, name, arguments, num_classes, input_shape)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{package} cannot build '{name}': {type(error).__name__}: {error}",
            where=_WHERE,
            fix="check the name and [model] args, which go to the package",
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{package}:{name} gave a {type(model).__name__}, not a torch.nn.Module", where=_WHERE)
    return model


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        what = "is not installed" if missing == package else f"needs {missing}, which is not installed"
        raise MissingError(f"{package} {what}", where=_WHERE, fix=f"pip install {missing}") from error
    except Exception as error:
        text = str(error).splitlines() or [type(error).__name__]
        raise MissingError(
            f"{package} is installed but does not import: {text[0]}",
            where=_WHERE,
            fix=f"install the {package} (and torchvision, if it uses it) that belongs to torch {torch.__version__}",
        ) from error


def _from_timm(
    timm: Any, name: str, arguments: dict[str, Any], num_classes: int | None, input_shape: tuple[int, ...]
) -> Any:
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    sizes = {"in_chans": input_shape[0]} | ({} if num_classes is None else {"num_classes": num_classes})
    return timm.create_model(name, **({"pretrained": False} | sizes | arguments))


def _from_torchvision(
    torchvision: Any, name: str, arguments: dict[str, Any], num_classes: int | None, input_shape: tuple[int, ...]
) -> Any:
    known = torchvision.models.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known)
    sizes = {} if num_classes is None else {"num_classes": num_classes}
    return torchvision.models.get_model(name, **({"weights": None} | sizes | arguments))


def _from_transformers(
    transformers: Any, name: str, arguments: dict[str, Any], num_classes: int | None, input_shape: tuple[int, ...]
) -> Any:
    """Build a classifier from a model type ("vit"), a folder with a config.json, or a hub name."""
    settings = ({} if num_classes is None else {"num_labels": num_classes}) | arguments
    if name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name, **settings)
    else:
        config = transformers.AutoConfig.from_pretrained(name, **settings)
    if getattr(config, "architectures", None) is None:
        config.architectures = []  # which transformers goes through where a type has several classifiers
    for task in ("ImageClassification", "SequenceClassification", "AudioClassification"):
        auto = getattr(transformers, f"AutoModelFor{task}")
        if type(config) in auto._model_mapping:
            return Logits(auto.from_config(config))
    raise UsageError(
        f"transformers has no image, sequence or audio classifier of type '{config.model_type}'",
        where=_WHERE,
        fix="choose a classification model, or wrap the model in a package.module:factory",
    )


def _unknown(package: str, name: str, known: list[str]) -> UsageError:
    return UsageError(
        f"{package} has no model '{name}'{did_you_mean(name, known)}",
        where=_WHERE,
        fix=f"see {package}'s list_models()",
    )


Builder = Callable[[Any, str, dict[str, Any], int | None, tuple[int, ...]], Any]
PACKAGES: dict[str, Builder] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}
