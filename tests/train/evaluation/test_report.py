"""The report of evaluations: the figures that are there, and no others."""

import pytest
from matplotlib import image

from hdpo_train.evaluation.report import draw, markdown
from hdpo_train.evaluation.scores import Estimate, Evaluation, Scores

GREEDY = Scores(0.0, 1, Estimate(0.5, 0.25, 0.75), {}, Estimate(0.5, 0, 1), {1: Estimate(1, 1, 1)}, None, None)
SAMPLED = Scores(
    0.7, 8, Estimate(0.4, 0.3, 0.5), {1: Estimate(0.4, 0.3, 0.5), 8: Estimate(0.9, 0.8, 1.0)}, Estimate(3.25, 3, 3.5),
    {1: Estimate(0.3, 0.2, 0.4), 2: Estimate(0.6, 0.5, 0.7)}, Estimate(0.125, 0.1, 0.2), Estimate(0.75, 0.7, 0.8),
)  # fmt: skip


def test_markdown_has_a_row_for_each_temperature():
    lines = markdown([Evaluation("m", 12, GREEDY, {0.7: SAMPLED})]).splitlines()
    names = "temperature samples accuracy pass@8 distinct_right distinct-1 distinct-2 self-BLEU entropy"
    assert lines[0] == f"| | {' | '.join(names.split())} |".replace("_", " ")
    assert lines[2] == "| m | 0 (greedy) | 1 | 50.0% (25.0 … 75.0) | | | | | | |"  # of one sample: no diversity
    assert lines[3] == (
        "| m | 0.7 | 8 | 40.0% (30.0 … 50.0) | 90.0% (80.0 … 100.0) | 3.25 (3.00 … 3.50) | 0.300 (0.200 … 0.400) "
        "| 0.600 (0.500 … 0.700) | 0.125 (0.100 … 0.200) | 0.750 (0.700 … 0.800) |"
    )
    assert lines[5].startswith("Prompts: 12. ") and "Entropy: exact" in lines[5]


def test_markdown_leaves_out_what_nothing_is_known_of():
    text = markdown([Evaluation("m", 1, GREEDY, {})])
    assert text.splitlines()[0] == "| | temperature | samples | accuracy |"
    assert "pass@k" not in text and "BLEU" not in text and "Entropy" not in text


@pytest.mark.parametrize(
    "evaluations",
    [
        [Evaluation("m", 1, GREEDY, {})],
        [Evaluation("m", 1, None, {0.7: SAMPLED})],
        [Evaluation(f"model {i}", 1, GREEDY, {0.7: SAMPLED}) for i in range(12)],
    ],
    ids=["greedy only", "samples only", "many"],
)
def test_draw_takes_whatever_there_is(evaluations, tmp_path):
    draw(evaluations, tmp_path / "plot.png")
    pixels = image.imread(tmp_path / "plot.png")
    assert pixels.shape[:2] == (960, 1440) and pixels.std() > 0.01
