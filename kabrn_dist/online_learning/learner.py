"""A few gradient steps on an adapter, bounded in time, steps and memory; the best of them is what stays."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.online_learning.course import Course, LearningLimits, LearningProgress, LearningResult
from kabrn_dist.online_learning.rows import (
    choose_row_tokens,
    largest_loss,
    make_row,
    mean_loss,
    measure_token_bytes,
    pack_rows,
)
from kabrn_dist.online_learning.samples import Sample
from kabrn_dist.online_learning.trainable import TrainableAdapter
from kabrn_dist.utils.errors import UserError

# An answer is known when each of its tokens has a probability of e^−0.35 = 0.7: greedy decoding then gives it.
KNOWN_NATS = 0.35
# A correction ends where so many steps have not lowered its loss by so much.
PATIENCE_STEPS, PATIENCE_SHARE = 40, 0.03
GRADIENT_NORM = 1.0
BETAS = (0.9, 0.95)
STEP_TOKENS = 1024
PASSES = 20
EVALUATIONS = 8
# Of many samples every tenth is not learned from, and tells when to stop.
HELD_OUT_STEP, HELD_OUT_MIN, EVALUATED_SAMPLES = 10, 30, 16
REHEARSED_SAMPLES = 2
REPLAYED_TOKENS = 64
# Samples of the base's own text for each sample of notes.
REPLAY_SHARE = 0.25


Report = Callable[[LearningProgress], None]


class Learner:
    """Trains an adapter beside a model.

    Args:
        model: The model, whose weights need no gradient.
        adapter: What is trained.
        limits: What each learning may take.
        base_samples: Texts of the base's own data to replay and, separately, to measure what is forgotten.
        seed: Of the order of samples.

    Attributes:
        row_tokens: Longest row that there is memory for.

    Raises:
        UserError: if there is too little memory for any row.
    """

    def __init__(
        self,
        model: MixKABRN,
        adapter: TrainableAdapter,
        limits: LearningLimits,
        base_samples: tuple[Sequence[Sample], Sequence[Sample]] = ((), ()),
        seed: int = 0,
    ) -> None:
        self._model, self._adapter, self._limits = model, adapter, limits
        self._replay, self._forgetting = base_samples
        self._random = random.Random(seed)
        self.row_tokens = choose_row_tokens(measure_token_bytes(model), limits.memory_bytes)
        self._learned: list[Sample] = []

    def learn(self, samples: Sequence[Sample], report: Report = lambda _: None) -> LearningResult:
        """Learn from notes and conversations, pass by pass, until the time or the steps are used up.

        The rate falls to zero with them. What is kept is the best of some evaluations on the way. Ctrl-C ends it early.

        Args:
            samples: What to learn from.
            report: Told of each step.

        Raises:
            UserError: if losses are not finite.
        """
        held = len(samples) >= HELD_OUT_MIN
        kept = [sample for number, sample in enumerate(samples) if not held or number % HELD_OUT_STEP]
        judged = [*samples[::HELD_OUT_STEP]] if held else [*samples]
        judged = judged[:EVALUATED_SAMPLES]
        course = Course(self._limits, _count_steps(kept, self._limits.steps, self.row_tokens))
        return self._run(course, judged, held, lambda: self._note_steps(kept, course, report))

    def correct(self, sample: Sample, report: Report = lambda _: None) -> LearningResult:
        """Learn one answer until the model would give it, with some of those that it was taught before.

        Args:
            sample: The conversation, with loss on the answer.
            report: Told of each step.

        Raises:
            UserError: if losses are not finite.
        """
        course = Course(self._limits, self._limits.steps)

        def is_known() -> bool:
            return largest_loss(self._model, sample) <= KNOWN_NATS

        result = self._run(course, [sample], False, lambda: self._correction_steps(sample, course, report), is_known)
        self._learned.append(sample)
        return result

    def forget_corrections(self, count: int) -> None:
        """Forget which answers were taught after the first `count`."""
        del self._learned[count:]

    @property
    def corrections(self) -> int:
        """Number of answers that were taught."""
        return len(self._learned)

    def _run(
        self,
        course: Course,
        judged: list[Sample],
        held: bool,
        steps: Callable[[], Iterator[bool]],
        is_enough: Callable[[], bool] = lambda: False,
    ) -> LearningResult:
        """Take steps, of which some are followed by an evaluation, and keep the best; end where one is good enough."""
        adapter = self._adapter
        before, base_before = self._judge(judged), self._judge_base()
        best, best_steps, values = before, 0, adapter.copy()
        interrupted, taken = False, 0
        course.start()
        try:
            for is_milestone in [] if is_enough() else steps():
                taken += 1
                if is_milestone and (loss := self._judge(judged)) < best:
                    best, best_steps, values = loss, taken, adapter.copy()
                    if is_enough():
                        break
        except KeyboardInterrupt:
            interrupted = True
            # Pressed again, it takes what was the best until then.
            with contextlib.suppress(KeyboardInterrupt):
                if (loss := self._judge(judged)) < best:
                    best, best_steps, values = loss, taken, adapter.copy()
        adapter.restore(values)
        seconds, base_after = time.monotonic() - course.begun, None
        try:
            base_after = self._judge_base()
        except KeyboardInterrupt:
            interrupted = True
        return LearningResult(
            best_steps, seconds, before, best, held, base_before, base_after, course.passes, interrupted
        )

    def _note_steps(self, samples: Sequence[Sample], course: Course, report: Report) -> Iterator[bool]:
        optimizer = self._make_optimizer()
        order: list[Sample] = []
        milestone, targets = 1, 0
        while not course.ended:
            batch: list[Sample] = []
            while sum(len(sample.ids) for sample in batch) < STEP_TOKENS:
                if not order:
                    if batch and len(batch) >= len(samples):
                        break
                    order = self._random.sample(samples, len(samples))
                batch.append(order.pop())
            targets += len(batch)
            course.passes = targets / len(samples)
            replayed = self._draw(self._replay, max(1, round(REPLAY_SHARE * len(batch))))
            loss = self._step(optimizer, [batch, replayed], course.rate)
            course.count()
            report(course.progress(loss))
            is_milestone = course.share * EVALUATIONS >= milestone or course.ended
            milestone += is_milestone
            yield is_milestone

    def _correction_steps(self, sample: Sample, course: Course, report: Report) -> Iterator[bool]:
        optimizer, best, waited = self._make_optimizer(), float("inf"), 0
        while not course.ended:
            rehearsed = self._draw(self._learned, REHEARSED_SAMPLES)
            replayed = [self._crop(each) for each in self._draw(self._replay, 1)]
            loss = self._step(optimizer, [[sample], rehearsed, replayed], 1.0)
            course.count()
            course.passes += 1
            report(course.progress(loss))
            waited = 0 if loss < (1 - PATIENCE_SHARE) * best else waited + 1
            best = best if waited else loss
            is_last = course.ended or waited == PATIENCE_STEPS
            # The loss is that before the step, so that an evaluation is worth its time only near the end.
            yield loss <= KNOWN_NATS or is_last
            if is_last:
                return

    def _step(self, optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Sample]], rate: float) -> float:
        """Take one step on the sum of the groups' mean losses; return that of the first group."""
        optimizer.zero_grad(set_to_none=True)
        means = []
        for group in groups:
            total, targets = 0.0, max(1, sum(sample.targets for sample in group))
            for row in pack_rows(group, self.row_tokens):
                loss: Tensor = self._model(make_row(row)).language
                (loss / targets).backward()
                total += float(loss.detach())
            means.append(total / targets)
        if not sum(means) < float("inf"):
            raise UserError("learning: the loss is not finite; learn from other texts, or begin with another --out")
        torch.nn.utils.clip_grad_norm_(self._adapter.parameters, GRADIENT_NORM)
        for settings in optimizer.param_groups:
            settings["lr"] = self._adapter.learning_rate * rate
        optimizer.step()
        return means[0]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self._adapter.parameters, lr=self._adapter.learning_rate, betas=BETAS)

    def _crop(self, sample: Sample) -> Sample:
        """A part of a text that takes no longer than a short answer."""
        start = self._random.randrange(max(1, len(sample.ids) - REPLAYED_TOKENS))
        part = slice(start, start + REPLAYED_TOKENS)
        return Sample(sample.ids[part], [False, *sample.learned[part][1:]])

    def _draw(self, samples: Sequence[Sample], count: int) -> list[Sample]:
        return self._random.sample(samples, min(count, len(samples)))

    def _judge(self, samples: Sequence[Sample]) -> float:
        return mean_loss(self._model, samples, self.row_tokens)

    def _judge_base(self) -> float | None:
        return self._judge(self._forgetting) if self._forgetting else None


def _count_steps(samples: Sequence[Sample], most: int, row_tokens: int) -> int:
    tokens = sum(len(sample.ids) for sample in samples)
    return min(most, max(1, PASSES * tokens // STEP_TOKENS) if tokens > STEP_TOKENS else PASSES)
