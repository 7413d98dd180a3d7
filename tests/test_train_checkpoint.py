"""Checkpoints and run folders: whole or not at all, and refused with a reason."""

import pytest
import torch

from pycnf.data import InputError
from pycnf.train import checkpoint
from pycnf.train.files import write_atomically
from pycnf.train.folder import RunFolder, check, create
from pycnf.train.metrics import MetricsFile, read


def test_a_checkpoint_comes_back(tmp_path):
    content = {
        **dict.fromkeys(checkpoint.PARTS),
        "step": 3,
        "flow": {"weight": torch.arange(4.0)},
        "training": {"sums": [0.1, 2]},
    }
    checkpoint.save(tmp_path / "last.pt", content)
    back = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(back["flow"]["weight"], content["flow"]["weight"])
    assert (back["step"], back["training"]) == (3, {"sums": [0.1, 2]})


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION + 1}, path)
    with pytest.raises(InputError, match=r"checkpoint version 2 and this pycnf reads version 1"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save({"weights": torch.zeros(3)}, path),
    ],
    ids=["cut", "empty", "text", "tensor", "other"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, spoil):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 0})
    spoil(path)
    with pytest.raises(InputError, match=r"last\.pt is (damaged, or is )?no checkpoint of pycnf"):
        checkpoint.load(path)


def test_a_checkpoint_without_its_parts_is_damaged(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"step": 0, "config": {}, "data": {}})
    with pytest.raises(InputError, match="it has no preprocess, baseline, flow"):
        checkpoint.load(tmp_path / "last.pt")


class Payload:
    """Stands for code that a malicious checkpoint would run."""

    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


def test_loading_a_checkpoint_runs_no_code(tmp_path, capsys):
    torch.save({"format": checkpoint.FORMAT, "payload": Payload()}, tmp_path / "last.pt")
    with pytest.raises(InputError):
        checkpoint.load(tmp_path / "last.pt")
    assert "ran code" not in capsys.readouterr().out


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"There is no checkpoint .*nowhere.last\.pt; give the folder of a run"
    ):
        checkpoint.load(RunFolder(tmp_path / "nowhere").last)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_takes_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(create(None, "moons").path) for _ in range(3)] == [
        f"runs/moons-{i}" for i in (1, 2, 3)
    ]
    assert str(create(None, "rings").path) == "runs/rings-1"


def test_a_run_is_never_overwritten(tmp_path):
    folder = create(tmp_path / "a" / "b", "moons")
    create(tmp_path / "a" / "b", "moons")  # still empty: nothing is lost
    folder.config.write_text("{}")
    with pytest.raises(InputError, match=r"holds a run already; continue it with --resume"):
        create(tmp_path / "a" / "b", "moons")
    with pytest.raises(InputError, match="is not empty"):
        create(tmp_path / "a", "moons")
    with pytest.raises(InputError, match="is a file"):
        create(folder.config, "moons")
    assert folder.config.read_text() == "{}"


def test_an_impossible_folder_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder that can be written to"):
        check(tmp_path / "file" / "run")
    check(tmp_path / "new" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_metrics_are_cut_back_to_what_the_checkpoint_knows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1})
    size = file.size
    file.append({"step": 2})
    file.close()
    file = MetricsFile(path, size)
    file.append({"step": 3})
    file.close()
    assert read(path) == [{"step": 1}, {"step": 3}]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read(path) == [{"step": 1}]


def test_free_names(tmp_path):
    folder = RunFolder(tmp_path)
    names = []
    for _ in range(3):
        path = folder.free_name("samples", ".csv")
        path.touch()
        names.append(path.name)
    assert names == ["samples.csv", "samples-2.csv", "samples-3.csv"]
