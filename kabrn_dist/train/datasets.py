"""The datasets of a run: both splits and the tasks, opened and checked before any process group forms."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kabrn_dist.config import Config
from kabrn_dist.data.base import base_data_config, check_base_tokenizer
from kabrn_dist.data.corpus import Corpus, mix_corpora, open_corpus
from kabrn_dist.data.dataset import TokenDataset
from kabrn_dist.data.locations import check_locations
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.data.whole_documents import describe_documents
from kabrn_dist.distributed.collectives import run_on_all
from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.evaluation.task_data import TaskData
from kabrn_dist.train.task_scores import open_tasks
from kabrn_dist.utils.errors import UserError

# Reading a text 4 times is nearly as good as new text, 16 times worth half as much, and beyond 40 times worth nothing:
# Muennighoff et al., "Scaling Data-Constrained Language Models", arXiv 2305.16264, section 6.
MAX_USEFUL_EPOCHS = 40
# Between looks at the thread that verifies shards, and before a line says that there is something to wait for.
POLL_SECONDS, SILENT_WAIT_SECONDS = 0.02, 2.0


@dataclass(frozen=True)
class Datasets:
    """Both splits of a run's data.

    Attributes:
        train: training sequences; in a fine-tuning also those that are replayed, whose sources come last.
        validation: validation sequences, of the same sources in the same order but without replayed ones; None if
            there are none and the run asks for no validation.
        tokenizer: the tokenizer of all sources.
        bytes_per_token: [vocabulary] int64, UTF-8 bytes that each token stands for.
        gzip_bits_per_byte: compression of the validation text by `gzip -9`, for comparison.
        tasks: what `validation.tasks` asks.
        base: validation sequences of what the base of a fine-tuning was trained on; None if they cannot be read, or
            nothing is fine-tuned.
        warnings: what the console should say of them.
    """

    train: TokenDataset
    validation: TokenDataset | None
    tokenizer: Tokenizer
    bytes_per_token: np.ndarray
    gzip_bits_per_byte: float
    tasks: Sequence[TaskData] = ()
    base: TokenDataset | None = None
    warnings: Sequence[str] = ()

    def is_verifying(self) -> bool:
        """Return whether a shard that was opened is still to be compared with its hash. Never blocks."""
        return self.train.corpus.files.is_verifying()

    def check_shards(self) -> None:
        """Do nothing unless a shard that was opened turned out to be damaged.

        Raises:
            UserError: if one did.
        """
        self.train.corpus.files.check()


def open_datasets(config: Config) -> Datasets:
    """Open both splits and check them against the model and the run's length.

    Raises:
        UserError: for missing or damaged shards, a wrong tokenizer, weights that name no source or sum to 0, data that
            ends before the run does or has nothing to learn, a vocabulary larger than the model's, tasks that cannot be
            scored, or data of a base that is asked for and cannot be read.
    """
    data = config.data
    check_locations(data, config.model.vocab_size)
    corpus = open_corpus(data)
    base, warnings = _open_base(config, corpus)
    mixed = corpus
    if config.finetune is not None and config.finetune.replay and base is not None:
        mixed = mix_corpora(corpus, base, config.finetune.replay, "finetune.base_data")
    train = TokenDataset(mixed, "train", data.sequence_length, config.run.seed)
    validation = None
    if config.validation.eval_interval or _can_validate(corpus, data.sequence_length):
        validation = TokenDataset(corpus, "validation", data.sequence_length, config.run.seed, ordered=False)
    train.check_length(config.training.steps * config.training.global_batch_size)
    _check_replayed_length(config, train, len(corpus.sources))
    _check_targets(corpus)
    tokenizer = corpus.tokenizer()
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} tokens of "
            f"{data.path}/tokenizer.json; set model.vocab_size to at least "
            f"{tokenizer.vocab_size}, or to go on with a run, use the shards that it has begun with"
        )
    bytes_per_token, gzip = tokenizer.bytes_per_token(), corpus.gzip_bits_per_byte()
    base_validation, more = _open_base_validation(config, base)
    tasks = open_tasks(config)
    return Datasets(train, validation, tokenizer, bytes_per_token, gzip, tasks, base_validation, [*warnings, *more])


def _open_base(config: Config, corpus: Corpus) -> tuple[Corpus | None, list[str]]:
    """What the base was trained on, and a warning if it cannot be read and need not be."""
    finetune = config.finetune
    if finetune is None:
        return None, []
    check_base_tokenizer(config, corpus.tokenizer())
    try:
        data = base_data_config(config)
        check_locations(data)
        opened = open_corpus(data)
        # Whatever its index says, what is replayed has no end.
        endless = tuple(source._replace(epochs=None) for source in opened.sources)
        base = replace(opened, sources=endless, files=corpus.files)
        if base.tokenizer_sha256 != corpus.tokenizer_sha256:
            raise UserError(f"{base.location} has another tokenizer than {corpus.location}")
        return base, []
    except UserError as error:
        if finetune.base_data is not None:
            raise UserError(f"finetune.base_data: {error}") from error
        if finetune.replay:
            raise UserError(
                f"finetune.replay {finetune.replay:g} needs what the base was trained on ({error}); set "
                "finetune.base_data to its shards, or replay to 0"
            ) from error
        return None, [_describe_unmeasured(error)]


def _open_base_validation(config: Config, base: Corpus | None) -> tuple[TokenDataset | None, list[str]]:
    """The validation split of what the base was trained on, and a warning if it has none."""
    if base is None:
        return None, []
    try:
        return TokenDataset(base, "validation", config.data.sequence_length, config.run.seed, ordered=False), []
    except UserError as error:
        return None, [_describe_unmeasured(error)]


def _describe_unmeasured(error: UserError) -> str:
    return (
        f"warning: what is forgotten is not measured, as the base's data cannot be used ({error}); set "
        "finetune.base_data to shards of it"
    )


def _check_targets(corpus: Corpus) -> None:
    """Check that something in the sources that are drawn from carries loss."""
    drawn = [source.source.train for source in corpus.sources if source.weight > 0]
    if not any(split.loss_tokens for split in drawn):
        raise UserError(
            f"{corpus.location}: none of its {sum(split.tokens for split in drawn):,} training tokens carries loss, so "
            "there is nothing to learn; prepare it with texts of which something is learned, such as conversations "
            "with answers of the assistant"
        )


def _check_replayed_length(config: Config, train: TokenDataset, own: int) -> None:
    """Check that the run's own data does not end before the run does: what is replayed has no end."""
    replay = 0.0 if config.finetune is None else config.finetune.replay
    total = config.training.steps * config.training.global_batch_size
    drawn = sum(train.sequences_drawn(total)[:own]) if replay else total
    # Sources are within one sequence of their shares, which are whole numbers of 4096ths.
    if replay and drawn < (1 - replay) * total * (1 - 2**-8) - own:
        raise UserError(
            f"training.steps × training.global_batch_size needs {round((1 - replay) * total):,} sequences beside those "
            f"of finetune.replay {replay:g}, the data has {drawn:,} (data.epochs); lower training.steps, or raise or "
            "leave out data.epochs"
        )


def describe_repetition(config: Config, train: TokenDataset) -> str:
    """Return a warning of a run that reads a source more often than is of use; empty for others."""
    total = config.training.steps * config.training.global_batch_size
    drawn = zip(train.corpus.names, train.sequences_per_source, train.sequences_drawn(total), strict=True)
    often = [(name, draws / count) for name, count, draws in drawn if count and draws / count > MAX_USEFUL_EPOCHS]
    if not often:
        return ""
    many = ", ".join(f"{name} {epochs:,.0f} times" for name, epochs in often)
    return (
        f"warning: training.steps {config.training.steps} reads {many}; beyond about {MAX_USEFUL_EPOCHS} times a model "
        "learns nothing more from the same text; lower training.steps, or prepare more text"
    )


def describe_cut_documents(train: TokenDataset) -> list[str]:
    """Return a warning for each source that keeps documents whole and has longer ones."""
    lines = []
    for number, plan in train.whole.items():
        if plan.cut:
            shards = train.corpus.sources[number].source.train.shards
            lost = sum(document.is_lost for document in plan.cut)
            lines.append(
                f"warning: {len(plan.cut):,} of {plan.documents:,} documents of source {train.corpus.names[number]} "
                f"are longer than data.sequence_length {train.sequence_length} and cut there; of {lost:,} of them "
                f"nothing that carries loss is left, so they are left out ({describe_documents(shards, plan.cut)})"
            )
    return lines


def _can_validate(corpus: Corpus, sequence_length: int) -> bool:
    validation = [(source.source.whole, source.source.split("validation").tokens) for source in corpus.sources]
    return any(tokens > (1 if whole else sequence_length) for whole, tokens in validation)


def wait_for_verification(
    datasets: Datasets, mesh: Mesh, report_progress: Callable[[str], None], print_line: Callable[[str], None]
) -> None:
    """Wait until all shards that were read are known to be undamaged: no checkpoint holds anything of others.

    Collective.

    Args:
        datasets: both splits of the data.
        mesh: all ranks.
        report_progress: told again and again that this process is alive.
        print_line: prints one line on the console, if the wait takes long.

    Raises:
        UserError: on all ranks, with the name of a damaged shard.
    """
    start, printed = time.monotonic(), False
    while True:
        pending = mesh.any_rank(datasets.is_verifying())
        run_on_all(None, datasets.check_shards)
        if not pending:
            return
        if not printed and time.monotonic() - start > SILENT_WAIT_SECONDS:
            print_line("waiting until the shards that were read are verified; then the checkpoint is saved")
            printed = True
        report_progress("verifying shards before a save")
        time.sleep(POLL_SECONDS)
