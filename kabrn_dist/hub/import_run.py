"""A model in memory, written as the first checkpoint of a run, for `mixkabrn generate`, `export`, `run.init_from`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.layout import checkpoint_path
from kabrn_dist.checkpoint.state import CursorState, RunState
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.config import Config
from kabrn_dist.config.file import dump_config
from kabrn_dist.data.corpus import open_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.data.index import TOKENIZER_NAME
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.errors import UserError

# No data has been read, and none is known that could be.
_NO_DATA = ""


def write_start(config: Config, model: MixKABRN, tokenizer: Tokenizer, has_data: bool = False, step: int = 0) -> Path:
    """Write a model as the first checkpoint of the run in `config.run.folder`, with AdamW's moments at zero.

    Args:
        config: Configuration of the run.
        model: The whole model, on the CPU.
        tokenizer: Its tokenizer.
        has_data: Whether `config.data` names shards of that tokenizer, so that the run itself can be trained on. If
            not, another run starts from it with `run.init_from`.
        step: Optimizer steps that its weights have behind them.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: if the folder exists, the shards are of another tokenizer, or the disk refuses.
    """
    folder = config.run.folder
    refuse_existing(folder)
    cursor = _first_cursor(config, tokenizer, step) if has_data else _no_cursor(config)
    state = RunState(
        step=step,
        # AdamW begins anew, with moments of zero.
        updates=0,
        cursor=cursor,
        precision=config.training.chosen_precision,
        loss_scale=2.0**16 if config.training.chosen_precision == "fp16" else 1.0,
        config=config.model_dump(mode="json"),
        tokenizer_sha256=tokenizer.sha256,
    )
    make_folder(folder)
    if not CheckpointStore(folder / "checkpoints").save(step, _fragments(model), state.model_dump()):
        raise UserError(f"{folder}: the checkpoint could not be written; the reason is logged, make room and repeat")
    tokenizer.save(folder / TOKENIZER_NAME)
    atomic_write(folder / "config.yaml", dump_config(config).encode())
    return checkpoint_path(folder / "checkpoints", step)


def refuse_existing(folder: Path) -> None:
    """Check that a folder for results is not there yet.

    Raises:
        UserError: if it is.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder}: exists already; name a new folder")


def _fragments(model: MixKABRN) -> Iterator[Fragment]:
    """The whole tensors, one after another, so that moments take the memory of one."""
    for name, parameter in model.named_parameters():
        shape, values = tuple(parameter.shape), parameter.detach().float().reshape(-1)
        yield Fragment(f"{name}/master", shape, 0, values, owned=True)
        for part in ("exp_avg", "exp_avg_sq"):
            yield Fragment(f"{name}/{part}", shape, 0, torch.zeros_like(values), owned=True)
    for name, values in model.routers.named().items():
        yield Fragment(name, tuple(values.shape), 0, values.reshape(-1), owned=True)


def _no_cursor(config: Config) -> CursorState:
    return CursorState(
        consumed=0, seed=config.run.seed, sequence_length=config.data.sequence_length, fingerprint=_NO_DATA
    )


def _first_cursor(config: Config, tokenizer: Tokenizer, step: int) -> CursorState:
    corpus = open_corpus(config.data)
    if corpus.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{config.data.path}: its tokenizer is not the imported one; prepare the data with "
            "`mixkabrn prepare --tokenizer FILE`, where FILE is what `mixkabrn import --tokenizer-only` writes"
        )
    dataset = TokenDataset(corpus, "train", config.data.sequence_length, config.run.seed)
    return CursorState(**asdict(dataset.state(step * config.training.global_batch_size)))
