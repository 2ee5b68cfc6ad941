"""The images that annotations may refer to, and their names in the output."""

import os
from pathlib import Path, PurePosixPath
from typing import NoReturn

from ghm_d2.data.coco_json import is_plain, safe_name
from ghm_d2.data.importing.listing import Listing, list_folder
from ghm_d2.data.importing.pairing import Finder
from ghm_d2.data.importing.source import Box, Item
from ghm_d2.errors import DataError

REMEDY = "choose the image folder with --images, or import only one of the folders"
_NOT_READ = (".avif", ".gif", ".heic", ".jfif", ".svg")


class Images(Finder):
    """The images of a listing, or of another folder."""

    def __init__(self, listing: Listing, elsewhere: Path | None = None):
        if elsewhere is not None and not elsewhere.is_dir():
            raise DataError(f"{elsewhere}: is not a folder")
        self.listing = list_folder(elsewhere) if elsewhere else listing
        super().__init__(self.listing.images)
        own = {name[: name.rfind("/") + 1] for name in self.listing.images}
        paths = list(map(PurePosixPath, own))
        above = {str(folder) for path in paths for folder in (path, *path.parents)}
        self.folders = sorted({"" if name == "." else name for name in above})

    def path(self, name: str) -> Path:
        """Return the path of an image of the listing."""
        return Path(os.path.join(self.listing.root, name))

    def output_name(self, name: str) -> str:
        """Return an image's path below the output's images folder: its path here without `images/`.

        Raises: DataError if the name cannot be written to a JSON, or not be read there.
        """
        if not is_plain(name):
            where = self.listing.root
            raise DataError(
                f"{where}: the file name {name!r:.120} is not UTF-8 text or has control "
                "characters; rename the file"
            )
        first, _, rest = name.partition("/")
        return rest if rest and first.lower() in ("images", "jpegimages") else name

    def none_found(self, claim: str, file: str) -> NoReturn:
        """Raise the DataError for a `file` whose images, such as `claim`, are all missing."""
        safe_name(claim, file)
        raise DataError(
            f"{file}: none of its images (such as {claim:.120}) is in {self.listing.root}; "
            "pass their folder with --images"
        )

    def item(
        self,
        name: str | None,
        claim: str,
        where: str,
        boxes: list[Box],
        size: tuple[int, int] | None = None,
        relative: bool = False,
    ) -> Item:
        """Return the image `name` of the listing; if None, `claim` as a missing image."""
        if name is None:
            return Item(Path(), claim, where, boxes, fault=missing(claim))
        path = self.path(name)
        return Item(path, self.output_name(name), where, boxes, size, relative, place=name)


def missing(claim: str) -> str:
    """Return the message for an image that is missing."""
    try:
        name = safe_name(claim, "not found")
    except DataError as error:
        return str(error)
    other = PurePosixPath(name).suffix.lower() in _NOT_READ
    return f"{name}: " + ("not BMP, JPEG, PNG, TIFF or WebP" if other else "no such image")
