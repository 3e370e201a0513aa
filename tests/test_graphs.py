"""Recorded calls: by a twin of torch's recorder that writes, as a CUDA graph does, into the same memory every time."""

import gc
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from knife.ddim import slope
from knife.errors import SettingsError
from knife.graphs import MOST, Replayed, forget, in_words, replay
from knife.spec import preset


class Twin:
    """Stands in for torch.cuda.make_graphed_callables, and counts."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, work, samples):
        """Record a call, and its gradient, into memory of its own."""
        self.recorded += 1
        twin, held = self, [x.detach().clone().requires_grad_(x.requires_grad) for x in samples]
        made = work(*held).detach().clone()

        class Call(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs: Tensor) -> Tensor:
                twin.replayed += 1
                with torch.enable_grad():
                    for own, given in zip(held, inputs, strict=True):
                        own.data.copy_(given)
                    answer = work(*held)
                twin.answer = answer  # one for all calls, as the memory of a recording is
                return made.copy_(answer.detach()).detach()

            @staticmethod
            def backward(ctx, grad: Tensor):
                wanted = [x for x in held if x.requires_grad]
                found = iter(torch.autograd.grad(twin.answer, wanted, grad))
                return tuple(next(found) if x.requires_grad else None for x in held)

        return Call.apply


@pytest.fixture
def twin(monkeypatch) -> Twin:
    """Record by a twin."""
    made = Twin()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", made)
    return made


def network() -> nn.Module:
    """Return a small network whose answers depend on everything it is given."""
    torch.manual_seed(0)
    net = preset("small-64").spec("diffusion", ("a", "b")).build_unet(2)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.05)
    return net.eval().requires_grad_(False)


def images(count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images of 16 x 16 pixels, and their timesteps."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 16, 16, generator=drawn), torch.randint(1000, (count,), generator=drawn)


def sum_of_squares(net):
    """Return a score whose gradient depends on all that a network answers."""
    return lambda x, t: net(x, t).float().flatten(1).square().sum(1)


def test_a_replayed_call_answers_as_the_network_does_and_is_recorded_once(twin):
    net = network()
    replayed = Replayed(net.forward, "cpu")
    with torch.no_grad():
        for seed in range(3):
            x, t = images(seed=seed)
            assert torch.equal(replayed(x, t), net(x, t))
    assert (twin.recorded, twin.replayed) == (1, 3)


def test_an_answer_outlives_the_next_call(twin):
    net = network()
    replayed = Replayed(net.forward, "cpu")
    with torch.no_grad():
        first = replayed(*images(seed=0))
        replayed(*images(seed=1))
        assert torch.equal(first, net(*images(seed=0)))


def test_gradients_are_replayed_too(twin):
    net = network()
    x, t = images()
    wanted = slope(sum_of_squares(net), x, t)
    net.forward = Replayed(net.forward, "cpu")
    for _ in range(2):
        found = slope(sum_of_squares(net), x, t)
        assert torch.equal(found.score, wanted.score)
        assert torch.equal(found.gradient, wanted.gradient)
    assert (twin.recorded, twin.replayed) == (1, 2)


def test_a_score_that_calls_twice_has_the_gradient_of_both(twin):
    net = network()
    x, t = images()

    def both(net):
        return lambda x, t: sum_of_squares(net)(x, t) + 2 * sum_of_squares(net)(x.flip(-1), t)

    wanted = slope(both(net), x, t)
    replayed = Replayed(net.forward, "cpu")
    for _ in range(2):
        found = slope(both(replayed), x, t)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert (twin.recorded, twin.replayed) == (1, 2)


def test_while_a_gradient_is_still_to_come_calls_are_computed_anew(twin):
    replayed = Replayed(lambda x: x.square(), "cpu")
    x = torch.ones(3, requires_grad=True)
    first, second = replayed(x), replayed(3 * x)
    assert twin.replayed == 1
    first.sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    second.sum().backward()
    assert x.grad.tolist() == [20, 20, 20]
    replayed(x)
    assert twin.replayed == 2


def test_a_network_that_is_replayed_goes_when_nobody_holds_it(twin, monkeypatch):
    monkeypatch.setenv("KNIFE_GRAPHS", "on")
    net = network()
    replay(net)
    net.forward.kind = "cpu"
    with torch.no_grad():
        net(*images())
    gone = ref(net)
    gc.disable()
    try:
        del net
        assert gone() is None
    finally:
        gc.enable()


def test_recordings_can_be_given_up(twin, monkeypatch):
    monkeypatch.setenv("KNIFE_GRAPHS", "on")
    net = network()
    forget(net)
    replay(net)
    net.forward.kind = "cpu"
    with torch.no_grad():
        first = net(*images())
        forget(net)
        assert net.forward.graphs == {}
        assert torch.equal(net(*images()), first)
    assert twin.recorded == 2


def test_what_looks_different_is_recorded_anew(twin):
    net = network()
    replayed = Replayed(net.forward, "cpu")
    x, t = images()
    others = [
        (torch.no_grad, x, t),
        (torch.no_grad, x[:1], t[:1]),
        (torch.no_grad, x.to(memory_format=torch.channels_last), t),
        (torch.enable_grad, x, t),
        (torch.enable_grad, x.clone().requires_grad_(), t),
        (lambda: torch.autocast("cpu", torch.bfloat16), x, t),
    ]
    for _ in range(2):
        for context, images_, levels in others:
            with context():
                wanted, found = net(images_, levels), replayed(images_, levels)
                assert torch.equal(found, wanted)
            if found.requires_grad:
                found.sum().backward()
    assert (twin.recorded, twin.replayed) == (len(others), 2 * len(others))


def test_shapes_beyond_the_limit_are_computed_as_ever(twin):
    replayed = Replayed(lambda x: 2 * x, "cpu")
    for size in range(1, MOST + 3):
        assert torch.equal(replayed(torch.ones(size)), torch.full((size,), 2.0))
    assert twin.recorded == MOST


def test_calls_elsewhere_and_of_more_than_tensors_are_left_alone(twin):
    replayed = Replayed(lambda x, factor=2: factor * x, "cpu")
    assert torch.equal(replayed(torch.ones(1), factor=3), torch.full((1,), 3.0))
    assert torch.equal(replayed(torch.ones(1), 4), torch.full((1,), 4.0))
    assert torch.equal(Replayed(lambda x: 2 * x)(torch.ones(1)), torch.full((1,), 2.0))  # on the CPU
    assert twin.recorded == 0


def test_a_network_that_cannot_be_recorded_is_called_as_ever(monkeypatch):
    def refuse(work, samples):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    replayed = Replayed(lambda x: 2 * x, "cpu")
    with pytest.warns(UserWarning, match="a network cannot be recorded .*not permitted"):
        replayed(torch.ones(1))
    assert torch.equal(replayed(torch.ones(1)), torch.full((1,), 2.0))
    assert replayed.refused == "RuntimeError: operation not permitted when stream is capturing"


def test_what_broke_a_recording_is_told_and_not_what_came_of_it(monkeypatch):
    def refuse(work, samples):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with pytest.warns(UserWarning, match="not permitted"):
        Replayed(lambda x: 2 * x, "cpu")(torch.ones(1))


def test_an_answer_that_is_no_tensor_is_not_recorded(twin):
    replayed = Replayed(lambda x: {"mean": x}, "cpu")
    with pytest.warns(UserWarning, match="answers with a dict"):
        assert torch.equal(replayed(torch.ones(1))["mean"], torch.ones(1))
    assert replayed.refused == "RuntimeError: the network answers with a dict, not a tensor"


def test_memory_that_runs_out_is_not_hidden(monkeypatch):
    def short(work, samples):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", short)
    with pytest.raises(torch.OutOfMemoryError):
        Replayed(lambda x: 2 * x, "cpu")(torch.ones(1))


def test_recording_is_asked_for_by_the_environment(monkeypatch):
    net = network()
    monkeypatch.delenv("KNIFE_GRAPHS", raising=False)
    replay(net)
    assert not isinstance(net.forward, Replayed)
    assert in_words().startswith("off")
    monkeypatch.setenv("KNIFE_GRAPHS", "on")
    for _ in range(2):
        replay(net)
    assert isinstance(net.forward, Replayed)
    assert not isinstance(net.forward.forward, Replayed)
    assert in_words().startswith("calls on a GPU are recorded")
    monkeypatch.setenv("KNIFE_GRAPHS", "yes")
    with pytest.raises(SettingsError, match="KNIFE_GRAPHS=yes: give off or on"):
        in_words()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_replays_what_it_computes(dtype):
    net = network().to("cuda", memory_format=torch.channels_last)
    replayed = Replayed(net.forward)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for seed in range(3):
        x, t = (one.cuda() for one in images(seed=seed))
        x = x.to(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            with torch.no_grad():
                torch.testing.assert_close(replayed(x, t), net(x, t), **close)
            found, wanted = (slope(sum_of_squares(f), x, t) for f in (replayed, net))
            torch.testing.assert_close(found, wanted, **close)
    assert replayed.refused is None
    assert len(replayed.graphs) == 2


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:KNIFE_GRAPHS=on")
def test_a_gpu_goes_on_after_a_network_that_cannot_be_recorded():
    x = torch.ones(2, device="cuda")
    stream = torch.cuda.current_stream()
    waits = Replayed(lambda x: x * x.sum().item())
    assert waits(x).tolist() == [2, 2]
    assert waits.refused
    assert torch.cuda.current_stream() == stream
    replayed = Replayed(lambda x: 2 * x)
    assert replayed(x).tolist() == [2, 2]
    assert replayed.refused is None
