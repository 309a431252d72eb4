"""The datasets of a run: both splits and the tasks, opened and checked before any process group forms."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kabrn_dist.config import Config
from kabrn_dist.data.corpus import Corpus, open_corpus
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
        train: training sequences.
        validation: validation sequences, of the same sources in the same order; None if there are none and the run
            asks for no validation.
        tokenizer: the tokenizer of all sources.
        bytes_per_token: [vocabulary] int64, UTF-8 bytes that each token stands for.
        gzip_bits_per_byte: compression of the validation text by `gzip -9`, for comparison.
        tasks: what `validation.tasks` asks.
    """

    train: TokenDataset
    validation: TokenDataset | None
    tokenizer: Tokenizer
    bytes_per_token: np.ndarray
    gzip_bits_per_byte: float
    tasks: Sequence[TaskData] = ()

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
            ends before the run does, a vocabulary larger than the model's, or tasks that cannot be scored.
    """
    data = config.data
    check_locations(data, config.model.vocab_size)
    corpus = open_corpus(data)
    train = TokenDataset(corpus, "train", data.sequence_length, config.run.seed)
    validation = None
    if config.validation.eval_interval or _can_validate(corpus, data.sequence_length):
        validation = TokenDataset(corpus, "validation", data.sequence_length, config.run.seed, ordered=False)
    train.check_length(config.training.steps * config.training.global_batch_size)
    tokenizer = corpus.tokenizer()
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} tokens of "
            f"{data.path}/tokenizer.json; set model.vocab_size to at least "
            f"{tokenizer.vocab_size}, or to go on with a run, use the shards that it has begun with"
        )
    bytes_per_token, gzip = tokenizer.bytes_per_token(), corpus.gzip_bits_per_byte()
    return Datasets(train, validation, tokenizer, bytes_per_token, gzip, open_tasks(config))


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
