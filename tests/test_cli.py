"""The command line: instant help with an example, one clear line for a user's error."""

import os
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from pixcell.cli import app

COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pixcell", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example: pixcell" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tile", "no-such-slides", "store"], "no-such-slides"),
        (["tile", ".", "store", "--recipe", "tiles-2x"], "no recipe 'tiles-2x'"),
        (["tile", ".", "store", "--set", "tiling.tile_sise=4"], "Did you mean 'tile_size'"),
        (["train", "nano", "--set", "trainer.stepz=4"], "Did you mean 'steps'"),
        (["encode", "no-such-store", "--encoder", "stain-texture"], "no-such-store"),
        (["report", "no-such-run"], "no-such-run"),
        (["sample", "no-such-run", "--out", "samples", "--unconditional"], "no-such-run"),
        (["sample", "no-such-run", "--out", "samples", "--set", "stepz=4"], "Did you mean 'steps'"),
        (["prior", "no-such-store", "out"], "no-such-store"),
        (["prior", "store", "out", "--set", "ranks=4"], "Did you mean 'rank'"),
        (["encode", "store", "--set", "batch_size=many"], "pixcell encode: batch_size"),
        (["evaluate", "a", "b", "--extractor", "stain-texture"], "a"),
        (["inspect", "no-such-thing"], "no-such-thing"),
        (["import", "no-such-folder", "store"], "no-such-folder"),
        (["export", "no-such-store", "folder"], "no-such-store"),
        (["pack", "no-such-store", "folder"], "no-such-store"),
        (
            ["pack", "store", "folder", "--where", "train"],
            "--where 'train' is not of the form attribute=value",
        ),
        (["pack", "store", "folder", "--shard-size", "big"], "pixcell pack: shard_size"),
        (["pack", "store", "folder", "--set", "sed=1"], "Did you mean 'seed'"),
        (["demo", "out", "--slides", "no-such-slide.svs"], "no-such-slide.svs"),
        (["convert", "no-such-weights", "out"], "no-such-weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    from pixcell import cli

    printed: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pixcell", *arguments])
    monkeypatch.setattr(cli.console, "print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in printed[-1]
    assert "Traceback" not in " ".join(printed)
    assert not list(tmp_path.iterdir()), "a command that fails at once leaves nothing behind"


def test_ctrl_c_says_that_nothing_is_lost(monkeypatch, capfd):
    from pixcell import cli

    def interrupted(kind, recipe, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.data, "load_recipe", interrupted)
    monkeypatch.setattr(sys, "argv", ["pixcell", "tile", "slides", "store"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "run the same command again" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["tile slides {0}", "inspect {0}", "encode {0} --encoder stain-texture"])
def test_what_the_system_refuses_is_one_line(command, tmp_path, monkeypatch, capfd):
    from pixcell import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.png").touch()
    name = "n" * 300
    monkeypatch.setattr(sys, "argv", ["pixcell", *command.format(name).split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capfd.readouterr().err
    assert f"Error: {name}" in printed
    assert ": File name too long. Correct the path" in printed
    assert "Traceback" not in printed


def test_a_name_that_the_terminal_cannot_show_is_shown_as_it_can(tmp_path):
    path = tmp_path / "語.png"
    Image.new("RGB", (8, 8)).save(path)
    ended = subprocess.run(
        [sys.executable, "-m", "pixcell", "inspect", str(path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "\\u8a9e.png" in ended.stdout


def test_the_module_and_its_exit_code_work_from_a_shell(tmp_path):
    ended = run("inspect", str(tmp_path / "nothing"))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("Error:")
    assert "Traceback" not in ended.stderr


def test_an_option_that_does_not_exist_is_a_usage_error():
    assert run("tile", "--no-such-option").returncode == 2


def test_version_is_that_of_the_package():
    import pixcell

    assert run("--version").stdout == f"pixcell {pixcell.__version__}\n"


def test_encoders_are_listed_with_their_licence():
    ended = run("encoders")
    assert ended.returncode == 0
    assert "stain-texture" in ended.stdout
    assert "licence" in ended.stdout.lower()
