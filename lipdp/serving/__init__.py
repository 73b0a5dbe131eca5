"""A trained model in use: read a run's folder, predict, export.

model = lipdp.load("runs/digits-mlp")
model.predict(x), model.predict_proba(x), model.export("model.onnx"), model.save_pretrained("folder")
"""

from lipdp.lazy import facade

_NAMES = {"TrainedModel": "lipdp.serving.model", "load": "lipdp.serving.model", "read_records": "lipdp.serving.files"}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
