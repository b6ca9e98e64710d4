"""The cases: a model, its data, and how it is trained and quantized, as a user would write it down in TOML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maseRT.config import Config
from model_cases import data
from model_cases.models import CONVOLUTIONS

Section = Mapping[str, Any]
_DIGITS = {"name": "digits"}


@dataclass(frozen=True)
class Sources:
    """Where data lie, and where the cases write to."""

    work: Path
    fashion_mnist: Path | None


@dataclass(frozen=True)
class Case:
    """One model with one way to quantize it.

    Attributes:
        shown: the model and the data, in words.
        data: makes the [data] section; raises `data.MissingDataError`.
        quantize: the [quantize] section.
        train: the [train] section; None where `checkpoint` gives trained weights.
        weights_of: the case whose float weights this one quantizes again.
        classes: gives the true classes of the first test samples, where labels are the float model's answers.
    """

    name: str
    shown: str
    model: Section
    data: Callable[[Sources], dict[str, Any]]
    quantize: Section
    train: Section | None = None
    checkpoint: Callable[[], Path] | None = None
    finetune: Section | None = None
    calibrate: Section | None = None
    weights_of: str | None = None
    classes: Callable[[], list[int]] | None = None
    max_batch: int = 64

    @property
    def exact(self) -> bool:
        """Whether everything that is not INT8 is FP32, so that ONNX Runtime computes in torch's precisions."""
        rules = self.quantize.get("rules", ())
        wanted = [self.quantize.get("precision"), self.quantize.get("float"), *(rule["precision"] for rule in rules)]
        return not {"fp16", "bf16"} & set(wanted)

    def config(self, sources: Sources, float_weights: Path | None) -> Config:
        """Return the checked config; `float_weights` takes the place of training."""
        model = dict(self.model)
        if self.checkpoint is not None:
            model["checkpoint"] = str(self.checkpoint())
        elif float_weights is not None:
            model["checkpoint"] = str(float_weights)
        sections: dict[str, Any] = {
            "run": {"threads": 1, "device": "cpu"},
            "model": model,
            "data": self.data(sources),
            "quantize": dict(self.quantize),
            "calibrate": dict(self.calibrate or {}),
            "finetune": dict(self.finetune or {}),
            "export": {},
            "build-engine": {
                "runtime": "tensorrt-rtx",
                "compute_capability": "8.9",
                "batch": {"min": 1, "opt": self.max_batch, "max": self.max_batch},
                "max_threads": 1,
            },
            "analyze": {"runtimes": ["torch", "onnxruntime", "tensorrt-rtx"], "warmup": 1, "iterations": 3},
        }
        if self.train is not None:
            sections["train"] = dict(self.train)
        return Config.model_validate(sections)


def _digits(sources: Sources) -> dict[str, Any]:
    return {**_DIGITS, "batch_size": 64}


def _fashion(sources: Sources) -> dict[str, Any]:
    return {"name": "fashion-mnist", "path": str(data.fashion_folder(sources.fashion_mnist)), "batch_size": 128}


def _vowels(sources: Sources) -> dict[str, Any]:
    path = sources.work / "japanese_vowels.npz"
    return {"name": "npz", "path": str(data.japanese_vowels(path)), "batch_size": 32}


def _photographs(sources: Sources) -> dict[str, Any]:
    path = sources.work / "photographs.npz"
    return {"name": "npz", "path": str(data.photographs(path)), "batch_size": 16, "validation": 0.25}


_INT8 = {"precision": "int8", "float": "fp32"}
_FASHION_TRAINING = {"epochs": 2, "learning_rate": 2e-3}

_MODELS = (
    Case("digits-cnn", "zoo digits-cnn, digits", {"name": "digits-cnn"}, _digits, _INT8, {
        "epochs": 15, "learning_rate": 2e-3}),
    Case("fashion-cnn", "zoo fashion-cnn, Fashion-MNIST", {"name": "fashion-cnn"}, _fashion, _INT8, _FASHION_TRAINING),
    Case("prelu-cnn", "CNN with PReLU from a factory, Fashion-MNIST", {"name": "model_cases.models:prelu_cnn"},
         _fashion, _INT8, {"epochs": 3, "learning_rate": 5e-3}),
    Case("vowels-conv1d", "zoo conv1d-classifier, JapaneseVowels", {"name": "conv1d-classifier"}, _vowels, _INT8, {
        "epochs": 30, "learning_rate": 2e-3}),
    Case("resnet18", "zoo resnet18 with its small stem, digits", {"name": "resnet18", "args": {"stem": "small"}},
         _digits, _INT8, {"epochs": 3, "learning_rate": 1e-3}),
    Case("transformer", "zoo transformer-classifier, digits", {"name": "transformer-classifier"}, _digits, _INT8, {
        "epochs": 40, "learning_rate": 2e-3, "optimizer": "adamw"}),
    Case("efficientnet-lite0", "EfficientNet-lite0 with ImageNet weights, photographs",
         {"name": "model_cases.models:efficientnet_lite0"}, _photographs, {**_INT8, "plugins": [CONVOLUTIONS]},
         checkpoint=data.lite0_weights, finetune={"epochs": 1, "initial_learning_rate": 1e-6, "optimizer": "sgd"},
         calibrate={"batches": 8, "methods": ["max", "mse", {"percentile": 99.9}]}, max_batch=16,
         classes=data.imagenet_classes),
)  # fmt: skip

_LSTM = Case("vowels-lstm-int8", "zoo lstm-classifier, JapaneseVowels, LSTM in INT8 by rule",
             {"name": "lstm-classifier"}, _vowels, {**_INT8, "rules": [{"type": "LSTM", "precision": "int8"}]},
             {"epochs": 30, "learning_rate": 5e-3})  # fmt: skip
_LSTM_FP16 = replace(
    _LSTM,
    name="vowels-lstm-fp16",
    shown="zoo lstm-classifier, JapaneseVowels, all in FP16",
    quantize={"precision": "fp16", "float": "fp16"},
    weights_of=_LSTM.name,
)


def _in_fp16(case: Case) -> Case:
    return replace(
        case,
        name=f"{case.name}-fp16",
        shown=f"{case.shown}; FP16 where not INT8",
        quantize={**case.quantize, "float": "fp16"},
        weights_of=case.name,
    )


CASES = {case.name: case for case in (*_MODELS, _LSTM, _LSTM_FP16, *map(_in_fp16, _MODELS))}
