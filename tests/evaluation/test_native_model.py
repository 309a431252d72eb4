"""Model files answer as PyTorch does, one text after another; and whatever holds a model is loaded as what it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.evaluation.decoding import generate_naive
from kabrn_dist.evaluation.load import load_evaluated_model
from kabrn_dist.evaluation.native_model import NativeEvaluatedModel
from kabrn_dist.evaluation.requests import ContinuationRequest, GenerateRequest, TextRequest
from kabrn_dist.evaluation.torch_model import TorchModel
from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.generate import GenerativeModel
from kabrn_dist.runtime.model_file import write_model_file
from kabrn_dist.utils.errors import UserError
from tests.support.models import MODEL_KINDS, make_model, make_model_config
from tests.support.runs import ROOT, make_shards, run_training, write_small_config

BYTES = Tokenizer.of_bytes()
SHOTS = "Q: what?\nA: that.\n\n"
GENERATE = [
    GenerateRequest(SHOTS + "Q: 1", 9, seed=5, num_samples=3, temperature=1.0, top_p=0.8),
    GenerateRequest(SHOTS + "Q: é", 9, num_samples=2),
    GenerateRequest(SHOTS + "Q: longer", 9, ("e", "o", "a", "i", "t"), temperature=0.7),
]
SCORE = [ContinuationRequest(context, text) for context in ("Is it? ", "", SHOTS) for text in ("yes", " no é")]
TEXTS = [TextRequest(text) for text in ("", "a", SHOTS * 3)]


@pytest.fixture(params=["rational", "hybrid", "plain"], scope="module")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GenerativeModel, Path]:
    config = make_model_config(*MODEL_KINDS[request.param])
    model, path = make_model(config), tmp_path_factory.mktemp("native") / "small.mkb"
    write_model_file(model, config, BYTES, 3, path, embedding_dtype="fp32")
    return model, path


def test_a_model_file_generates_what_pytorch_generates(written: tuple[GenerativeModel, Path]) -> None:
    with NativeEvaluatedModel(written[1]) as native:
        found = dict(native.generate(GENERATE))
        assert list(native.generate([])) == [] and native.name == "small" and len(native.fingerprint) == 64
    model = TorchModel(written[0], BYTES, "small", "none", in_order=True)
    assert found == dict(model.generate(GENERATE))
    assert found[0] == generate_naive(written[0], BYTES, GENERATE[0])


def test_a_model_file_scores_as_pytorch_does(written: tuple[GenerativeModel, Path]) -> None:
    model = TorchModel(written[0], BYTES, "small", "none", in_order=True)
    with NativeEvaluatedModel(written[1]) as native:
        continuations, texts = dict(native.score_continuations(SCORE)), dict(native.score_texts(TEXTS))
    for number, score in model.score_continuations(SCORE):
        assert continuations[number].logprob == pytest.approx(score.logprob, abs=1e-4)
        assert continuations[number][1:] == score[1:]
    for number, losses in model.score_texts(TEXTS):
        np.testing.assert_allclose(texts[number].nats, losses.nats, atol=1e-4)
        assert texts[number].num_bytes.tolist() == losses.num_bytes.tolist()


def test_a_model_file_is_evaluated_without_torch(written: tuple[GenerativeModel, Path]) -> None:
    code = (
        "import sys\nfrom kabrn_dist.evaluation.load import load_evaluated_model\n"
        "from kabrn_dist.evaluation.requests import GenerateRequest\n"
        f"model = load_evaluated_model({str(written[1])!r})\n"
        "print(len(list(model.generate([GenerateRequest('x', 3)]))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "False"], done.stderr


def test_what_is_no_model_is_refused(written: tuple[GenerativeModel, Path], tmp_path: Path) -> None:
    for path, options, words in (
        (tmp_path / "none", {}, "no such folder"),
        (tmp_path, {}, "no such file; name the folder of a run"),
        (tmp_path / "none.mkb", {}, "none.mkb"),
        (written[1], {"device": "cuda"}, "device cuda has no meaning"),
        (written[1], {"step": 3}, "step 3 has no meaning"),
        (tmp_path, {"device": "abacus"}, "device 'abacus': cannot be used here"),
    ):
        with pytest.raises(UserError, match=words):
            load_evaluated_model(path, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_its_export_and_its_steps_are_loaded_and_told_apart(tmp_path: Path) -> None:
    changes = {"training__steps": 2, "checkpoint__save_interval": 1, "checkpoint__keep_last": 5}
    config = write_small_config(tmp_path / "run.yaml", make_shards(tmp_path), tmp_path / "run", **changes)
    done = run_training(1, "--config", str(config))
    assert done.exit_code == 0, done.output
    write_export(plan_export(tmp_path / "run"), tmp_path / "export")
    models = [
        load_evaluated_model(tmp_path / "run"),
        load_evaluated_model(tmp_path / "run", batch_size=1),
        load_evaluated_model(tmp_path / "run", step=1),
        load_evaluated_model(tmp_path / "export"),
    ]
    assert [model.name for model in models] == ["run at step 2", "run at step 2", "run at step 1", "export"]
    prints = [model.fingerprint for model in models]
    assert prints[0] == prints[1] and len(set(prints)) == 3 and all(len(each) == 64 for each in prints)
    scores = [dict(model.score_texts([TextRequest("def f(x):")]))[0].nats.sum() for model in models]
    assert scores[0] == pytest.approx(scores[3], abs=1e-5) and abs(scores[0] - scores[2]) > 1e-4
    with pytest.raises(UserError, match="an export, which has no checkpoint of step 1"):
        load_evaluated_model(tmp_path / "export", step=1)
