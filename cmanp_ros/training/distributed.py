"""One training in several processes or machines, started by torchrun: each takes its tasks."""

import os

import torch
from torch import distributed


def start() -> tuple[int, int]:
    """
    Join the others that torchrun has started.

    :return: number of this process and of all of them; (0, 1) if it was started alone.
    """
    if int(os.environ.get('WORLD_SIZE', '1')) == 1:
        return 0, 1
    if not distributed.is_initialized():
        # torch.optim imports it, and its default arguments keep a group that is there by then: the
        # group's threads would outlive stop(), and one that the end of Python meets aborts it
        from torch.distributed import nn  # noqa: F401

        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())
        distributed.init_process_group('cpu:gloo,cuda:nccl' if has_gpu else 'gloo')
    return distributed.get_rank(), distributed.get_world_size()


def stop():
    """
    Leave the others.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()


def average(tensors):
    """
    Replace tensors by their average over all processes.
    """
    if not distributed.is_initialized():
        return
    for tensor in tensors:
        distributed.all_reduce(tensor)
        tensor /= distributed.get_world_size()


def wait():
    """
    Wait until all processes are here.
    """
    if distributed.is_initialized():
        distributed.barrier()


def any_says(flag: bool) -> bool:
    """
    Return whether any of the processes says so, the same in all of them.
    """
    found = torch.tensor(float(flag))
    average([found])
    return bool(found)
