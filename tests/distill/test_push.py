"""otdd push: what is sent, where to, and one clear line where it cannot be."""

import pytest
from distill.finished_run import written_set

from otdd import cli
from otdd.distill.config import ConfigError
from otdd.distill.export import export
from otdd.distill.push import push
from otdd.distill.store import StoreError


class Hub:
    """Remembers what it is asked, or refuses."""

    def __init__(self, error=None):
        self.error, self.repository, self.sent = error, None, None

    def create_repo(self, repo_id, **options):
        self.repository = (repo_id, options)

    def upload_folder(self, **options):
        if self.error is not None:
            raise self.error
        self.sent = options
        return "https://hub/commit/1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("push")
    written_set(root / "run", ["a", "b"])
    export(root / "run", "hf", root / "hf")
    (root / "hf/notes.txt").write_text("mine alone")
    (root / "hf/.env").write_text("secret")
    return root / "hf"


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def test_everything_that_was_exported_is_sent_and_nothing_else(folder):
    hub = Hub()
    sent = push(folder, "me/set", private=True, api=hub)
    assert hub.repository == (
        "me/set",
        {"repo_type": "dataset", "private": True, "exist_ok": True},
    )
    assert hub.sent["folder_path"] == str(folder)
    assert (hub.sent["repo_id"], hub.sent["repo_type"]) == ("me/set", "dataset")
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(hub.sent["allow_patterns"]) == there - {"notes.txt", ".env"}
    assert sent.url == "https://hub/commit/1"


def test_the_hub_library_picks_these_files(folder):
    filter_repo_objects = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
    sent = push(folder, "me/set", dry_run=True).files
    there = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    picked = filter_repo_objects(there, allow_patterns=list(sent))
    assert sorted(picked) == sorted(sent)


def test_dry_run_prints_and_asks_nobody(folder, capsys):
    hub = Hub(AssertionError("asked"))
    sent = push(folder, "me/set", dry_run=True, api=hub)
    assert (sent.url, hub.repository) == (None, None)
    code, out, _ = call(capsys, "push", folder, "me/set", "--dry-run")
    assert code == 0
    assert f"{(folder / 'README.md').stat().st_size:>12,}  README.md\n" in out
    assert "would send 10 files, 13 KiB, to the data set me/set" in out
    assert "notes.txt" not in out
    assert "licence  unknown; name one in the head of its README.md (license: ...)\n" in out


def test_the_licence_is_that_of_the_card(folder, tmp_path):
    made = tmp_path / "hf"
    export(folder.parent / "run", "hf", made, license="cc-by-4.0")
    assert push(made, "me/set", dry_run=True).license == "cc-by-4.0"
    card = made / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace("license: cc-by-4.0", "license: mit", 1), encoding="utf-8")
    assert push(made, "me/set", dry_run=True).license == "mit"
    card.write_text("no head", encoding="utf-8")
    assert push(made, "me/set", dry_run=True).license == "unknown"
    card.write_text("---\n{\n---\ntext", encoding="utf-8")
    with pytest.raises(StoreError, match=r"README\.md: its head is no YAML"):
        push(made, "me/set", api=Hub())


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a/../b", "-a/b", "a/b.git", "a/b-", "é/b", "a b", "x" * 97]
)
def test_names_that_the_hub_does_not_accept(folder, name):
    with pytest.raises(ConfigError, match=r"repo_id: .* is not accepted; expected OWNER/NAME"):
        push(folder, name, api=Hub())


def test_a_refusal_is_one_line_and_a_mistake_of_ours_is_not_hidden(folder):
    hub = Hub(ConnectionError("no route\nto host"))
    with pytest.raises(ConfigError, match=r"^cannot push to me/set: no route to host$"):
        push(folder, "me/set", api=hub)
    with pytest.raises(ZeroDivisionError):
        push(folder, "me/set", api=Hub(ZeroDivisionError()))


def test_without_token_or_network(folder, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = call(capsys, "push", folder, "me/set")
    assert (code, err.count("\n")) == (2, 1)
    assert "HF_HUB_OFFLINE is set" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    code, _, err = call(capsys, "push", folder, "me/set")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot push without a token" in err


def test_folders_that_cannot_be_pushed(folder, tmp_path):
    with pytest.raises(StoreError, match=r"is no Hugging Face data set; `otdd export .* --to hf"):
        push(folder.parent / "run", "me/set", api=Hub())
    with pytest.raises(StoreError, match="no such folder"):
        push(tmp_path / "none", "me/set", api=Hub())
    export(folder.parent / "run", "hf", tmp_path / "hf")
    (tmp_path / "hf/images/00001/00000.png").unlink()
    with pytest.raises(StoreError, match=r"is not complete: images/00001/00000\.png missing"):
        push(tmp_path / "hf", "me/set", api=Hub())
