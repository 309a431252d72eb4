"""All tasks by name."""

from __future__ import annotations

from kabrn_dist.evaluation.task import Task
from kabrn_dist.evaluation.tasks.arc import Arc, ArcChallenge, ArcEasy
from kabrn_dist.evaluation.tasks.gsm8k import Gsm8k
from kabrn_dist.evaluation.tasks.hellaswag import HellaSwag
from kabrn_dist.evaluation.tasks.humaneval import HumanEval
from kabrn_dist.evaluation.tasks.last_word import LastWord
from kabrn_dist.evaluation.tasks.long_context import LongContext
from kabrn_dist.evaluation.tasks.math import MathProblems
from kabrn_dist.evaluation.tasks.mbpp import Mbpp
from kabrn_dist.evaluation.tasks.nq_open import NqOpen
from kabrn_dist.evaluation.tasks.openbookqa import OpenBookQA
from kabrn_dist.evaluation.tasks.perplexity import Perplexity
from kabrn_dist.evaluation.tasks.piqa import Piqa
from kabrn_dist.evaluation.tasks.recall import GeneratedRecall, Recall

_ALL: tuple[type[Task], ...] = (
    MathProblems,
    Gsm8k,
    HumanEval,
    Mbpp,
    NqOpen,
    Arc,
    ArcEasy,
    ArcChallenge,
    OpenBookQA,
    HellaSwag,
    Piqa,
    Perplexity,
    LastWord,
    LongContext,
    Recall,
    GeneratedRecall,
)

TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}
