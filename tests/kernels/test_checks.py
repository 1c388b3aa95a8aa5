"""Bad input is refused at the door, by name and value, with the way out."""

import pytest
import torch

from hdpo_kernels import hdpo_loss, linear_hdpo_loss, linear_logp
from hdpo_kernels.testing import zipf_inputs

INPUTS = zipf_inputs([3, 2, 1, 4], 7, 4)
HIDDEN, WEIGHT, LABELS, CU_SEQLENS, REF_LOGPS = INPUTS
META = torch.device("meta")  # stands in for another device

HEAD_FAULTS = {
    "hidden of three dimensions": ({"hidden": HIDDEN[None]}, ValueError, r"\(N, H\).*got \(1, 10, 4\)"),
    "another hidden size": ({"weight": WEIGHT[:, :3]}, ValueError, r"same H, got \(10, 4\) and \(7, 3\)"),
    "no vocabulary": ({"weight": WEIGHT[:0]}, ValueError, r"no vocabulary entry, shape \(0, H\)"),
    "hidden of integers": ({"hidden": HIDDEN.long()}, TypeError, "hidden must be floating, got torch.int64"),
    "mixed dtypes": ({"weight": WEIGHT.half()}, TypeError, "weight is torch.float16 but hidden is .*: cast .*autocast"),
    "bias of another dtype": ({"bias": torch.zeros(7).half()}, TypeError, "bias is torch.float16 but hidden is"),
    "mixed devices": ({"weight": WEIGHT.to(META)}, ValueError, "weight is on meta but hidden is on cpu"),
    "bias of another length": ({"bias": torch.zeros(6)}, ValueError, r"bias must have shape \(7,\), got \(6,\)"),
    "labels of another length": ({"labels": LABELS[:9]}, ValueError, r"int64 of shape \(10,\), got torch.int64 \(9,\)"),
    "labels of int32": ({"labels": LABELS.int()}, ValueError, "labels must be int64 .*got torch.int32"),
    "labels elsewhere": ({"labels": LABELS.to(META)}, ValueError, "labels are on meta; put them on cpu .*on the CPU"),
    "softcap of zero": ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, got 0.0"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap must be a positive number or None, got -1.0"),
    "logit_scale of zero": ({"logit_scale": 0.0}, ValueError, "logit_scale must be a finite number .*got 0.0"),
    "logit_scale of NaN": ({"logit_scale": float("nan")}, ValueError, "logit_scale must be a finite number .*got nan"),
    "chunk_bytes of zero": ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be a positive int.* or None .*got 0"),
    "chunk_bytes of a float": ({"chunk_bytes": 1e3}, ValueError, "chunk_bytes must be a positive int.* got 1000.0"),
    "unknown gradient": ({"gradient": "filtered"}, ValueError, "gradient must be 'exact'.* got 'filtered'"),
    "epsilon of zero": ({"gradient": "sampled", "epsilon": 0.0}, ValueError, r"epsilon must be in \(0, 0.5\], got 0.0"),
    "epsilon of NaN": ({"gradient": "sampled", "epsilon": float("nan")}, ValueError, "epsilon must be in .* got nan"),
    "a large epsilon": ({"gradient": "sampled", "epsilon": 0.6}, ValueError, r"epsilon must be in \(0, 0.5\], got 0.6"),
    "more entries than a row has": (
        {"gradient": "sampled", "epsilon": 0.125},
        ValueError,
        r"epsilon=0.125 may keep .* = 10 entries of a row that has 7: gradient='exact' is cheaper.* epsilon >= 0.2",
    ),
}  # fmt: skip

PAIR_FAULTS = {
    "alpha of zero": ({"alpha": 0.0}, "alpha must be a positive number, got 0.0"),
    "negative beta": ({"beta": -1.0}, "beta must be a positive number, got -1.0"),
    "rows left over": ({"cu_seqlens": [0, 3, 5, 6, 9]}, "run from 0 to the number of rows, 10; got 0 … 9"),
    "rows before the first": ({"cu_seqlens": [1, 3, 5, 6, 10]}, "number of rows, 10; got 1 … 10"),
    "no boundaries": ({"cu_seqlens": []}, "the number of rows; got an empty list"),
    "decreasing boundaries": ({"cu_seqlens": [0, 5, 3, 6, 10]}, "must not decrease; sequence 1 runs from 5 to 3"),
    "an odd number of sequences": ({"cu_seqlens": [0, 3, 5, 10]}, "counts 3 sequences; pairs need an even number"),
    "boundaries of floats": ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "must be integers .*got torch.float32"),
    "boundaries of two dimensions": ({"cu_seqlens": torch.tensor([[0, 10]])}, r"shape \(S \+ 1,\), got .* \(1, 2\)"),
    "ref_logps of another length": (
        {"ref_logps": REF_LOGPS[:2]},
        r"one entry a sequence, \(4,\); got torch.float32 \(2,\)",
    ),
    "ref_logps of integers": ({"ref_logps": REF_LOGPS.long()}, "must be floating .*got torch.int64"),
    "ref_logps elsewhere": ({"ref_logps": REF_LOGPS.to(META)}, "ref_logps are on meta but the rest is on cpu"),
    "ref_logps with a gradient": ({"ref_logps": REF_LOGPS.clone().requires_grad_()}, "is frozen: detach them"),
}


@pytest.mark.parametrize(("change", "error", "message"), HEAD_FAULTS.values(), ids=HEAD_FAULTS.keys())
def test_linear_functions_refuse_a_head_that_does_not_fit(change, error, message):
    arguments = {**INPUTS._asdict(), **change}
    with pytest.raises(error, match=message):
        linear_hdpo_loss(**arguments)
    arguments.pop("cu_seqlens"), arguments.pop("ref_logps")
    with pytest.raises(error, match=message):
        linear_logp(**arguments)


@pytest.mark.parametrize(("change", "message"), PAIR_FAULTS.values(), ids=PAIR_FAULTS.keys())
def test_losses_refuse_pairs_that_do_not_fit(change, message):
    arguments = {**INPUTS._asdict(), **change}
    with pytest.raises(ValueError, match=message):
        linear_hdpo_loss(**arguments)
    arguments["logits"] = arguments.pop("hidden") @ arguments.pop("weight").T
    with pytest.raises(ValueError, match=message):
        hdpo_loss(**arguments)


@pytest.mark.parametrize("label", [7, -1, -99])
def test_functions_refuse_a_label_outside_the_vocabulary(label):
    labels = LABELS.clone()
    labels[4], labels[5], labels[7] = -100, label, label
    message = rf"label {label} at row 5 is outside the vocabulary of 7 entries \(2 such labels\); use -100"
    with pytest.raises(ValueError, match=message):
        linear_hdpo_loss(HIDDEN, WEIGHT, labels, CU_SEQLENS, REF_LOGPS)
    with pytest.raises(ValueError, match=message):
        linear_logp(HIDDEN, WEIGHT, labels)
    with pytest.raises(ValueError, match=message):
        hdpo_loss(HIDDEN @ WEIGHT.T, labels, CU_SEQLENS, REF_LOGPS)


def test_functions_refuse_boundaries_that_are_not_integers():
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        linear_hdpo_loss(HIDDEN, WEIGHT, LABELS, [0, 3.5, 10], REF_LOGPS[:2])


@pytest.mark.parametrize(
    "bad", [torch.zeros(10), torch.zeros(10, 7).long(), torch.zeros(2, 5, 7)], ids=["1d", "int", "3d"]
)
def test_hdpo_loss_refuses_logits_that_do_not_fit(bad):
    with pytest.raises(ValueError, match=r"logits must be floating of shape \(N, V\), got torch"):
        hdpo_loss(bad, LABELS, CU_SEQLENS, REF_LOGPS)
