"""Checkpoints by their names on the Hub, with stand-ins for it: no test reaches for the network."""

import copy
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from aimv2_checkpoints import tiny_original, write
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

import nopad
from nopad.checkpoints.files import open_checkpoint
from nopad.cli import main
from nopad.families.aimv2 import AIMv2Packing


def same_weights(encoder, original):
    return torch.equal(encoder.layers[0].mlp.down.weight, original.encoder.layers[0].ffn.down_proj.weight)


def write_tiny(folder):
    original = tiny_original()
    return original, write(folder, original.state_dict(), original.config.to_dict())


def nobody(request):
    raise ConnectionError("Name or service not known")


@pytest.fixture
def online(monkeypatch):
    """Takes a function that answers what huggingface_hub asks the Hub, or raises; gives what it was asked."""

    def answered_by(answer):
        requested = []
        session = SimpleNamespace(head=lambda url, timeout: answer(requested.append((url, timeout))))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("nopad.checkpoints.hub.get_session", lambda: session)
        return requested

    return answered_by


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (GatedRepoError, "someone/aimv2", "gated on the Hub.* at https://.*/someone/aimv2 and log in with .*HF_TOKEN$"),
        (GatedRepoError, "facebook/dinov3-vitb16-pretrain-lvd1689m", r"gated.* 'untrained:facebook/dinov3-vitb16"),
        (RepositoryNotFoundError, "facebook/dinov2-bsae", "no model of that name.*; did you mean .*dinov2-base"),
        (RepositoryNotFoundError, "someone/aimv2", "or it is private.*hf auth login.*nopad models"),
        (RevisionNotFoundError, "someone/aimv2", "revision: the Hub has no branch, tag or commit 'v9' of it"),
        (HfHubHTTPError, "someone/aimv2", "specific connection error .*: 500 from the Hub$"),
    ],
)
def test_each_refusal_of_the_hub_is_one_line_of_its_own(monkeypatch, capsys, online, kind, name, message):
    """huggingface_hub's errors reach transformers, which makes other ones of them, of several lines."""

    def refused(*arguments, **options):
        raise kind("500 from\nthe Hub", response=SimpleNamespace(headers={}, request=None))

    online(lambda request: None)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refused)
    assert main(["align", name, "--revision", "v9"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nopad align:")]
    assert re.match(f"nopad align: checkpoint '{name}': .*{message}", line)


def test_hub_names_are_found_by_revision(tmp_path, monkeypatch):
    """A stand-in for the Hub: the resolver is asked for the right files of the right repository and revision."""
    original, folder = write_tiny(tmp_path)
    requested = []

    def hub(name, filename, revision=None, **kwargs):
        requested.append((name, filename, revision))
        return str(folder / filename) if (folder / filename).exists() else None

    monkeypatch.setattr("nopad.checkpoints.hub.cached_file", hub)
    assert same_weights(nopad.load("someone/aimv2", revision="abc"), original)
    assert {(name, revision) for name, _, revision in requested} == {("someone/aimv2", "abc")}
    assert {filename for _, filename, _ in requested} >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


@pytest.mark.parametrize("load", [nopad.load, nopad.processor])
def test_a_token_is_sent_to_the_hub_with_every_file(tmp_path, monkeypatch, load):
    _, folder = write_tiny(tmp_path)
    tokens = []

    def hub(name, filename, token=None, **kwargs):
        tokens.append(token)
        return str(folder / filename) if (folder / filename).exists() else None

    monkeypatch.setattr("nopad.checkpoints.hub.cached_file", hub)
    load("someone/aimv2", token="hf_secret")
    assert {*tokens} == {"hf_secret"}


def test_without_the_hub_its_cache_is_read(tmp_path, monkeypatch, caplog, online):
    original, folder = write_tiny(tmp_path / "in")
    repository = tmp_path / "cache" / "models--someone--aimv2"  # as huggingface_hub keeps what it has fetched
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    requested = online(nobody)
    assert same_weights(nopad.load("someone/aimv2"), original)
    assert len(requested) == 1  # and no file after that
    (message,) = caplog.messages
    assert "looking for someone/aimv2 in the Hub's cache alone" in message
    assert "which cannot be reached: Name or service not known" in message
    with pytest.raises(OSError, match=r"no weights of that name in the Hub's cache, .* cannot be reached: Name or"):
        nopad.load("someone/else")


@pytest.mark.parametrize(("answer", "local"), [(lambda request: None, None), (nobody, True)])
def test_files_are_requested_where_the_hub_answers(monkeypatch, caplog, online, answer, local):
    options, seen = {} if local is None else {"local_files_only": local}, []
    monkeypatch.setattr("nopad.checkpoints.hub.cached_file", lambda *names, **hub: seen.append(hub))
    requested = online(answer)
    with pytest.raises(OSError, match="no weights of that name"):
        nopad.AIMv2Packing.from_pretrained("someone/aimv2", **options)
    assert {hub.get("local_files_only") for hub in seen} == {local}
    assert len(requested) == (local is None)
    assert not caplog.messages


def test_a_token_opens_the_checkpoint_again_and_is_neither_printed_nor_pickled(tmp_path, monkeypatch):
    _, folder = write_tiny(tmp_path)
    tokens = set()

    def hub(name, filename, token=None, **kwargs):
        tokens.add(token)
        return str(folder / filename) if (folder / filename).exists() else None

    monkeypatch.setattr("nopad.checkpoints.hub.cached_file", hub)
    encoder = AIMv2Packing.from_pretrained("someone/gated", token="hf_secret")
    open_checkpoint("someone/gated", **encoder.opened_with)
    open_checkpoint("someone/gated", **copy.deepcopy(encoder).opened_with)
    assert tokens == {"hf_secret"}
    assert "hf_secret" not in repr(encoder.opened_with)
    pickled = pickle.dumps(encoder)
    assert b"hf_secret" not in pickled
    assert pickle.loads(pickled).opened_with["token"] is None
