"""A twin of torch's recorder that runs, as a CUDA graph does, the same ops in the same memory every time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from knife import graphs
from knife.graphs import tensors_in


class Tape(TorchDispatchMode):
    """Notes the ops of a work, and runs them again on the same tensors: nothing of Python is called anew."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        """Run all ops once more, each into what it made the first time."""
        with torch.no_grad():
            for func, args, kwargs, made in self.ops:
                again = func(*args, **kwargs)
                for old, new in zip(tensors_in(made), tensors_in(again), strict=True):
                    if old.data_ptr() != new.data_ptr():  # a view of what another op has written already
                        old.detach().copy_(new)


class Twin:
    """Stands in for torch.cuda's part, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded, self.replayed, self.pools = 0, 0, []
        monkeypatch.setattr(graphs, "warm", lambda work, device: work())
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(graphs, "new_pool", object)

    def capture(self, work, device, pool):
        """Record a work."""
        self.recorded += 1
        self.pools.append(pool)
        with Tape() as tape:
            made = work()

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay, made
