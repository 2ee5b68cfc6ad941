"""The endless stream of training batches: a function of the seed and the iteration alone."""

import itertools
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from ghm_d2.errors import RunError, UsageError

MOST_TRIES = 100  # images tried until one can be read


class TrainingBatches(Sampler):
    """Endless batches of (position in the stream, index in the data set), one pair per image.

    All ranks see the same stream, and each takes its share of every batch.
    """

    def __init__(self, sampler, size: int, wide: Sequence[bool] | None = None, skip: int = 0):
        """
        Args:
            sampler: one of Detectron2's for training, with the same seed in every process.
            size: images per batch over all ranks.
            wide: whether each image is wide; a batch then has only wide images or only others.
            skip: number of batches to leave out at the start.

        Raises:
            UsageError: `size` is not a multiple of the number of ranks.
        """
        world = comm.get_world_size()
        if size < 1 or size % world:
            raise UsageError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of the number of ranks, {world}, "
                f"not {size}"
            )
        first = comm.get_rank() * (size // world)
        self._share = slice(first, first + size // world)
        self._sampler, self._size, self._wide, self.skip = sampler, size, wide, skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in itertools.islice(self._batches(), self.skip, None):
            yield batch[self._share]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        # the indices before the sampler divides them among the ranks
        for position, index in enumerate(self._sampler._infinite_indices()):
            group = self._wide is not None and self._wide[index]
            waiting[group].append((position, index))
            if len(waiting[group]) == self._size:
                yield waiting[group]
                waiting[group] = []


class SeededImages(Dataset):
    """Training images after the mapper, by (position, index).

    The mapper's random draws depend only on the seed and the position: not on the worker, nor on
    earlier draws. An unreadable image is replaced by the next readable one of the data set, with an
    entry "faults": {file: what is wrong} for those passed over. If none of `MOST_TRIES` images can
    be read, the result has the entry "error" instead.
    """

    def __init__(
        self,
        images: Sequence[dict],
        mapper: Callable[[dict], dict],
        seed: int,
        mixing: Callable[[dict, Callable[[], dict]], dict] | None = None,
        mixed: int = 0,
    ):
        """
        Args:
            images: data set dicts.
            mapper: gives an entry "error" for an image that it cannot read.
            seed: the seed of the run.
            mixing: combines an image with others that it draws; see `mixing.Mixing`.
            mixed: number of positions, from the start, that `mixing` applies to.
        """
        self._images, self._seed = images, seed
        self._mapper = PicklableWrapper(mapper)  # for workers that are not forked
        self._mixing, self._mixed = mixing, mixed if mixing else 0

    def __getitem__(self, drawn: tuple[int, int]) -> dict:
        position, index = drawn
        with _own_randomness(self._seed, position):
            found = self._first_readable(index)
            if position < self._mixed and "error" not in found:
                return self._mixing(found, self._any)
            return found

    def _any(self) -> dict:
        return self._first_readable(np.random.randint(len(self._images)))

    def _first_readable(self, index: int) -> dict:
        faults = {}
        for step in range(min(len(self._images), MOST_TRIES)):
            image = self._images[(index + step) % len(self._images)]
            mapped = self._mapper(image)
            if "error" not in mapped:
                return mapped | {"faults": faults} if faults else mapped
            faults[image["file_name"]] = mapped["error"]
        first = next(iter(faults.values()))
        others = f"; the next {step} images cannot be read either" if step else ""
        return {"error": first + others}


class TrainingLoader:
    """Batches of `SeededImages`, each a list of dicts.

    Attributes:
        objects: number of annotated objects in all images by class, 0..K-1.
    """

    def __init__(
        self,
        dataset: SeededImages,
        batches: TrainingBatches,
        workers: int,
        objects: Mapping[int, int],
    ):
        """
        Args:
            dataset, batches: the images, and the order in which to load them.
            workers: number of processes that load images; 0: this process does.
        """
        self.objects = objects
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # otherwise PyTorch would draw from the trainer's
        )

    def after(self, done: int) -> Iterator[list[dict]]:
        """Return the batches that follow the first `done`."""
        self._loader.batch_sampler.skip = done
        return iter(self)

    def __iter__(self) -> Iterator[list[dict]]:
        """
        Raises:
            RunError: a worker has died.
        """
        batches = _start(self._loader)
        while True:
            try:
                batch = next(batches)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise _death(batches, error) from None
            yield batch


def _start(loader: DataLoader):
    """Start the workers without PyTorch's signal handler, and return their batches.

    When a worker dies, the handler would raise an error anywhere in this process, such as in a
    step. Without it, the request for the next batch finds the death within five seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return batches


def _death(batches, error: RuntimeError) -> RunError:
    ends = [(w.pid, w.exitcode) for w in getattr(batches, "_workers", ()) if w.exitcode is not None]
    how = ", ".join(f"process {pid}: {_end(code)}" for pid, code in ends) or str(error)
    return RunError(
        f"a data loader worker died ({how}), often for lack of memory; lower "
        "DATALOADER.NUM_WORKERS or provide more memory (in a container also shared memory), then "
        "continue with --resume"
    )


def _end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _ignore_interrupt(_worker: int) -> None:
    """Ignore Ctrl-C, which reaches workers too: the step under way may need another batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _own_randomness(seed: int, position: int):
    """Seed all random generators for one image, and restore their states at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # PyTorch reads a negative seed like this; NumPy refuses one
    words = np.random.SeedSequence([seed % 2**64, position]).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])  # torch.manual_seed would seed the GPU's too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
