"""The model zoo: models built from an input shape and a number of classes, by name, each with an unconstrained twin.

Every model is an `nn.Sequential` that torch.fx can trace. It begins with `InputBound(c)`; its first layer is
1/c-Lipschitz, so that all values behind it have norm at most 1, and the other layers are 1-Lipschitz, attention aside:
the network's constant is 1/c. One module a model; `families` holds the two kinds of layers, `stages` what the models
share.
`tabular` alone is none of these: fixed features that bound themselves, and a dense layer, its own twin.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lipdp.constraints import check_positive
from lipdp.errors import ParameterError, UnknownNameError, check_known
from lipdp.nn.gates import default_input_bound

from .cnn import cnn
from .families import Family, Lipschitz
from .linear import linear
from .mixer import mixer
from .mlp import mlp
from .resnet import resnet
from .stages import Joints, Stages, chain, count
from .tabular import tabular
from .transformer import transformer
from .vgg import vgg

_REGISTRY: dict[str, Callable[..., Stages]] = {
    "cnn": cnn,
    "linear": linear,
    "mixer": mixer,
    "mlp": mlp,
    "resnet": resnet,
    "transformer": transformer,
    "vgg": vgg,
}
_OWN: dict[str, Callable[..., nn.Module]] = {"tabular": tabular}
"""Models that are not made of stages and take none of what the zoo has in common."""


def names() -> list[str]:
    """The models of the zoo.

    >>> lipdp.models.names()
    ['cnn', 'linear', 'mixer', 'mlp', 'resnet', 'tabular', 'transformer', 'vgg']
    """
    return sorted((*_REGISTRY, *_OWN))


def build(
    name: str,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    input_bound: float | None = None,
    clips: Joints = None,
    gates: Joints = None,
    bias: bool = False,
    twin: bool = False,
    **options: Any,
) -> nn.Module:
    """A model of the zoo by name, or your own as `"module:function"`.

    The models are made of stages, and a *joint* lies between each and the next (every model says how many). At a joint,
    `clips` projects the values on the ball of radius clip and scales it to the unit ball, and `gates` bounds the
    cotangents, ‖g‖ ≤ gate, so that a layer between two joints has a sensitivity of at most gate times its own constant:
    what an optimistic bound of the layers in front or behind cannot do. Values have norm at most 1, cotangents at most
    the loss's constant; both shrink on their way, so bounds well below these clip little. A clip multiplies the
    network's Lipschitz constant by 1/clip.

    Args:
        name: one of `names()`, or `"package.module:function"`: the function is called with `input_shape`,
            `num_classes` and the other options given, and returns a module. It is looked for in the working folder too.
        input_shape: of one sample, (channels, height, width) for images.
        num_classes: number of outputs; 1 for a single logit.
        input_bound: c, a public constant in the units of the input; `default_input_bound` gives the default.
        clips, gates: a number for all joints, or a sequence with a number or None for each.
        bias: give every dense and convolutional layer a bias. Off by default: a bias costs noise.
        twin: the unconstrained twin instead: the same parameter names and shapes with nn.Linear, nn.Conv2d, nn.ReLU and
            nn.AvgPool2d, and without input bound, clips and gates (an nn.Identity stands in their place).
        options: of the model, as its builder takes them: `width`, `clips`, …

    Raises:
        UnknownNameError: no such model, or no such function in the module.
        ParameterError: an unknown option, a value out of range, a shape the model does not take, a module that cannot
            be imported, or a function that returns no module.

    >>> model = lipdp.models.build("cnn", input_shape=(1, 28, 28), num_classes=10)
    >>> round(lipdp.lipschitz_constant(model, input_shape=(1, 28, 28)), 2)      # 1 / c, c = 7
    0.14
    """
    if not isinstance(name, str) or not isinstance(input_shape, Sequence):
        raise ParameterError(f"a model is built by name from a shape, got {name!r} and {input_shape!r}")
    shape = tuple(count("an entry of input_shape", size) for size in input_shape)
    if not shape:
        raise ParameterError("input_shape is empty; give the shape of one sample, e.g. (1, 28, 28) or (30,)")
    num_classes = count("num_classes", num_classes)
    common = {"input_bound": input_bound, "clips": clips, "gates": gates, "bias": bias, "twin": twin}
    given = {key: value for key, value in common.items() if value is not None and value is not False}
    if ":" in name:
        return _build_own(name, shape, num_classes, {**given, **options})
    if name in _OWN:
        _check_options(name, _OWN[name], set(options), {"input_shape", "num_classes"})
        if useless := [option for option in given if option != "twin"]:
            raise ParameterError(f"{name} takes no {', '.join(useless)}: its features bound themselves; leave it out")
        return _OWN[name](shape, num_classes, **options)
    if name not in _REGISTRY:
        raise UnknownNameError("model", name, [*names(), "module:function"])
    builder = _REGISTRY[name]
    _check_options(name, builder, set(options), {"layers"})
    radius = default_input_bound(shape) if input_bound is None else check_positive("input_bound", input_bound)
    family = (Family if twin else Lipschitz)(shape, num_classes, 1 / radius, bias)
    return chain(family, builder(family, **options), input_bound=radius, clips=clips, gates=gates)


def _check_options(name: str, function: Callable[..., Any], given: set[str], supplied: set[str]) -> None:
    """Refuse options that the function does not take, and list those it does."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    if missing := supplied - set(known):
        raise ParameterError(f"{name} must take the arguments {', '.join(sorted(supplied))}; it lacks {missing}")
    check_known(name, given, [option for option in known if option not in supplied])


def _build_own(name: str, input_shape: tuple[int, ...], num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Import the module, call the function, check what comes back."""
    function = own(name)
    _check_options(name, function, set(options), {"input_shape", "num_classes"})
    model = function(input_shape=input_shape, num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        raise ParameterError(f"{name} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def own(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names, looked for on the path and then in the working folder.

    Raises:
        ParameterError: the module can't be imported. UnknownNameError: it has no such function.
    """
    module_name, _, function_name = name.partition(":")
    module = _import(name, module_name)
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownNameError(f"function of {module_name}", function_name, public)
    return function  # type: ignore[no-any-return]


def _import(name: str, module_name: str) -> Any:
    """The module, looked for on the path and then in the working folder."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's file, which raises whatever it raises
        raise ParameterError(
            f"model {name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); give"
            f" package.module:function with the module on the Python path or in {here}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
