"""A model's short name, and its path or id, in every command that takes a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peerllm.cli.figures.plan import is_scenario
from tests.cli.test_commands import Run, Served, device, peerllm

__all__ = ["device", "peerllm"]  # fixtures


@pytest.fixture
def named(device: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of a local directory serves as `home`; its path. The commands are typed beside a folder `home` too."""
    household, path = device.household, str(tmp_path / "model")
    household.deployments[0].update(name="home", model=path)
    household.served = [replace(household.model, name="home", model=path)]
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return path


def test_run_as_passes_on_the_name_and_prints_the_one_it_got(peerllm: Run, device: Served) -> None:
    device.household.deployments[0]["name"] = "home"
    code, out, _ = peerllm("run", "org/other", "--as", "home")
    assert (code, device.household.runs[0].name) == (0, "home")
    assert out.startswith("home: serving") and out.splitlines()[-1].startswith("home serves at http://")
    assert "\ncontext: 1,024 tokens, prompt and answer together; 4 at once\n" in out
    device.household.deployments[0]["coordinator"] = "mini-pc"
    assert not peerllm("run", "org/home")[1].startswith("home: serving"), "that is another device's"
    assert device.household.runs[1].name == ""


@pytest.mark.parametrize("typed", ["home", "model", "path"])
def test_name_directory_and_path_mean_the_same_model(peerllm: Run, device: Served, named: str, typed: str) -> None:
    meant = named if typed == "path" else typed
    sent = "home" if typed == "home" else named
    household = device.household
    assert peerllm("chat", "--model", meant, "hi") == (0, household.reply + "\n", "")
    assert peerllm("run", meant)[0] == 0
    peerllm("stop", meant)
    assert (household.runs[0].model, household.calls[-1]) == (sent, ("stop", sent))
    peerllm("trace", meant, "--seconds", "0.01", "--out", str(device.data / "trace.json"))
    assert ("record", "home") in household.calls


def test_a_gguf_file_is_sent_as_an_absolute_path_and_no_other_file_is(
    peerllm: Run, device: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real.gguf").write_bytes(b"GGUF")
    (tmp_path / "link.GGUF").symlink_to("real.gguf")
    (tmp_path / "notes").write_text("no model")
    for typed in ("link.GGUF", "~/link.GGUF", str(tmp_path / "link.GGUF"), "notes", "owner/x:Q4_K_M", "gone.gguf"):
        assert peerllm("run", typed)[0] == 0
    file = str(tmp_path / "link.GGUF")
    sent = [run.model for run in device.household.runs]
    assert sent == [file, file, file, "notes", "owner/x:Q4_K_M", "gone.gguf"]
    assert not is_scenario("link.GGUF") and is_scenario("notes")


def test_another_devices_model_is_named_with_its_device(peerllm: Run, device: Served, named: str) -> None:
    device.household.deployments[0]["coordinator"] = "mini-pc"
    for typed in ("home", "model"):
        code, _, err = peerllm("bench", "--model", typed)
        assert (code, err) == (1, f"peerllm: {typed} was started on mini-pc; ask there\n")
    assert "no model is served from this device" in peerllm("bench")[2]
