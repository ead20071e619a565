"""Figures of a run, each once."""

from pixcell.training.metrics import MetricsLog, read_metrics


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
