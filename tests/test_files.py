"""Files appear whole or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixcell.errors import OutputError
from pixcell.files import (
    remove_leftovers,
    sha256_of,
    write_json,
    write_text,
    write_whole,
    write_whole_folder,
)


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def break_while_writing():
        with write_whole(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        break_while_writing()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_process_killed_in_the_middle_leaves_no_half_file(tmp_path):
    path = tmp_path / "big.txt"
    code = (
        "from pathlib import Path; import time\n"
        "from pixcell.files import write_whole\n"
        f"with write_whole(Path({str(path)!r})) as t:\n"
        "    t.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert not path.exists()
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 1
    assert remove_leftovers(tmp_path) == 0, "a young file may belong to a process that still writes"
    day_before_yesterday = time.time() - 2 * 24 * 3600
    os.utime(leftovers[0], (day_before_yesterday, day_before_yesterday))
    assert remove_leftovers(tmp_path) == 1
    assert not list(tmp_path.iterdir())


def test_only_names_that_are_temporary_ones_are_leftovers(tmp_path):
    own = tmp_path / "case.tmp-2.h5"
    own.write_bytes(b"finished long ago")
    os.utime(own, (0, 0))
    assert remove_leftovers(tmp_path) == 0
    assert own.exists()


def test_a_file_that_is_finished_while_leftovers_are_looked_for_is_no_error(tmp_path, monkeypatch):
    vanished = tmp_path / "shard.h5.tmp-0123456789ab"
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([vanished]))
    assert remove_leftovers(tmp_path) == 0


def test_a_file_where_a_folder_is_needed_is_a_clear_error(tmp_path):
    (tmp_path / "taken").write_text("I am a file")
    with pytest.raises(OutputError, match="choose another output folder"):
        write_text(tmp_path / "taken" / "inside.txt", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder_is_a_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission"):
        write_text(tmp_path / "x.txt", "x")
    tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")  # noqa: PTH110
def test_a_full_disk_is_a_clear_error(tmp_path):
    def write():
        with write_whole(tmp_path / "x"), open("/dev/full", "w") as file:  # noqa: PTH123
            file.write("x" * 100_000)

    with pytest.raises(OutputError, match="disk is full"):
        write()


def test_an_error_of_what_is_read_is_not_blamed_on_what_is_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), write_whole_folder(tmp_path / "out"):
        (tmp_path / "file" / "config.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OutputError, match="folder is needed"), write_whole(tmp_path / "file" / "x"):
        pass


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_the_hash_is_that_of_the_standard_tools(tmp_path):
    write_text(tmp_path / "empty", "")
    assert sha256_of(tmp_path / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")


# ── whole folders ────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_appears_with_all_its_files_or_not_at_all(tmp_path):
    place = tmp_path / "new" / "folder"

    def write(fail):
        with write_whole_folder(place) as temporary:
            (temporary / "inside").mkdir()
            write_text(temporary / "inside" / "a.txt", "a")
            assert not place.exists()
            if fail:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write(fail=True)
    assert not list(place.parent.iterdir())
    write(fail=False)
    assert [path.name for path in place.parent.iterdir()] == ["folder"]
    assert (place / "inside" / "a.txt").read_text() == "a"


def test_a_folder_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="is there already"), write_whole_folder(tmp_path / "taken"):
        pytest.fail("the block ran")


def test_what_a_killed_process_left_of_a_folder_is_removed_but_not_what_a_living_one_writes(tmp_path):
    place = tmp_path / "folder"
    code = (
        "from pathlib import Path; import time\n"
        "from pixcell.files import write_whole_folder\n"
        f"with write_whole_folder(Path({str(place)!r})) as t:\n"
        "    (t / 'half').write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(RuntimeError), write_whole_folder(place):
            raise RuntimeError
        assert len(list(tmp_path.iterdir())) == 1, "the folder of a process that lives is left alone"
        process.send_signal(signal.SIGKILL)
    assert not place.exists()
    with write_whole_folder(place) as temporary:
        (temporary / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_a_clear_error_for_a_folder_too(tmp_path):
    """Writers of weights say it in errors of their own."""
    with pytest.raises(OutputError, match="disk is full"), write_whole_folder(tmp_path / "x"):
        raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())
