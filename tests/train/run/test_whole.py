"""Which folders are checkpoints: without any one file that resuming needs, none is; and what all ranks agree on."""

import json
import shutil

import pytest
import torch

from hdpo_train import ranks
from hdpo_train.run.output_dir import Sight, agree, refuse_base_model, refuse_broken, refuse_other_run
from hdpo_train.run.report import METRICS_FILE
from hdpo_train.run.run_record import write_record
from hdpo_train.run.whole import checkpoint_problem, weight_files
from tests.train.tiny import make_model

STATE = {"global_step": 4, "log_history": []}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As transformers leaves one of two ranks, with a model in shards."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint-4"
    make_model().save_pretrained(folder, max_shard_size="40KB")
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        torch.save({"state": 1}, folder / name)
    write_record(folder, {"processes": 2})
    assert checkpoint_problem(folder, 0, 2) is None and checkpoint_problem(folder, 1, 2) is None
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "checkpoint-4")


NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state_1.pth", "trainer_state.json", "model-00002-of-", "model.safetens")


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_checkpoint_problem_names_what_is_not_there_or_cut(name, how, copy):
    (path,) = copy.glob(f"{name}*")
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:-20])
    problem = checkpoint_problem(copy, 1, 2)
    assert path.name in problem if path.name != "model.safetensors.index.json" or how != "missing" else "no weights"


@pytest.mark.parametrize("state", ["[]", "{}", "null", '{"global_step": "4"}', "[" * 100_000])
def test_checkpoint_problem_reads_the_state(state, copy):
    (copy / "trainer_state.json").write_text(state)
    assert checkpoint_problem(copy, 0, 2).startswith("trainer_state.json ")


def test_checkpoint_problem_asks_for_random_numbers_of_as_many_ranks_as_saved(copy):
    (copy / "rng_state_1.pth").unlink()  # as on the disk of another machine
    assert checkpoint_problem(copy, 0, 2) is None
    assert checkpoint_problem(copy, 1, 2) == "rng_state_1.pth is missing"
    assert checkpoint_problem(copy, 0, 1) is None and checkpoint_problem(copy, 3, 4) is None  # others now


def test_checkpoint_problem_knows_the_layouts_of_deepspeed_and_fsdp(copy):
    for path in (*weight_files(copy), copy / "optimizer.pt"):
        path.unlink()
    assert checkpoint_problem(copy) == "it holds no weights"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (copy / name).mkdir()
        assert checkpoint_problem(copy) is not None
        (copy / name / ".metadata").touch()
    assert checkpoint_problem(copy) is None
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        shutil.rmtree(copy / name)
    (copy / "latest").write_text("global_step4")
    for kind in ("model", "optim"):
        assert f"global_step4/*{kind}_states.pt is missing" in checkpoint_problem(copy)
        (copy / "global_step4").mkdir(exist_ok=True)
        torch.save({}, copy / "global_step4" / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt")
    assert checkpoint_problem(copy) is None


def test_agree_takes_the_last_that_all_ranks_have():
    first, second = Sight({2: "a", 4: "a", 6: "a"}, {}), Sight({2: "a", 6: "b"}, {4: "optimizer.pt is missing"})
    taken, problems = agree("out", [first, second])
    assert taken == "out/checkpoint-2"
    assert problems == [
        "out/checkpoint-6 of rank 1: written with other options than that of rank 0",
        "out/checkpoint-4 of rank 1: optimizer.pt is missing",
    ]
    assert agree("out", [Sight({}, {})] * 2) == (None, [])


def test_agree_says_which_rank_lacks_what():
    with pytest.raises(ValueError, match=r"no checkpoint in out is whole: out/checkpoint-4 of rank 1: no such folder"):
        agree("out", [Sight({4: "a"}, {}), Sight({}, {})])
    with pytest.raises(ValueError, match="cannot resume from checkpoint-4: rank 1: no such folder"):
        refuse_broken("out", "checkpoint-4", [None, "no such folder"])


def test_refuse_base_model_knows_links_and_checkpoints_of_the_folder(tmp_path):
    out = tmp_path / "out"
    for name in ("checkpoint-3", "models/sft", "checkpoint-best"):
        (out / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(out / "checkpoint-3")
    for name in (out, out / "checkpoint-3", tmp_path / "link"):
        with pytest.raises(ValueError, match=f"holds {name}"):
            refuse_base_model(str(out), ["hub/id", str(name)])
    refuse_base_model(str(out), [None, "", "hub/id", str(out / "models" / "sft"), str(out / "checkpoint-best")])


def test_refuse_other_run_never_gives_a_model_that_no_run_has_left_to_be_deleted(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "notes.safetensors").touch()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds"):
            refuse_other_run(str(tmp_path), overwrite)
    (tmp_path / METRICS_FILE).touch()
    names = {path.name for path in refuse_other_run(str(tmp_path), True)}
    assert names == {"model.safetensors", METRICS_FILE}


def test_together_raises_on_ranks_that_did_not_fail(monkeypatch):
    monkeypatch.setattr(ranks, "gather_object", lambda own: [*own, "out holds another run"])  # rank 1's answer
    with pytest.raises(ValueError, match="rank 1: out holds another run"):
        ranks.together(lambda: 1)
    monkeypatch.setattr(ranks, "gather_object", lambda own: [*own, None])
    assert ranks.together(lambda: 1) == 1
    with pytest.raises(KeyError, match="own"):
        ranks.together(lambda: {}["own"])
