import copy
import threading

import torch

from danet.kernels.memory import MemoryPool, ReusedMemory


def test_pieces_are_used_again_and_grow() -> None:
    memory = ReusedMemory(torch.empty(2, dtype=torch.float64))
    first = memory.take("rows", 3, 4)
    assert (first.shape, first.dtype) == ((3, 4), torch.float64)
    assert memory.take("rows", 2, 5).data_ptr() == first.data_ptr()
    assert memory.take("columns", 3, 4).data_ptr() != first.data_ptr()
    assert memory.take("rows", 5, 5).shape == (5, 5)


def test_what_inference_mode_made_can_be_written_to_outside_it() -> None:
    with torch.inference_mode():
        piece = ReusedMemory(torch.ones(1)).take("rows", 2)
    assert piece.zero_().tolist() == [0, 0]


def test_layers_share_memory_one_after_the_other() -> None:
    pool = MemoryPool()
    like = torch.empty(0)
    with pool.borrow(like) as first, pool.borrow(like) as nested:
        assert nested is not first
    with pool.borrow(like) as later:
        assert later is first
        with pool.borrow(torch.empty(0, dtype=torch.bfloat16)) as other:
            assert other.take("rows", 1).dtype == torch.bfloat16
    with pool.borrow(torch.empty(0, device="meta")) as elsewhere:
        assert elsewhere.take("rows", 1).is_meta


def test_threads_have_their_own() -> None:
    pool = MemoryPool()
    both_hold = threading.Barrier(2)
    held = []

    def hold() -> None:
        with pool.borrow(torch.empty(0)) as memory:
            held.append(memory)
            both_hold.wait(timeout=60)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held[0] is not held[1]


def test_copies_of_a_pool_are_empty() -> None:
    pool = MemoryPool()
    with pool.borrow(torch.empty(0)):
        pass
    assert len(pool.idle) == 1
    assert copy.deepcopy(pool).idle == []
