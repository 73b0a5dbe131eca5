"""A trained model as it is used: raw inputs in, labels and probabilities out; the input map and τ are folded in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lipdp.batches.records import finite
from lipdp.data import Bounding, Schema
from lipdp.data.split import resize
from lipdp.errors import CheckpointError, DataError, ParameterError, UnknownNameError
from lipdp.features.maps import FeatureSpec
from lipdp.files import read_json
from lipdp.losses.labels import answers_of, probabilities
from lipdp.nn.convert import to_torch
from lipdp.training.assembly import features_of, named_bounding
from lipdp.training.checkpoint import RunFolder
from lipdp.training.choices import make_network
from lipdp.training.config import TrainConfig, config_from_dict, weights_of

PRETRAINED = "model.safetensors"
_BATCH = 1024


def load(folder: str | os.PathLike[str], *, weights: str | None = None, run_code: bool = False) -> TrainedModel:
    """Read a trained model: from the folder of a run, or from what `save_pretrained` wrote. No data are needed.

    Args:
        folder: of `lipdp train`, or of `TrainedModel.save_pretrained`.
        weights: of a run: "model", the last ones, or "ema", their average; by default as `TrainConfig.weights` says.
        run_code: build a model or features given as module:function, which runs that module's code.

    Raises:
        CheckpointError: the folder can't be read, or doesn't say what the model's inputs are.
        ParameterError: the model is code of its own, and `run_code` is not set.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the one that lipdp train wrote (its --out)")
    if (Path(folder) / PRETRAINED).exists():
        return TrainedModel.from_pretrained(folder, run_code=run_code)
    run = RunFolder(folder)
    return _built(run.load(), f"the checkpoint in {run}", run.path, weights=weights, run_code=run_code)


@dataclass(frozen=True)
class TrainedModel:
    """What was trained, ready for use.

    Attributes:
        network: from mapped inputs to logits, in evaluation mode, on the CPU.
        bounding, spec: the public map of the inputs, and the feature map behind it, if there is one.
        input_shape: of a raw input. num_classes: C.
        tau: temperature of the loss; None where the loss makes no probabilities of logits.
        config, data: the settings of the run, and the public facts of its data.
        folder: where it was read.
    """

    network: nn.Module
    bounding: Bounding
    spec: FeatureSpec | None
    input_shape: tuple[int, ...]
    num_classes: int
    tau: float | None
    config: TrainConfig
    data: Mapping[str, Any]
    folder: Path

    @property
    def schema(self) -> Schema | None:
        """What is public of the columns, where the model was trained on a table with a schema."""
        return None if self.config.schema is None else Schema.of(self.config.schema)

    @property
    def classes(self) -> tuple[Any, ...]:
        """What the labels 0 … C − 1 stand for."""
        schema = self.schema
        return tuple(self.config.classes or (range(self.num_classes) if schema is None else schema.classes))

    def inputs(self, x: Any) -> Tensor:
        """Raw inputs as training read them: (N, *input_shape) float32. Bytes are pixels of 0 to 255.

        Args:
            x: an array; where the model has a schema, a DataFrame or a mapping from names to columns.

        Raises:
            DataError: another shape, no numbers, or a column that is missing.
        """
        schema = self.schema
        if schema is not None:
            return torch.from_numpy(schema.rows(x))
        array = x.numpy(force=True) if isinstance(x, Tensor) else np.asarray(x)
        if array.dtype.kind not in "biuf":
            raise DataError(f"inputs of type {array.dtype}: numbers are needed, {self._wanted()}")
        values = torch.from_numpy(np.asarray(array, dtype=np.float32))
        shape = self.input_shape
        if len(shape) == 3:
            values = values / 255 if array.dtype == np.uint8 else values
            values = values[:, None] if values.dim() == 3 else values
            if self.config.image_size is not None and values.dim() == 4:
                values = resize(values, self.config.image_size)
        if tuple(values.shape[1:]) != shape:
            raise DataError(f"inputs of shape {tuple(array.shape)}: {self._wanted()}")
        return values

    def _wanted(self) -> str:
        return f"the model takes (N, {', '.join(map(str, self.input_shape))})"

    @torch.no_grad()
    def logits(self, x: Any) -> npt.NDArray[np.float32]:
        """(N, outputs) of raw inputs; at temperature 1, as the network gives them."""
        served = _Served(self, self.network, probabilities=False)
        parts = [served(part) for part in self.inputs(x).split(_BATCH)]
        found: npt.NDArray[np.float32] = torch.cat(parts).numpy()
        return found

    def predict_proba(self, x: Any) -> npt.NDArray[np.float32]:
        """Probabilities (N, C) of raw inputs: softmax, or sigmoid, of τ times the logits.

        Raises:
            ParameterError: the loss of the run makes none.
        """
        if self.tau is None:
            raise ParameterError(f"the loss {self.config.loss} makes no probabilities of logits; use predict or logits")
        logits = torch.from_numpy(self.logits(x))
        return probabilities(logits, self.tau).numpy()

    def predict(self, x: Any) -> npt.NDArray[np.int64]:
        """Labels (N,), 0 … C − 1."""
        labels: npt.NDArray[np.int64] = answers_of(torch.from_numpy(self.logits(x))).numpy()
        return labels

    def as_module(self) -> nn.Module:
        """All of it as one module in plain torch: raw float32 inputs (N, *input_shape) to probabilities, or to logits
        where the loss makes none."""
        return _Served(self, to_torch(self.network), probabilities=self.tau is not None).eval()

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write a file others can use without lipdp: .onnx or .pt2 (`torch.export`); or a folder."""
        from lipdp.serving.files import export

        return export(self, Path(path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write a folder: `model.safetensors`, `config.json`, `privacy.json` and a model card, `README.md`."""
        from lipdp.serving.files import save_pretrained

        return save_pretrained(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, run_code: bool = False) -> TrainedModel:
        """Read what `save_pretrained` wrote; no pickle is opened."""
        from lipdp.serving.files import read_weights

        path = Path(folder)
        written = {**read_json(path / "config.json"), "model": read_weights(path / PRETRAINED)}
        return _built(written, path / "config.json", path, run_code=run_code)


class _Served(nn.Module):
    """Raw inputs, the input map, the network, and probabilities."""

    def __init__(self, model: TrainedModel, network: nn.Module, *, probabilities: bool) -> None:
        super().__init__()
        self.network = network
        self._maps: tuple[Callable[[Tensor], Tensor], ...] = (
            model.bounding,
            *([] if model.spec is None else [model.spec]),
        )
        self._tau = float(model.tau or 1.0)
        self._probabilities = probabilities

    def forward(self, x: Tensor) -> Tensor:
        for one in self._maps:
            x = finite(one(finite(x))).float()
        logits = self.network(x)
        logits = logits[:, None] if logits.dim() == 1 else logits
        return probabilities(logits, self._tau) if self._probabilities else logits


def _built(
    written: Mapping[str, Any], where: object, folder: Path, *, weights: str | None = "model", run_code: bool
) -> TrainedModel:
    """The model of a configuration and the public facts of its data, as `lipdp.training.assembly` built it."""
    try:
        config, data = config_from_dict(written["config"]), dict(written["data"])
        state = dict(written[weights_of(config, weights)])
        shape, classes = tuple(data["input_shape"]), int(data["num_classes"])
    except UnknownNameError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{where} has no {error}: it can't be used without its data") from error
    own = [name for name in (config.model, config.features) if name and ":" in name]
    if own and not run_code:
        raise ParameterError(
            f"{folder} needs code of its own to be loaded ({', '.join(own)}): if you trust it, pass run_code=True"
            " (--run-code)"
        )
    if config.bounding is None:
        raise CheckpointError(
            f"the run in {folder} does not name the map of its inputs; it was trained on a given split"
        )
    spec = features_of(config)
    seen, bound = (shape, None) if spec is None else (spec.output_shape(shape), spec.input_bound(shape))
    network, loss = make_network(config, seen, classes, input_bound=bound)
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"the weights in {folder} do not fit the model {config.model}: {error}") from error
    tau = getattr(loss, "tau", None)
    return TrainedModel(network.eval(), named_bounding(config), spec, shape, classes, tau, config, data, folder)
