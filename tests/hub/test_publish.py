"""Uploads of exports: what is checked, what is sent, and what the server has in the end, byte for byte."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kabrn_dist.cli.main import main
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.hub.import_run import write_start
from kabrn_dist.hub.publish import plan_publication
from kabrn_dist.inference.export import plan_export, write_export
from kabrn_dist.inference.load import load_export
from kabrn_dist.utils.errors import UserError
from tests.support.hub_server import HubServer, serve_hub
from tests.support.models import make_model, make_model_config

TOKEN = "hf_secret0123456789"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish") / "run"
    config = make_model_config(f"run.folder={folder}")
    write_start(config, make_model(config), Tokenizer.of_bytes())
    return folder


@pytest.fixture
def export(run: Path, tmp_path: Path) -> Path:
    """An export in two files."""
    plan = plan_export(run, file_bytes=100_000)
    assert len(plan.files) > 1
    write_export(plan, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve_hub(TOKEN) as hub:
        yield hub


def publish(hub: HubServer, export: Path, *options: str, repository: str = "ada/tiny") -> int:
    return main(["publish", str(export), repository, "--endpoint", hub.url, *options])


def test_every_byte_arrives_in_one_commit(
    hub: HubServer, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(hub, export, "--license", "mit", "--private") == 0
    out, err = capsys.readouterr()
    assert f"published {hub.url}/ada/tiny/commit/" in out and TOKEN not in out + err
    files = hub.branches["ada/tiny@main"]
    assert hub.repositories == {"ada/tiny": True} and sum("/commit/" in request for request in hub.requests) == 1
    assert files.keys() == {path.name for path in export.iterdir()}
    readme = (export / "README.md").read_bytes()
    assert files.pop("README.md") == b"---\nlicense: mit\n---\n" + readme
    assert all((export / name).read_bytes() == content for name, content in files.items())
    # What was uploaded works where it is downloaded to.
    (tmp_path / "copy").mkdir()
    for name, content in files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    assert load_export(tmp_path / "copy")[1].kind == "bytes"


def test_another_branch_and_a_repository_that_exists(hub: HubServer, export: Path) -> None:
    assert publish(hub, export, "--license", "mit") == 0
    sent = len(hub.requests)
    assert publish(hub, export, "--license", "mit", "--revision", "step-12") == 0
    assert hub.branches["ada/tiny@step-12"] == hub.branches["ada/tiny@main"]
    # The weights are there already, and are not sent again.
    assert not any(request.startswith("PUT") for request in hub.requests[sent:])


def test_an_export_for_transformers_is_published_too(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "hf"), "--format", "hf", "--license", "apache-2.0"]) == 0
    found = plan_publication(tmp_path / "hf")
    assert found.files.keys() == {path.name for path in (tmp_path / "hf").iterdir()}
    assert found.card["license"] == "apache-2.0" and "modeling_mixkabrn.py" in found.files


def test_a_dry_run_sends_nothing(hub: HubServer, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = export / "README.md"
    readme.write_text(f"---\nlicense: cc-by-4.0\nlanguage: [en, de]\n---\n{readme.read_text()}")
    assert publish(hub, export, "--dry-run") == 0
    out = capsys.readouterr().out
    for path in export.iterdir():
        assert f"{path.stat().st_size:,}  {path.name}" in out
    assert "card: license cc-by-4.0" in out and "card: language en, de" in out
    assert "nothing was sent (--dry-run); would go to ada/tiny, branch main" in out
    assert hub.requests == []


def refuse(capsys: pytest.CaptureFixture[str], code: int) -> str:
    # The library draws bars of progress, each over the one before.
    err = capsys.readouterr().err
    *bars, message = err.rstrip("\n").split("\n")
    assert code == 2 and TOKEN not in err and not any("Traceback" in line for line in bars)
    assert message.startswith("error: ")
    return message


def test_the_servers_refusals_are_one_line(
    hub: HubServer, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mit = ("--license", "mit")
    assert "may not write there" in refuse(capsys, publish(hub, export, *mit, repository="bob/tiny"))
    assert "no name of a repository" in refuse(capsys, publish(hub, export, *mit, repository="tiny"))
    hub.spoil = True
    assert "the upload failed (the content has another sha256)" in refuse(capsys, publish(hub, export, *mit))
    assert hub.branches["ada/tiny@main"] == {}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "status 401" in refuse(capsys, publish(hub, export, *mit))
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the upload; set HF_TOKEN" in refuse(capsys, publish(hub, export, *mit))


def test_a_network_that_is_down_is_one_line(hub: HubServer, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code = main(["publish", str(export), "ada/tiny", "--license", "mit", "--endpoint", address])
    assert f"{address}/ada/tiny: cannot be reached (" in refuse(capsys, code)


def test_what_is_no_whole_export_is_refused_before_anything_is_sent(export: Path, run: Path, tmp_path: Path) -> None:
    def problem(folder: Path, license_id: str | None = "mit") -> str:
        with pytest.raises(UserError) as caught:
            plan_publication(folder, license_id)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "names no license" in problem(export, None)
    assert f"is a run, with its optimizer's state; publish an export of it: mixkabrn export {run} OUT" in problem(run)
    assert "no such folder" in problem(tmp_path / "absent")
    weights = sorted(export.glob("model-*.safetensors"))[-1]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{weights}: damaged or edited" in problem(export)
    weights.unlink()
    assert f"{weights}: cannot be read" in problem(export)
    weights.write_bytes(content)
    (export / "notes.env").write_text("TOKEN=1")
    assert "notes.env: is no file of an export and may be private" in problem(export)
    (export / "notes.env").unlink()
    readme = export / "README.md"
    readme.write_text("---\nlicense: mit\n---\n")
    assert "names the license mit, not apache-2.0" in problem(export, "apache-2.0")
    readme.write_text("---\n- mit\n---\n")
    assert "is no mapping" in problem(export)
    (export / "config.yaml").unlink()
    assert "neither config.yaml nor config.json" in problem(export)
