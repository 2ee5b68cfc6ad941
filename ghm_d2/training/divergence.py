"""Finds the module in which NaN or infinity first appeared when a training diverged."""

from collections.abc import Callable

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ghm_d2.errors import DivergedError
from ghm_d2.losses.density.sync import alone

REMEDY = (
    "try a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, "
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model, or MODEL.GHM.EMA_INIT debias"
)


def diverged(
    model: nn.Module,
    batch: list[dict],
    what: str,
    iteration: int,
    gather: Callable[[dict], list[dict]] = lambda found: [found],
) -> DivergedError:
    """Return the error for a step with a NaN or infinite loss or gradient.

    The model runs once more on the batch, with the weights from before the step, to find the first
    module with a NaN or infinite output, and its feature level.

    Args:
        what: what is NaN or infinite, such as "loss_cls is nan".
        gather: takes this rank's findings and returns those of all ranks.

    Returns:
        an error; its `report` has iteration, what, where (None if not found), the batch's images.
    """
    files = [str(item["file_name"]) for item in batch if "file_name" in item]
    found = gather({"where": first_nonfinite_output(model, batch), "images": files})
    where = next((x["where"] for x in found if x["where"]), None)
    files = [file for x in found for file in x["images"]]
    source = f", first in the output of {where}" if where else ""
    images = f" (images: {', '.join(files)})" if files else ""
    happened = f"iteration {iteration}: {what}"
    report = {"iteration": iteration, "what": what, "where": where, "images": files}
    return DivergedError(f"{happened}{source}{images}; {REMEDY}", happened, report)


def is_finite(model: nn.Module) -> bool:
    """Return whether all parameters and buffers of `model` are finite."""
    tensors = model.state_dict().values()
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


@torch.no_grad()
def first_nonfinite_output(model: nn.Module, batch: list[dict]) -> str | None:
    """Return the name of the first module with a NaN or infinite output; None if all are finite.

    The feature level is added if the module runs once per level, as in the heads of RetinaNet and
    the RPN.
    """
    calls: dict[str, int] = {}
    found: list[tuple[str, int]] = []

    def check(name):
        def hook(_module, _inputs, output):
            calls[name] = calls.get(name, 0) + 1
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append((name, calls[name]))

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(check(name)) for name, module in leaves]
    state = {k: v.clone() for k, v in model.named_buffers()}  # moving averages are restored below
    try:
        # hooks would make a compiled network recompile
        with EventStorage(0), alone(), torch.compiler.set_stance("force_eager"):
            model(batch)
    except (RuntimeError, AssertionError, FloatingPointError, ValueError):
        pass  # NaN inputs may stop a later module; the hooks have seen enough
    finally:
        for handle in handles:
            handle.remove()
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    if not found:
        return None
    name, call = found[0]
    if calls[name] == 1:
        return name
    levels = _level_names(model)
    return f"{name} at level {levels[call - 1] if call <= len(levels) else call}"


def _level_names(model: nn.Module) -> list[str]:
    generator = getattr(model, "proposal_generator", None)
    return list(getattr(model, "head_in_features", None) or getattr(generator, "in_features", ()))
