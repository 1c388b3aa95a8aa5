"""Named shapes are those of the models they are named after, and inputs are what they are meant to be."""

import pytest
import torch

from benchmarks import __main__ as main
from benchmarks import longest, loss
from benchmarks.shapes import HEADS, Head, Shape, drawn_lengths, make_problem
from hdpo_kernels import linear_hdpo_loss, naive

TAUGHT = Shape("taught", Head(96, 289), (), torch.float32, sft_steps=2)
TINY = Shape("tiny", Head(32, 500), (20, 20, 20, 20), torch.float32)


def test_heads_are_those_of_the_models():
    assert {
        "V=32000 H=512": Head(512, 32000, None),
        "Qwen2.5-0.5B": Head(896, 151936, None),
        "Llama-3.2-1B": Head(2048, 128256, None),
        "Gemma-2-2B": Head(2304, 256000, 30.0),
        "Qwen2.5-7B": Head(3584, 152064, None),
        "Llama-3-8B": Head(4096, 128256, None),
    } == HEADS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_have_unique_names_and_the_target_comes_first(device):
    for question in main.QUESTIONS.values():
        names = [shape.name for shape in question.shapes(device, quick=False)]
        assert len(names) == len(set(names)), question.__name__
    first = loss.shapes(device, quick=False)[0]
    target = {"cpu": (2048, 32000, 512), "cuda": (8192, 128256, 4096)}[device]
    assert (sum(first.lengths), first.head.vocab, first.head.hidden_size) == target


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_chosen_and_rejected_differ_in_length_in_every_question(device, quick):
    for name, question in main.QUESTIONS.items():
        for shape in question.shapes(device, quick):
            if isinstance(shape, Shape):
                pairs = list(zip(shape.lengths[0::2], shape.lengths[1::2], strict=True))
                assert pairs or shape.sft_steps is not None
            elif name == "longest":
                pairs = [longest.pair(tokens)[1:] for tokens in (64, 1001)]
            else:
                pairs = [pair[1:] for pair in (shape.pairs if name == "growth" else shape.lengths)]
            equal = sum(chosen == rejected for chosen, rejected in pairs)
            assert equal <= 0.05 * len(pairs), (name, shape.name)


@pytest.mark.parametrize(("sequences", "rows"), [(2, 7), (4, 16), (8, 2048), (16, 8192)])
def test_drawn_lengths_add_up_and_are_the_same_every_time(sequences, rows):
    lengths = drawn_lengths(sequences, rows)
    assert sum(lengths) == rows and len(lengths) == sequences and lengths == drawn_lengths(sequences, rows)
    assert 1 <= min(lengths) < max(lengths) < 3 * rows / sequences


def test_make_problem_masks_the_first_half_of_every_sequence():
    shape = TINY._replace(masked=True)
    problem = make_problem(shape, "cpu")
    scored = problem.labels.view(4, 20) != naive.IGNORE_INDEX
    assert not scored[:, :10].any() and scored[:, 10:].all()
    assert shape.gemm_flops == 2 * 40 * 500 * 32 == TINY.gemm_flops // 2


def test_make_problem_pairs_are_not_saturated():
    problem = make_problem(TINY, "cpu")
    margins = linear_hdpo_loss(*problem[:5], alpha=0.9, beta=0.1).margins
    assert margins.abs().max() < 2
    assert problem.hidden.std() > 0.1 and problem.weight.std() > 0.01


def test_make_problem_peaked_probabilities_are_mostly_denormal():
    shape = Shape("peaked", HEADS["V=32000 H=512"], (16, 16), torch.float32, peaked=True)
    problem = make_problem(shape, "cpu")
    with torch.no_grad():
        # of the exact probabilities: a CPU's fp32 softmax may flush them
        p = torch.softmax((problem.hidden @ problem.weight.T).double(), -1)
        ordinary = make_problem(shape._replace(peaked=False), "cpu")
        q = torch.softmax((ordinary.hidden @ ordinary.weight.T).double(), -1)
    tiny, smallest = torch.finfo(torch.float32).tiny, 2.0**-149
    denormal = lambda x: ((x < tiny) & (x > smallest)).double().mean()  # noqa: E731
    assert denormal(p) > 0.5 and denormal(q) == 0


@pytest.mark.parametrize("nats", [0.5, 2.0, 4.0, 6.0])
def test_make_problem_has_the_mean_entropy_that_was_asked_for(nats):
    shape = Shape("entropy", Head(64, 32_000), (32,) * 4, torch.float32, entropy=nats)
    problem = make_problem(shape, "cpu")
    assert naive.linear_logp(*problem[:3]).entropy.mean().item() == pytest.approx(nats, rel=0.02)


def test_make_problem_says_which_entropies_there_are():
    with pytest.raises(ValueError, match=r"no mean entropy of 9\.0 nats: from 3"):
        make_problem(TINY._replace(entropy=9.0), "cpu")


def test_make_problem_of_the_quickstart_has_answers_of_its_model():
    problem = make_problem(TAUGHT, "cpu")
    rows, pairs = len(problem.labels), 300
    assert len(problem.cu_seqlens) == 2 * pairs + 1 and problem.cu_seqlens[-1] == rows == len(problem.hidden)
    assert problem.weight.shape == (TAUGHT.head.vocab, TAUGHT.head.hidden_size)
    ends = problem.labels[torch.tensor(problem.cu_seqlens[1:]) - 1]
    assert (ends == 1).all()  # <eos>
    result = linear_hdpo_loss(*problem[:5], alpha=0.9, beta=0.1)
    assert result.entropy.min() > 1 and result.margins.abs().max() < 10
