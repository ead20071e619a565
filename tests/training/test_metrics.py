"""Figures of a run, each once."""

import json

import numpy as np
import pytest

from pixcell.errors import MissingExtra, RunError
from pixcell.training.metrics import MetricsLog, WandbConfig, check_wandb, read_metrics


def test_going_on_from_a_step_drops_the_lines_after_it(tmp_path):
    with MetricsLog(tmp_path, 0, tensorboard=False) as log:
        for step in range(1, 6):
            log.write(step, {"loss": step / 10})
    with MetricsLog(tmp_path, 3, tensorboard=False) as log:
        log.write(4, {"loss": 9.0})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    with MetricsLog(tmp_path, 0, tensorboard=False) as log:
        log.write(1, {"loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize(
    "damage", [b"\x00\x00\x00", b'{"step": 2, "lo', b"\xff\xfe", b"null", b"2", b'{"loss": 1}']
)
def test_a_damaged_line_takes_no_other_with_it(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    MetricsLog(tmp_path, 3, tensorboard=False).close()
    assert [line["step"] for line in read_metrics(path)] == [1, 3]


def test_every_line_is_json_even_when_a_figure_is_not_finite(tmp_path):
    with MetricsLog(tmp_path, 0, tensorboard=False) as log:
        log.write(1, {"loss": float("nan")})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_tensorboard_shows_the_same_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, 0) as log:
        log.write(7, {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 0.25)]


def records_of(path):
    """The records of a W&B file: seven bytes, then blocks of 32 KiB; pieces have checksum, length, type."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of it, or its last piece
            record = pb.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history_of(path):
    found = [record.history for record in records_of(path) if record.WhichOneof("record_type") == "history"]
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in one.item} for one in found
    ]
    return [{key: value for key, value in line.items() if not key.startswith("_")} for line in lines]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A run folder, and W&B that stays on disk."""
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipe.yaml").write_text("name: tiny\ntrainer: {steps: 4}\n")
    return tmp_path


def test_weights_and_biases_shows_one_run_over_all_starts(offline):
    config = WandbConfig(project="tissue", mode="offline", tags=("test",))
    with MetricsLog(offline, 0, tensorboard=False, wandb=config) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 1 / step, "note": "no number"})
        log.write_picture(3, "preview", np.zeros((8, 8, 3), np.uint8))
    with MetricsLog(offline, 2, tensorboard=False, wandb=config) as log:
        log.write(3, {"loss": 0.25})
    first, second = sorted(offline.glob("wandb/offline-run-*/run-*.wandb"))
    assert history_of(first) == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    assert history_of(second) == [{"step": 3, "loss": 0.25}]
    ids = [
        record.run.run_id
        for path in (first, second)
        for record in records_of(path)
        if record.WhichOneof("record_type") == "run"
    ]
    assert set(ids) == {json.loads((offline / "wandb.json").read_text())["id"]}


def test_weights_and_biases_without_a_login_says_what_to_do(offline, monkeypatch):
    monkeypatch.setenv("HOME", str(offline))
    monkeypatch.setenv("NETRC", str(offline / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(RunError, match=r"wandb login.*mode=offline"):
        MetricsLog(offline, 0, tensorboard=False, wandb=WandbConfig(project="tissue"))


def test_weights_and_biases_that_is_not_installed_is_told_before_the_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'pixcell\[wandb\]'"):
        check_wandb()


def test_a_damaged_id_of_a_board_is_an_error_with_a_way_out(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "wandb.json").write_text("{")
    with pytest.raises(RunError, match=r"wandb\.json is damaged .* or delete it"):
        MetricsLog(tmp_path, 0, tensorboard=False, wandb=WandbConfig(project="p", mode="offline"))
