"""What a trained model is written to and what it is asked of: ONNX, torch.export, safetensors with a card; tables."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipdp.data import SUFFIXES, Schema, read_columns
from lipdp.errors import CheckpointError, DataError, LipdpError, ParameterError
from lipdp.files import write_bytes, write_json

if TYPE_CHECKING:
    from lipdp.serving.model import TrainedModel


def export(model: TrainedModel, path: Path) -> Path:
    """See `TrainedModel.export`."""
    if path.suffix not in (".onnx", ".pt2"):
        if path.suffix:
            raise ParameterError(f"{path}: give a name that ends in .onnx or .pt2, or a folder's")
        return save_pretrained(model, path)
    if path.exists():
        raise ParameterError(f"{path} exists: give another name")
    program = _program(model)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        if path.suffix == ".onnx":
            _write_onnx(program, made)
        else:
            torch.export.save(program, made)
        write_bytes(path, made.read_bytes())
    return path


def _program(model: TrainedModel) -> torch.export.ExportedProgram:
    x = torch.zeros(3, *model.input_shape)
    try:
        return torch.export.export(model.as_module(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    except Exception as error:  # tracing runs the maps' and the model's own code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ParameterError(f"torch.export can't follow this model ({reason}); use lipdp.load, or a folder") from error


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ParameterError(f'ONNX needs onnxscript ({error}): pip install "lipdp[serving]", or use .pt2') from error
    try:
        made = torch.onnx.export(program, input_names=["x"], output_names=["y"], verbose=False)
    except Exception as error:  # the exporter has errors of many kinds, some from its own private modules
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ParameterError(f"ONNX can't express this model ({reason}); use .pt2, or a folder") from error
    if made is None:
        raise ParameterError("this torch exports no ONNX program; use .pt2")
    made.save(str(path))


def save_pretrained(model: TrainedModel, folder: Path) -> Path:
    """See `TrainedModel.save_pretrained`."""
    save_file = _safetensors("save")
    if folder.exists() and any(folder.iterdir()):
        raise ParameterError(f"{folder} is not empty: give another folder")
    from lipdp.serving.model import PRETRAINED

    weights = {name: value.contiguous() for name, value in model.network.state_dict().items()}
    write_bytes(folder / PRETRAINED, save_file(weights))
    write_json(folder / "config.json", {"library": "lipdp", "config": model.config.as_dict(), "data": dict(model.data)})
    if (model.folder / "privacy.json").exists():
        shutil.copyfile(model.folder / "privacy.json", folder / "privacy.json")
    write_bytes(folder / "README.md", _card(model, folder.name).encode())
    return folder


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    read = _safetensors("load")
    try:
        weights: dict[str, Tensor] = read(path.read_bytes())
    except Exception as error:  # the reader's errors have no common base
        raise CheckpointError(f"{path} can't be read ({error})") from error
    return weights


def _safetensors(name: str) -> Any:
    try:
        from safetensors import torch as safetensors
    except ImportError as error:
        raise ParameterError(f'this needs safetensors ({error}): pip install "lipdp[serving]"') from error
    return getattr(safetensors, name)


def _card(model: TrainedModel, name: str) -> str:
    """The card of a model in a folder `name`: what it is for hubs, how it is used, and the run's report."""
    wanted = f"(N, {', '.join(map(str, model.input_shape))})"
    if model.schema is not None:
        wanted = f"a DataFrame with the columns {', '.join(column.name for column in model.schema.columns)}"
    use = f'model = lipdp.load("{name}")\nmodel.predict_proba(x)  # x: {wanted}'
    head = "---\nlibrary_name: lipdp\ntags: [differential-privacy]\n---\n\n"
    title = f"# {model.config.model} on {model.config.dataset}\n\nTrained with lipdp.\n\n"
    said = f"{title}```python\nimport lipdp\n{use}\n```\n\n"
    return head + said + _report(model.folder)


def _report(run: Path) -> str:
    if not (run / "metrics.jsonl").exists():
        card = run / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        return text.partition("```\n\n")[2]
    try:
        from lipdp.report.document import gather, render

        return render(gather([run], calibrate=False), "md")
    except LipdpError as error:
        return f"No report: {error}\n"


def read_records(path: Path, schema: Schema | None = None) -> Any:
    """Raw inputs of a file: `.npy`, the array X of an `.npz`, or a `.csv` of numbers with or without a header.

    Args:
        schema: of the model. Then the file is a table with a header, `.csv`, `.tsv` or `.parquet`.

    Raises:
        DataError: another kind of file, or one that can't be read.
    """
    if schema is not None:
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path}: the model was trained on a table with a schema; give a {', '.join(SUFFIXES)} file"
            )
        return read_columns(path, schema)
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays["X"])
        if path.suffix == ".csv":
            return _csv(path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} can't be read ({error})") from error
    raise DataError(f"{path}: give a .npy file, an .npz file with an array X, or a .csv file of numbers")


def _csv(path: Path) -> npt.NDArray[np.float64]:
    """Empty cells are missing: NaN, which the model's own map reads."""
    first, header = path.read_text(encoding="utf-8").partition("\n")[0], 0
    try:
        _ = [float(cell or "nan") for cell in first.split(",")]
    except ValueError:
        header = 1
    return np.genfromtxt(path, delimiter=",", skip_header=header, ndmin=2, encoding="utf-8")


def predictions_csv(model: TrainedModel, x: Any) -> str:
    """A line for each record: the label, and its probabilities where the loss makes them."""
    names = [str(model.classes[label]) for label in model.predict(x)]
    shares = np.zeros((len(names), 0)) if model.tau is None else model.predict_proba(x)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["label", *(f"probability_{model.classes[c]}" for c in range(shares.shape[1]))])
    lines.writerows([name, *(f"{p:.6g}" for p in row)] for name, row in zip(names, shares, strict=True))
    return text.getvalue()
