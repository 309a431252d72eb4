"""Parts of learning in a chat: conversations as tokens, rows, bounds, adapters as files and their history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kabrn_dist.adapters.adapter import AdapterInfo, AdapterMethod
from kabrn_dist.adapters.folder import ADAPTER_NAME, read_adapter, write_adapter
from kabrn_dist.data.default_template import DEFAULT_TEMPLATE
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.inference.adapters import hash_model_codes, set_adapters
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.online_learning.chat import Conversation, Sampling
from kabrn_dist.online_learning.chat_writer import ChatWriter
from kabrn_dist.online_learning.course import LearningLimits
from kabrn_dist.online_learning.history import KEPT_VERSIONS, AdapterHistory
from kabrn_dist.online_learning.learner import Learner
from kabrn_dist.online_learning.rows import choose_row_tokens, largest_loss, make_row, mean_loss, measure_token_bytes
from kabrn_dist.online_learning.samples import Sample, SampleReader
from kabrn_dist.online_learning.trainable import TrainableAdapter
from kabrn_dist.utils.errors import UserError
from tests.support.models import make_model, make_model_config

SAID = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hé <|im_end|>"},
    {"role": "assistant", "content": "Hello!"},
]


@pytest.fixture
def model() -> GenerativeModel:
    return make_model(make_model_config("model.layers=RA", "model.short_conv_size=4"))


def make_info(model: GenerativeModel, method: AdapterMethod = "lora") -> AdapterInfo:
    return AdapterInfo("mine", method, 4, 8.0, ("mixer", "shared", "routed", "head"), hash_model_codes(model))


def make_samples(count: int, length: int = 12) -> list[Sample]:
    random = np.random.default_rng(0)
    return [Sample(random.integers(0, 256, length).tolist(), [False, *[True] * (length - 1)]) for _ in range(count)]


@pytest.mark.parametrize("template", ["", DEFAULT_TEMPLATE])
def test_what_the_assistant_says_and_its_end_are_learned(template: str) -> None:
    tokenizer = Tokenizer(Tokenizer.of_bytes().content, chat_template=template)
    writer = ChatWriter(tokenizer)
    tokens = writer.write(SAID)
    learned = tokenizer.decode([id for id, each in zip(*tokens, strict=True) if each])
    text = tokenizer.decode(tokens.ids[1:])
    if template:
        assert learned == "Hello!<|im_end|>" and writer.stops == ("<|im_end|>",) and not writer.trim
        assert text.endswith("<|im_start|>assistant\nHello!<|im_end|>\n")
    else:
        assert learned == " Hello!\nUser:" and text == "Be kind.\n\nUser: Hé <|im_end|>\nAssistant: Hello!\nUser:"
    # A longer conversation begins with the tokens of a shorter one, and the question is that which is asked.
    more = writer.write([*SAID, {"role": "user", "content": "More"}], ask=True)
    assert more.ids[: len(tokens.ids)] == tokens.ids
    asked = writer.write(SAID[:2], ask=True)
    assert tokens.ids[: len(asked.ids)] == asked.ids and not any(asked.learned)
    assert writer.ends(tokenizer.document_token) and not writer.ends(65)


def test_only_the_last_answer_of_a_corrected_conversation_is_learned() -> None:
    tokenizer = Tokenizer.of_bytes()
    said = [*SAID, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Yes."}]
    reader = SampleReader(tokenizer, ChatWriter(tokenizer), 20, 1000)
    sample = reader.conversation(said)
    assert tokenizer.decode([id for id, each in zip(*sample, strict=True) if each]) == " Yes.\nUser:"
    # Too long: the first turns are left out, and the text of the system stays.
    short = SampleReader(tokenizer, ChatWriter(tokenizer), 20, 50).conversation(said)
    assert tokenizer.decode(short.ids[1:]) == "Be kind.\n\nUser: And?\nAssistant: Yes.\nUser:"
    with pytest.raises(UserError, match="have more than 10 tokens"):
        SampleReader(tokenizer, ChatWriter(tokenizer), 20, 10).conversation(said)


def test_notes_are_divided_without_losing_a_token(tmp_path: Path) -> None:
    text = "The heron stands in the pond. " * 9
    (tmp_path / "n.txt").write_text(text)
    tokenizer = Tokenizer.of_bytes()
    notes = SampleReader(tokenizer, ChatWriter(tokenizer), 32, 100).read(tmp_path / "n.txt")
    assert all(len(sample.ids) <= 32 for sample in notes.samples)
    learned = [id for sample in notes.samples for id, each in zip(*sample, strict=True) if each]
    assert tokenizer.decode(learned) == text + "<|document|>"


def test_samples_in_one_row_have_the_losses_that_they_have_alone(model: GenerativeModel) -> None:
    samples = make_samples(3) + make_samples(1, 7)
    together = float(model(make_row(samples)).language.detach())
    alone = sum(float(model(make_row([sample])).language.detach()) for sample in samples)
    assert together == pytest.approx(alone, rel=1e-4)
    targets = sum(sample.targets for sample in samples)
    for row_tokens in (8, 30, 1000):
        assert mean_loss(model, samples, row_tokens) == pytest.approx(together / targets, rel=1e-4)
    assert mean_loss(model, samples[:1], 99) <= largest_loss(model, samples[0])


@pytest.mark.parametrize("method", ["lora", "state"])
def test_what_is_saved_is_what_was_trained(method: AdapterMethod, model: GenerativeModel, tmp_path: Path) -> None:
    other = make_model(model_config := make_model_config("model.layers=RA", "model.short_conv_size=4"))
    assert model_config.model == model.config
    adapter = TrainableAdapter(model, make_info(model, method))
    untrained = mean_loss(other, make_samples(4), 100)
    assert mean_loss(model, make_samples(4), 100) == pytest.approx(untrained, abs=1e-6)
    learner = Learner(model, adapter, LearningLimits(100, 6, 10**9))
    result = learner.learn(make_samples(4))
    assert 0 < result.steps <= 6 and result.after < result.before and not result.held_out
    assert result.after == pytest.approx(mean_loss(model, make_samples(4), 100), abs=1e-6)
    write_adapter(adapter.adapter(result.steps), tmp_path / "a")
    saved = read_adapter(tmp_path / "a")
    assert saved.info.steps == result.steps
    set_adapters(other, [(saved, 1.0)])
    assert mean_loss(other, make_samples(4), 100) == pytest.approx(result.after, abs=1e-4)
    # Another session continues from it.
    third = make_model(model_config)
    TrainableAdapter(third, saved.info).load(saved)
    assert mean_loss(third, make_samples(4), 100) == pytest.approx(result.after, abs=1e-4)
    adapter.restore(None)
    assert mean_loss(model, make_samples(4), 100) == pytest.approx(untrained, abs=1e-6)


def test_learning_ends_with_its_steps_and_its_time(model: GenerativeModel) -> None:
    adapter = TrainableAdapter(model, make_info(model))
    shares: list[float] = []
    Learner(model, adapter, LearningLimits(1e9, 3, 10**9)).learn(make_samples(4), lambda p: shares.append(p.share))
    assert shares == sorted(shares) and len(shares) == 3 and shares[-1] == 1
    shares.clear()
    Learner(model, adapter, LearningLimits(1e-9, 100, 10**9)).learn(make_samples(4), lambda p: shares.append(p.share))
    assert len(shares) <= 1
    held = Learner(model, adapter, LearningLimits(1e9, 2, 10**9)).learn(make_samples(40))
    assert held.held_out


def test_memory_bounds_the_rows(model: GenerativeModel) -> None:
    TrainableAdapter(model, make_info(model))
    each = measure_token_bytes(model)
    assert each > 1000
    assert choose_row_tokens(each, int(100 * each) + 1) == 100
    with pytest.raises(UserError, match="--memory"):
        choose_row_tokens(each, int(10 * each))
    learner = Learner(model, TrainableAdapter.__new__(TrainableAdapter), LearningLimits(1, 1, int(80 * each)))
    assert learner.row_tokens * measure_token_bytes(model) <= 80 * each * 1.01


def test_an_interruption_keeps_the_best_so_far(model: GenerativeModel) -> None:
    adapter = TrainableAdapter(model, make_info(model))

    def interrupt(progress: object) -> None:
        taken.append(progress)
        if len(taken) == 5:
            raise KeyboardInterrupt

    taken: list[object] = []
    result = Learner(model, adapter, LearningLimits(1e9, 1000, 10**9)).learn(make_samples(4), interrupt)
    assert result.interrupted and result.after < result.before
    assert result.after == pytest.approx(mean_loss(model, make_samples(4), 100), abs=1e-6)


def test_versions_come_back_to_the_last_bit(model: GenerativeModel, tmp_path: Path) -> None:
    history = AdapterHistory(tmp_path / "mine")
    adapter = TrainableAdapter(model, make_info(model))
    assert history.read() is None
    contents = []
    for number in range(KEPT_VERSIONS + 3):
        with torch.no_grad():
            adapter.parameters[1].add_(number)
        history.save(adapter.adapter(1))
        contents.append((tmp_path / "mine" / ADAPTER_NAME).read_bytes())
    for number in reversed(range(2, KEPT_VERSIONS + 2)):
        found = history.undo()
        assert found is not None and (tmp_path / "mine" / ADAPTER_NAME).read_bytes() == contents[number]
    with pytest.raises(UserError, match="nothing was learned"):
        history.undo()
    first = AdapterHistory(tmp_path / "first")
    first.save(adapter.adapter())
    assert first.undo() is None and not (tmp_path / "first").exists()


def test_a_turn_reads_its_new_tokens_and_says_what_reading_all_again_says(model: GenerativeModel) -> None:
    tokenizer = Tokenizer.of_bytes()
    writer, sampling = ChatWriter(tokenizer), Sampling(0.0, 0, 12)
    kept, fresh = (Conversation(model, tokenizer, writer, sampling, "Be kind.") for _ in range(2))
    read: list[int] = []
    decode = model.decode

    def count(tokens: torch.Tensor, *rest: object) -> object:
        read.append(tokens.shape[1])
        return decode(tokens, *rest)  # type: ignore[arg-type]

    model.decode = count  # type: ignore[method-assign, assignment]
    for text in ("Hello", "And then?", "Why?"):
        for conversation in (kept, fresh):
            conversation.say(text)
        fresh.forget_states()
        read.clear()
        answers = ["".join(kept.answer())]
        # Bytes that are no text are kept as U+FFFD, so the answer is read again; what was read before it is not.
        assert text == "Hello" or max(read) < len(writer.write(kept.messages[:-1], ask=True).ids) - 20
        answers.append("".join(fresh.answer()))
        assert answers[0] == answers[1] == kept.messages[-1]["content"]
    kept.take_answer_back()
    assert "".join(kept.answer()) == answers[0]
    kept.reset()
    assert kept.messages == [{"role": "system", "content": "Be kind."}]
