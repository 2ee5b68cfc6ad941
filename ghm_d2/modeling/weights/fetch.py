"""Fetch weights into Detectron2's cache, or say how to put them there without a network."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlparse

from detectron2 import model_zoo
from detectron2.checkpoint.catalog import ModelCatalog, ModelCatalogHandler
from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir

from ghm_d2.errors import WeightsError
from ghm_d2.files import content_hash

_OF_ZOO = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
_HASH = re.compile(r"_([0-9a-f]{6})\.pkl$")
_PATIENCE = 20  # seconds that a server may stay silent


def fetch(path: str) -> str:
    """Return the local file that `path` names; download an address that is not in the cache.

    Args:
        path: a file; an address (http(s)://, detectron2://, catalog://); or a configuration of
            Detectron2's model zoo, such as "COCO-Detection/retinanet_R_50_FPN_1x.yaml", for its
            trained weights.

    Raises:
        WeightsError: the file does not exist or cannot be fetched; then the message says where to
            get it and where Detectron2 looks for a copy. Or a file of the zoo does not match its
            name, which ends in the first six digits of its MD5 (Detectron2's MODEL_ZOO.md).
    """
    address = path
    if path.endswith(".yaml") and not os.path.exists(path):
        try:
            address = model_zoo.get_checkpoint_url(path)
        except RuntimeError:
            raise WeightsError(
                f"Detectron2's model zoo has no weights for {path}; check the name"
            ) from None
    try:
        with _impatient():
            local = PathManager.get_local_path(address)
    except Exception as error:  # each kind of address raises its own errors
        reason = f"{path} cannot be fetched ({type(error).__name__}: {error})"
        raise WeightsError(f"{reason}; {_remedy(address)}") from None
    if not os.path.isfile(local):
        raise WeightsError(f"there is no weight file {path}")
    promised = _HASH.search(address) if address.startswith(_OF_ZOO) else None
    if promised and not content_hash(local, "md5").hexdigest().startswith(promised[1]):
        raise WeightsError(
            f"{local} does not match the hash in the name of {address}; delete it to fetch it again"
        )
    return local


def _remedy(address: str) -> str:
    """Return advice on how to provide the weights without a network."""
    by_hand = "set MODEL.WEIGHTS to a local file"
    try:
        url = _web_address(address)
    except (RuntimeError, KeyError):  # the catalog does not know the name
        return by_hand
    parts = urlparse(url)
    if parts.scheme not in ("http", "https"):
        return by_hand
    folder = os.path.join(get_cache_dir(), os.path.dirname(parts.path.lstrip("/")))
    place = os.path.join(folder, url.rpartition("/")[2])
    return f"fetch {url} by other means and copy it to {place}, or set MODEL.WEIGHTS to its path"


def _web_address(address: str) -> str:
    if address.startswith(Detectron2Handler.PREFIX):
        name = address.removeprefix(Detectron2Handler.PREFIX)
        return Detectron2Handler.S3_DETECTRON2_PREFIX + name
    if address.startswith(ModelCatalogHandler.PREFIX):
        return ModelCatalog.get(address.removeprefix(ModelCatalogHandler.PREFIX))
    return address


@contextmanager
def _impatient() -> Iterator[None]:
    """Limit the wait of iopath's download, which a dropped connection blocks for minutes.

    iopath's own log of a failure is disabled, because our error reports it.
    """
    before, logger = socket.getdefaulttimeout(), logging.getLogger("iopath.common.download")
    disabled, logger.disabled = logger.disabled, True
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
        logger.disabled = disabled
