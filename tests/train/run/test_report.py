"""report.png from metrics.jsonl, whatever is in it."""

import pytest

from hdpo_train.run.report import METRICS_FILE, draw, read_metrics, write_metrics

START = {"step": 0, "pairs": 3, "alpha": 0.9, "beta": 0.1, "loss_type": "sigmoid", "initial_margin": -0.1}


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("evaluations", [0, 2])
@pytest.mark.parametrize("slope", [0.0, 0.1], ids=["constant", "schedule"])
def test_draw_takes_any_number_of_points(steps, evaluations, slope, tmp_path):
    same = {"loss": 0.5, "rewards/margins": 0.1, "entropy/chosen": 1.0}
    lines = [{"step": i, "alpha": 0.9 + slope * i, **same} for i in range(1, steps + 1)]
    lines += [{"step": i, "eval_loss": 0.4} for i in range(1, evaluations + 1)]
    write_metrics(tmp_path, [START, *lines])
    assert draw(tmp_path).stat().st_size > 10_000


def test_read_metrics_refuses_a_broken_line_in_the_middle(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON: 'nonsense'"):
        read_metrics(tmp_path)
