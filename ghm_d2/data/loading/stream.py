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

MOST_TRIES = 100  # images looked at for one that can be read


class TrainingBatches(Sampler):
    """Endless batches of (position, index): of an image in the stream, and in the data set.

    All processes see the same stream, and each takes its share of every batch.
    """

    def __init__(self, sampler, size: int, wide: Sequence[bool] | None = None, skip: int = 0):
        """
        Args:
            sampler: one of Detectron2's for training, with the same seed in every process.
            size: images of a batch, over all processes.
            wide: of each image; a batch then has wide ones or others.
            skip: batches, from the start, that are left out.

        Raises:
            UsageError: `size` cannot be shared evenly.
        """
        world = comm.get_world_size()
        if size < 1 or size % world:
            raise UsageError(
                f"SOLVER.IMS_PER_BATCH is to be a multiple of the number of processes, {world}, "
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
        # before the sampler deals its indices out to the processes
        for position, index in enumerate(self._sampler._infinite_indices()):
            group = self._wide is not None and self._wide[index]
            waiting[group].append((position, index))
            if len(waiting[group]) == self._size:
                yield waiting[group]
                waiting[group] = []


class SeededImages(Dataset):
    """Images as training sees them, by (position, index).

    What the mapper draws depends on the seed and the position alone: not on the worker, nor on
    what was drawn before. In place of an image that cannot be read comes the next of the data set
    that can, with an entry "faults": {file: what is wrong} of those passed over. Where none of
    them can be read, the result has the entry "error" instead.
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
            seed: of the run.
            mixing: makes an image of one and of others that it draws; see `mixing.Mixing`.
            mixed: positions, from the start, whose images it makes.
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
        others = f", nor can the {step} images after it" if step else ""
        return {"error": first + others}


class TrainingLoader:
    """Batches of `SeededImages`, a list of dicts each.

    Attributes:
        objects: annotated objects by class, 0..K-1, in all images.
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
            dataset, batches: what is loaded, and in which order.
            workers: processes that load; 0 for this one.
        """
        self.objects = objects
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # PyTorch would draw from the trainer's
        )

    def after(self, done: int) -> Iterator[list[dict]]:
        """The batches that follow the first `done`."""
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

    The handler would raise a worker's death wherever this process is, such as in a step. Without it
    the death is found when a batch is wanted, within five seconds.
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
        f"a worker that loads images died ({how}); lower DATALOADER.NUM_WORKERS or give it more "
        "memory (in a container shared memory too), then --resume continues"
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
    # as PyTorch takes a negative seed, which NumPy does not
    words = np.random.SeedSequence([seed % 2**64, position]).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])  # torch.manual_seed seeds the GPU's too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
