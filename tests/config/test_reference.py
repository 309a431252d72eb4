"""The reference of configuration keys: complete, with types and limits, and docs/configuration.md holds it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kabrn_dist.config.reference import describe_config
from kabrn_dist.utils.errors import UserError
from tests.support.runs import ROOT


def test_the_page_of_the_documentation_is_the_reference() -> None:
    command = [sys.executable, "-m", "kabrn_dist.config.reference"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page, (
        "write it again: python -m kabrn_dist.config.reference > docs/configuration.md"
    )


def test_a_section_has_its_keys_and_those_of_its_sections() -> None:
    text = describe_config("model")
    assert "## model\n" in text and "## model.router" in text and "## training" not in text
    assert "`model.experts.top_k` (whole number, at least 1; required)" in text.replace("**", "")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("training.precision", "(fp32 | bf16 | fp16 | auto; default `fp32`): Data type"),
        ("optimizer.betas", "([number, number]; default `[0.9, 0.95]`): AdamW"),
        ("model.retention.key_dim", "(whole number, at least 2, a multiple of 2; required): Dimension"),
        ("parallel.experts_per_rank", "(list of whole numbers | auto | null; default `null`): Experts"),
        ("guard.stop_exit_code", "(whole number, at least 0, at most 125; default `0`): Exit code"),
        ("data.cache_dir", "(path; default `data/cache`): Folder"),
        ("data.weights", "(mapping of names to numbers; default `{}`): Sampling"),
        ("data.extra_sets.path", "(text; required): Folder"),
        ("optimizer.second_stage.start_fraction", "(number, above 0, below 1; default `0.5`): Fraction"),
        ("run.max_minutes", "(number | null, above 0; default `null`): Time limit"),
    ],
)
def test_a_key_has_type_limits_default_and_description(key: str, said: str) -> None:
    text = describe_config(key)
    assert text.startswith(f"- **`{key}`** {said}") and "\n" not in text


def test_another_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'training.step' is no section or key .*; did you mean training.steps\?"):
        describe_config("training.step")
    with pytest.raises(UserError, match=r"did you mean model.experts.top_k\?"):
        describe_config("topk")
    with pytest.raises(UserError, match=r"sections: run, data, .*guard"):
        describe_config("zzzz")


def test_the_configuration_imports_no_torch() -> None:
    code = "import sys, kabrn_dist.config.reference, kabrn_dist.config.file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
