"""A model to evaluate from what lies on the disk: a run's folder, an export, or a model file of the runtime in C."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from kabrn_dist.evaluation.native_model import NativeEvaluatedModel
from kabrn_dist.evaluation.requests import EvaluatedModel
from kabrn_dist.inference.folder import check_run_folder, is_export
from kabrn_dist.utils.errors import UserError

if TYPE_CHECKING:
    from kabrn_dist.evaluation.torch_model import TorchModel

MODEL_FILE_SUFFIX = ".mkb"


def load_evaluated_model(
    path: Path | str, device: str = "cpu", batch_size: int = 32, step: int | None = None
) -> EvaluatedModel:
    """Load a model that answers the requests of tasks.

    Its fingerprint is a hash of the model's description, the hashes of its weights, and the tokenizer's; of a model
    file it is the file's own hash. Torch is loaded for folders only.

    Args:
        path: A run's folder, an export's, or a model file (.mkb).
        device: Where a folder's model computes, such as "cpu" or "cuda".
        batch_size: Rows that are read and decoded together; a model file reads one at a time.
        step: Checkpoint of a run; None takes the newest intact one.

    Raises:
        UserError: for a path that is none of these, or contents that are damaged or do not belong together.
    """
    path = Path(path)
    if path.suffix == MODEL_FILE_SUFFIX and not path.is_dir():
        for option, value, usual in (("device", device, "cpu"), ("step", step, None)):
            if value != usual:
                raise UserError(
                    f"{path}: is a model file, for which {option} {value} has no meaning; leave it out, or evaluate "
                    "the run's folder"
                )
        return NativeEvaluatedModel(path)
    _check_device(device)
    if is_export(path):
        if step is not None:
            raise UserError(f"{path}: is an export, which has no checkpoint of step {step}; leave the step out")
        return _load_export(path, device, batch_size)
    check_run_folder(path, "config.yaml")
    return _load_run(path, device, batch_size, step)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    # torch raises several kinds of errors for names that it does not know and for what is not there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r}: cannot be used here ({reason}); use cpu") from None


def _load_run(folder: Path, device: str, batch_size: int, step: int | None) -> TorchModel:
    from kabrn_dist.checkpoint.manifest import MANIFEST_BYTES_LIMIT, MANIFEST_NAME
    from kabrn_dist.evaluation.torch_model import TorchModel
    from kabrn_dist.inference.run import Run
    from kabrn_dist.utils.safe_open import read_plain

    run = Run.open(folder, step)
    tokenizer = run.tokenizer()
    # The weights' rounding is the precision's.
    parts = [run.config.model.model_dump_json(), run.config.training.precision, tokenizer.sha256]
    manifest = hashlib.sha256(read_plain(run.checkpoint / MANIFEST_NAME, MANIFEST_BYTES_LIMIT)).hexdigest()
    name = f"{folder.resolve().name} at step {run.step}"
    return TorchModel(run.model(device), tokenizer, name, _join_hashes([*parts, manifest]), batch_size)


def _load_export(folder: Path, device: str, batch_size: int) -> TorchModel:
    from kabrn_dist.evaluation.torch_model import TorchModel
    from kabrn_dist.inference.load import hash_export, load_export

    model, tokenizer = load_export(folder, device)
    parts = [model.config.model_dump_json(), tokenizer.sha256, *hash_export(folder)]
    return TorchModel(model, tokenizer, folder.resolve().name, _join_hashes(parts), batch_size)


def _join_hashes(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
