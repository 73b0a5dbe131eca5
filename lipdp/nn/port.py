"""From a plain torch model to a constrained one: `from_torch` rewrites it, `constrain` keeps its architecture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from lipdp.constraints import check_positive
from lipdp.nn.gates import InputBound, default_input_bound
from lipdp.nn.rewrite import SPECTRAL, Port, PortingTable
from lipdp.nn.tracing import checked_shape
from lipdp.nn.walk import replaced


def from_torch(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    input_bound: float | None = None,
    bias: bool = False,
    keep: Sequence[type[nn.Module]] = (),
    centre: bool | None = None,
) -> nn.Module:
    """A constrained model with the architecture of a plain torch model, for private training without clipping.

    torch.fx traces the forward pass, modules of your own included, and every operation gets its 1-Lipschitz
    counterpart:

    - dense layers and convolutions become `SpectralLinear`, `SpectralConv1d`, `SpectralConv2d`, with the nearest
      orthogonal weights and, by default, no biases (a bias is bounded at every position, so it costs noise);
    - activations become `GroupSort2`, or `ReLU` where the number of channels is odd; beside a norm pooling, which is a
      non-linearity and keeps more of the norm alone, they are left out;
    - max and average pooling become `ScaledL2NormPool2d` over windows side by side, and `LayerCentering` over channels;
    - batch, group, layer and instance norms become `LayerCentering`; dropout and a softmax at the output are left out;
    - sums a ± b become (a ± b)/2, concatenations of n tensors are divided by √n;
    - in front stands `InputBound(c, radius=1)`, x ↦ x/c projected on the unit ball; of rows of 32 entries or more
      each sample's mean is subtracted before: of pixels in [0, 1] it has much of the norm.

    Guarantees: every Δ is finite, and the network's Lipschitz constant is at most 1/c up to rounding, unless the
    forward pass multiplies by numbers above 1 or multiplies activations (the table says so), keeps modules (`keep`),
    or the model has an `InputBound` already, which stays. It is another function than the model's, to be trained.
    Names of layers are kept, the model given is not changed. A chain of layers comes back as an `nn.Sequential` (names
    with "_" for "."), anything else as a `torch.fx.GraphModule`.

    Args:
        model: any module torch.fx can trace, with one input and the logits as its output.
        input_shape: of one sample, without the batch axis.
        input_bound: c, a public constant; by default √n/4 for images of n entries and centred rows, √n/2 else.
        bias: keep biases, each in a ball of radius 1.
        centre: whether each sample's own mean is subtracted; by default as said, where no `input_bound` is given.
        keep: classes to be left as they are, such as modules of your own with a rule (`lipdp.bounds.rule`).

    Returns:
        the new model; `porting_table` says what became what.

    Raises:
        UnsupportedOperationError: operations without counterpart, all of them named; or torch.fx can't follow the code.
        UnsupportedLayerError: a layer with hooks or a reparametrised weight.
        ParameterError: the model doesn't take inputs of that shape.

    >>> plain = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    >>> lipdp.nn.from_torch(plain, input_shape=(8,), input_bound=2.0)
    Sequential(
      (input_bound): InputBound(bound=2.0, radius=1.0)
      (0): SpectralLinear(in_features=8, out_features=6, bias=False)
      (1): GroupSort2(dim=1)
      (2): SpectralLinear(in_features=6, out_features=3, bias=False)
    )

    Source: Béthune et al. (2024), appendix C; Anil, Lucas & Grosse (2019).
    """
    return Port(model, input_shape, input_bound, bias, tuple(keep), centre).run()[0]


def porting_table(model: nn.Module, input_shape: tuple[int, ...], **options: Any) -> PortingTable:
    """What `from_torch` puts in place of each layer, and why.

    Args: as `from_torch`.

    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.ReLU())
    >>> print(lipdp.nn.porting_table(net, (8,), input_bound=2.0))
    layer        was     becomes         why
    input_bound  -       InputBound      shortens inputs longer than 2, then divides by 2
    0            Linear  SpectralLinear  the nearest orthogonal weights; no bias, which costs noise
    1            ReLU    ReLU            3 channels are odd and make no pairs; an even width would sort
    """
    options = {"input_bound": None, "bias": False, "keep": (), "centre": None, **options}
    keep = tuple(options["keep"])
    return Port(model, input_shape, options["input_bound"], options["bias"], keep, options["centre"]).run()[1]


def constrain(
    model: nn.Module, *, input_shape: tuple[int, ...] | None = None, input_bound: float | None = None
) -> nn.Module:
    """The model with spectral layers in place of its dense layers and convolutions, and nothing else changed.

    Weights are projected on the nearest orthogonal ones and biases kept, so that no weight can grow and with it the
    sensitivity of the others. Layers are replaced in place, wherever they are; an `InputBound` is put in front if the
    model has none: into an `nn.Sequential`, else by a new one around the model. So give the optimiser the parameters
    of what is returned, not those of before.

    Args:
        model: any module.
        input_shape: of one sample: chooses c, as `from_torch`.
        input_bound: c, a public constant; without it and without `input_shape`, 1.

    Raises:
        UnsupportedLayerError: a layer with dilation or a padding that repeats border entries, or with hooks.

    >>> lipdp.nn.constrain(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU()), input_bound=2.0)
    Sequential(
      (0): InputBound(bound=2.0)
      (1): SpectralLinear(in_features=8, out_features=6, bias=True)
      (2): ReLU()
    )
    """
    if input_bound is None:
        input_bound = 1.0 if input_shape is None else default_input_bound(checked_shape(input_shape))
    bound = InputBound(check_positive("input_bound", input_bound))
    model = replaced(model, SPECTRAL, "", {})
    if any(isinstance(module, InputBound) for module in model.modules()):
        return model
    if type(model) is nn.Sequential:
        return model.insert(0, bound)
    return nn.Sequential(OrderedDict(input_bound=bound, model=model))
