"""DistributedDataParallel and FSDP2 on two processes, against one process with the concatenated batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import distributed_worker as worker
import pytest
import torch
from launch import two_processes
from torch.utils._pytree import tree_leaves

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed"),
    pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),  # the compiler's
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("distributed")
    two_processes(worker.__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def both(found: list[dict[str, Any]], check: Callable[..., Any]) -> list[Any]:
    results = [each[check.__name__] for each in found]
    for result in results:
        if isinstance(result, Exception):
            pytest.fail(str(result))
    return results


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    first, second = tree_leaves(a), tree_leaves(b)
    return len(first) == len(second) and all(
        torch.allclose(x, y, rtol=1e-4, atol=tolerance) for x, y in zip(first, second)
    )


def equal(a: Any, b: Any) -> bool:
    first, second = tree_leaves(a), tree_leaves(b)
    return len(first) == len(second) and all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize(
    "check",
    [
        worker.ddp,
        worker.ddp_given_to_the_wrapper,
        worker.compiled_ddp,
        worker.ddp_over_compiled,
        worker.deep_supervision,
        worker.deep_supervision_unused_in_a_step,
        worker.fsdp_after_the_wrapper,
        worker.compiled_fsdp_after_the_wrapper,
        worker.fsdp_before_the_wrapper_with_a_teacher,
    ],
    ids=lambda check: check.__name__,
)
def test_training_on_two_processes_is_training_on_one_with_the_whole_batch(found, check):
    if torch.__version__ < "2.7" and "fsdp" in check.__name__:
        pytest.skip("FSDP2 of torch 2.6 does not run on a CPU")
    torch._dynamo.reset()
    zero, one = both(found, check)
    alone = check(0, 1)
    assert close((zero["losses"] + one["losses"]) / 2, alone["losses"])
    assert not torch.equal(zero["losses"], one["losses"]), "each process has a part of the batch"
    assert zero["keys"] == alone["keys"]
    assert zero["steps"] == alone["steps"]
    for which in ("model", "heads"):
        assert equal(zero[which], one[which])
        assert close(zero[which], alone[which])
    start = worker.model_of_the_test()
    assert not close(alone["model"], list(start.parameters())), "the steps moved the model"


@pytest.mark.parametrize("check", [worker.unlabelled_with_a_buffer_per_rank, worker.unlabelled_with_broadcast_buffers])
def test_models_heads_and_mean_teachers_are_the_same_on_every_process_with_unlabelled_images(found, check):
    zero, one = both(found, check)
    if zero is None:
        pytest.skip("this torch cannot copy buffers at two forwards a step")
    for which in ("model", "average", "heads"):
        assert equal(zero[which], one[which]), which
    assert not torch.equal(zero["losses"], one["losses"]), "each process has a part of the batch"
    assert not equal(zero["statistics"], one["statistics"])
    assert not close(zero["model"], zero["average"])
    assert 0 < zero["sure"] < 1


@pytest.mark.parametrize(
    "check",
    [worker.unlabelled_with_broadcast_buffers_on_an_older_torch, worker.unlabelled_in_a_function_on_an_older_torch],
)
def test_two_forwards_a_step_with_broadcast_buffers_are_refused_where_torch_cannot(found, check):
    for message in both(found, check):
        assert message.startswith("ReSegError")
        assert "broadcast_buffers=False" in message


def test_stage_1_on_two_processes_is_stage_1_on_one_with_the_whole_batch(found):
    zero, one = both(found, worker.stage_1)
    alone = worker.stage_1(0, 1)
    assert equal(zero["teacher"], one["teacher"])
    assert close(zero["teacher"], alone["teacher"])
    assert close((zero["history"] + one["history"]) / 2, alone["history"])
    assert zero["loose"], "the frozen teacher is in no DistributedDataParallel, which refuses it"


def test_teachers_are_the_same_on_every_process_even_from_other_seeds_and_with_batch_statistics(found):
    zero, one = both(found, worker.stage_1_with_other_seeds_and_batch_statistics)
    assert any("running_mean" in name for name in zero["teacher"])
    assert equal(zero["teacher"], one["teacher"])


def test_stage_1_advances_the_epoch_of_a_distributed_sampler(found):
    zero, one = both(found, worker.stage_1_with_a_distributed_sampler)
    assert zero["epoch"] == one["epoch"] == 1
    assert equal(zero["teacher"], one["teacher"])


def test_a_model_that_is_sharded_already_is_refused_with_the_two_ways_out(found):
    for message in both(found, worker.fsdp_before_the_wrapper):
        assert message.startswith("ReSegError")
        assert "build ReSegWrapper (with example_input=) before fully_shard, or pass teacher=" in message


def test_a_mean_teacher_of_a_sharded_model_is_refused_before_and_after(found):
    for messages in both(found, worker.fsdp_with_unlabelled_images):
        assert len(messages) == 2
        for message in messages:
            assert message.startswith("ReSegError: the model")
            assert "needs whole parameters" in message


def test_uneven_batches_under_join_train_with_the_alignment_loss(found):
    zero, one = both(found, worker.join_with_alignment)
    assert equal(zero, one)
    alone = worker.join_with_alignment(0, 1)
    assert close(zero, alone)
    assert not close(alone, list(worker.model_of_the_test().parameters())), "the steps moved the model"


def test_uneven_batches_under_join_train_with_unlabelled_images_in_the_model_itself(found):
    zero, one = both(found, worker.join_with_unlabelled_images)
    assert equal(zero, one)
    assert not close(zero, list(worker.model_of_the_test().parameters()))


def test_what_is_reduced_beside_the_model_is_refused_under_join_on_every_process(found):
    says = {
        "deep": "the heads of deep supervision are reduced separately",
        "held by another module": "the heads of deep supervision are reduced separately",
        "unlabelled": "this loss runs the model twice a step",
    }
    for messages in both(found, worker.join_refused):
        assert messages.keys() == says.keys()
        for name, what in says.items():
            assert messages[name].startswith("ReSegError: the model's DistributedDataParallel is in a join() context")
            assert what in messages[name]
            assert "DistributedSampler" in messages[name]


def test_a_model_that_was_wrapped_later_is_not_run_without_its_wrapper(found):
    (said, zero), (_, one) = both(found, worker.wrapped_later)
    assert said.startswith("ReSegError: the model was wrapped in DistributedDataParallel after this was built")
    assert "forward=" in said
    assert equal(zero, one)


def test_a_join_that_ends_with_the_first_process_may_have_heads_beside_it(found):
    assert [each[0] for each in both(found, worker.join_that_ends_with_the_first)] == [2, 2]


def test_uneven_loaders_of_stage_1_are_refused_on_every_process_or_trained_by_steps(found):
    results = both(found, worker.stage_1_uneven)
    for result in results:
        for name, more in (("list", ""), ("iterable data set", " or more"), ("iterable", " or more")):
            assert result[name].startswith("ReSegError: the ranks have different numbers of batches"), name
            assert f"3{more} on rank 0, 2 on rank 1" in result[name]
            assert "steps=" in result[name]
    for which in ("steps", "even"):
        assert equal(results[0][which], results[1][which])
