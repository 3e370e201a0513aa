"""Recorded steps, by the twin of a CUDA graph in `tape.py`."""

import gc
from dataclasses import replace
from functools import partial
from weakref import ref

import pytest
import torch
from tape import Twin
from torch import Tensor, nn

from knife import graphs
from knife.ddim import SOLVERS, Guidance, balanced, called, decode, decode_with_control, encode
from knife.devices import precision
from knife.errors import SettingsError, TaskError
from knife.graphs import MOST, Recorder, form, in_words, mapped, player, tensors_in
from knife.schedule import Schedule, path
from knife.spec import preset


@pytest.fixture
def twin(monkeypatch) -> Twin:
    """Record by a twin."""
    return Twin(monkeypatch)


def network(build: str = "build_unet", outputs: int = 4) -> nn.Module:
    """Return a small network whose answers depend on everything it is given."""
    torch.manual_seed(0)
    spec = replace(preset("small-64").spec("diffusion", ("a", "b")), size=(16, 16))
    net = getattr(spec, build)(outputs)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.05)
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def images(count: int = 2, seed: int = 0) -> Tensor:
    """Return images of 16 x 16 pixels."""
    drawn = torch.randn(count, 2, 16, 16, generator=torch.Generator().manual_seed(seed))
    return drawn.to(memory_format=torch.channels_last)


def halved(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Ask a network under autocast."""
    with precision("cpu", "bfloat16"):
        return net(x, t)


def near(net, target: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return a score: how near a network's answer is to a target, [N]."""
    return -0.5 * (net(x, t)[:, 0].float() - target).square()


def edited(nets, x: Tensor, targets: Tensor, play, solver: str = "ab2", ways: int = 0, steps: int = 4):
    """Encode images, and decode them with a control towards targets, in one of several ways."""
    net, guide = nets
    levels, walked = path(400, steps, 1.5), {"solver": SOLVERS[solver], "play": play}
    noisy, last = encode(net, x, Schedule(), levels, **walked)
    scores = [partial(near, guide, targets), partial(near, guide, -targets)]
    guidance = [
        [Guidance(scores[0], balanced(torch.full((len(x),), 0.3, dtype=torch.float64), 0.01), fresh=True)],
        [Guidance(scores[0], 2.0, high=300.0)],
        [Guidance(scores[0], 1.5), Guidance(scores[1], balanced(0.1, 0.01), low=50)],
    ][ways]
    clamp = (-3.0, 3.0) if ways else None
    both = decode_with_control(net, noisy, Schedule(), levels, guidance, clamp, before=last, **walked)
    alone = decode(net, noisy, Schedule(), levels, guidance, before=last, **walked)
    return (noisy, *last, *both, alone)


@pytest.mark.parametrize("solver", [*SOLVERS])
@pytest.mark.parametrize("ways", [0, 1, 2], ids=["balanced under fresh noise", "the paper's", "two that pull"])
def test_replayed_walks_are_bit_for_bit_those_that_are_called(twin, solver: str, ways: int):
    nets, recorder, recorded = (network(), network("build_encoder", 1)), Recorder("cpu"), []
    for seed in range(3):  # other images, targets, strengths and memory each time, the same recordings
        x, targets = images(seed=seed), torch.tensor([1.0, -2.0]) * (seed + 1)
        wanted = edited(nets, x, targets, called, solver, ways)
        found = edited(nets, x, targets, recorder, solver, ways)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
        recorded.append(twin.recorded)
    assert recorded == [recorded[0]] * 3
    assert recorded[0] <= 6
    assert twin.replayed == 3 * 12
    assert len({*map(id, twin.pools)}) == 1


def test_in_bfloat16_too(twin):
    nets, recorder = tuple(partial(halved, net) for net in (network(), network("build_encoder", 1))), Recorder("cpu")
    for seed in range(2):
        x, targets = images(seed=seed), torch.tensor([1.0, -2.0])
        for one, other in zip(edited(nets, x, targets, recorder), edited(nets, x, targets, called), strict=True):
            assert torch.equal(one, other)


def test_steps_of_all_levels_share_a_recording(twin):
    recorder, net = Recorder("cpu"), network()
    encode(net, images(), Schedule(), path(400, 30), solver=SOLVERS["ab2"], play=recorder)
    assert (twin.recorded, twin.replayed) == (2, 30)  # the first step knows no point before


def test_what_a_replay_returns_outlives_the_next(twin):
    recorder, x = Recorder("cpu"), torch.ones(3)
    first = recorder(torch.mul, x, torch.tensor(2.0))
    recorder(torch.mul, 5 * x, torch.tensor(2.0))
    assert first.tolist() == [2, 2, 2]
    assert recorder(lambda x: (x, x + 1), x)[0] is x, "what is given back is not copied"


def test_arguments_that_stay_are_not_copied_again_unless_they_change(twin, monkeypatch):
    copied, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda own, given: copied.append(len(own)) or copy(own, given))
    recorder, x, y = Recorder("cpu"), torch.ones(3), torch.ones(3)
    assert recorder(torch.add, x, y).tolist() == [2, 2, 2]
    assert recorder(torch.add, x + 1, y).tolist() == [3, 3, 3]
    y.mul_(3)
    assert recorder(torch.add, x, y).tolist() == [4, 4, 4]
    with torch.inference_mode():
        z = torch.ones(3)
        for value in (1, 2):  # whose changes are not counted
            assert recorder(torch.add, x, z.fill_(value)).tolist() == [1 + value] * 3
    assert copied == [2, 1, 2, 1, 1]


def test_what_looks_different_is_recorded_anew(twin):
    recorder, net = Recorder("cpu"), network()
    x, t = images(), torch.tensor([5, 700])
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    others = [
        (torch.no_grad, net, x, t),
        (torch.no_grad, net, x[:1], t[:1]),
        (torch.no_grad, net, x.contiguous(), t),
        (torch.no_grad, net, x, t.float()),
        (torch.no_grad, network(), x, t),
        (autocast, net, x, t),
    ]
    for _ in range(2):
        for context, work, *arguments in others:
            with context():
                torch.testing.assert_close(recorder(work, *arguments), work(*arguments), rtol=0.02, atol=0.02)
    assert (twin.recorded, twin.replayed) == (len(others), 2 * len(others))


def test_the_forms_used_last_are_remembered(twin):
    recorder, double = Recorder("cpu"), partial(torch.mul, torch.tensor(2.0))
    for size in (*range(1, MOST + 1), 1, MOST + 1, 1):
        assert torch.equal(recorder(double, torch.ones(size)), torch.full((size,), 2.0))
    assert len(recorder.recordings) == MOST
    assert twin.recorded == MOST + 1
    recorder(double, torch.ones(2))
    assert twin.recorded == MOST + 2, "the one not used for longest went"
    recorder.forget()
    assert (recorder.recordings, recorder.pool) == ({}, None)


def test_what_is_given_up_goes(twin):
    recorder, net = Recorder("cpu"), network()
    recorder(net, images(), torch.tensor([5, 700]))
    gone = ref(net)
    gc.disable()
    try:
        del net
        assert gone() is not None, "its weights are read"
        recorder.forget()
        assert gone() is None
    finally:
        gc.enable()


def test_calls_elsewhere_and_those_that_learn_are_left_alone(twin):
    assert torch.equal(Recorder()(torch.neg, torch.ones(1)), -torch.ones(1))  # on the CPU
    recorder = Recorder("cpu")
    x = torch.ones(1, requires_grad=True)
    recorder(torch.neg, x).backward()
    assert x.grad.tolist() == [-1]
    assert recorder(lambda: 3) == 3
    assert twin.recorded == 0


def test_a_work_that_cannot_be_recorded_is_called_as_ever(twin):
    def waits(x: Tensor) -> Tensor:
        return x * x.sum().item()

    def waits_in_a_plugin(x: Tensor) -> Tensor:
        try:
            return waits(x)
        except RuntimeError as error:
            raise TaskError("task age: its hook guide failed") from error

    recorder = Recorder("cpu")
    assert recorder(torch.neg, torch.ones(2)).tolist() == [-1, -1]
    for work in (waits, waits_in_a_plugin):
        recorder.refused = None
        with pytest.warns(UserWarning, match="a step cannot be recorded .*not permitted"):
            assert recorder(work, torch.ones(2)).tolist() == [2, 2]
        assert recorder(work, torch.ones(2)).tolist() == [2, 2]
        assert recorder.refused == "RuntimeError: operation not permitted when stream is capturing"
    assert recorder(torch.neg, torch.ones(2)).tolist() == [-1, -1]
    assert twin.replayed == 2, "what is recorded is replayed still"


def test_what_broke_a_recording_is_told_and_not_what_came_of_it(twin, monkeypatch):
    def refuse(work, device, pool):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(graphs, "capture", refuse)
    with pytest.warns(UserWarning, match="not permitted"):
        Recorder("cpu")(torch.neg, torch.ones(1))


def test_what_is_wrong_with_a_work_itself_is_not_hidden(twin):
    def broken(x: Tensor) -> Tensor:
        raise TaskError("task age: its hook guide returned 3")

    recorder = Recorder("cpu")
    with pytest.raises(TaskError, match="returned 3"):
        recorder(broken, torch.ones(1))
    assert recorder.refused is None


def test_memory_that_runs_out_is_not_hidden(twin, monkeypatch):
    def short(work, device, pool):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "capture", short)
    with pytest.raises(torch.OutOfMemoryError):
        Recorder("cpu")(torch.neg, torch.ones(1))


def test_arguments_are_looked_into_and_put_together_again():
    guidance = Guidance(partial(near, torch.neg, torch.ones(2)), 0.5)
    value = (guidance, [torch.zeros(1), None], {"not": "looked into"}, partial(torch.add, alpha=torch.ones(3)))
    assert [len(x) for x in tensors_in(value)] == [2, 1, 3]
    twice = mapped(lambda x: torch.cat([x, x]), value)
    assert [len(x) for x in tensors_in(twice)] == [4, 2, 6]
    assert isinstance(twice[0], Guidance)
    assert twice[0].score.func is near
    assert (twice[1][1], twice[2], twice[3].func) == (None, value[2], torch.add)
    assert form(value) == form(mapped(torch.clone, value)) != form(twice)
    assert hash(form(value)) == hash(form(mapped(torch.clone, value)))
    assert form(value) != form((*value[:2], {**value[2]}, value[3])), "what cannot be hashed is equal to itself alone"
    assert form((guidance,)) != form((guidance._replace(scale=0.6),))


def test_recording_is_asked_for_by_the_environment(monkeypatch):
    monkeypatch.delenv("KNIFE_GRAPHS", raising=False)
    assert player() is called
    assert in_words().startswith("off")
    monkeypatch.setenv("KNIFE_GRAPHS", "on")
    assert isinstance(player(), Recorder)
    assert in_words().startswith("steps on a GPU are recorded")
    monkeypatch.setenv("KNIFE_GRAPHS", "yes")
    with pytest.raises(SettingsError, match="KNIFE_GRAPHS=yes: give off or on"):
        in_words()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ways", [0, 1, 2])
def test_a_gpu_replays_what_it_computes(dtype: str, ways: int):
    def answer(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        with precision("cuda", dtype):
            return net(x, t)

    nets = tuple(partial(answer, net.cuda()) for net in (network(), network("build_encoder", 1)))
    recorder, close = Recorder(), {"rtol": 1e-3, "atol": 1e-3} if dtype == "float32" else {"rtol": 0.1, "atol": 0.1}
    for seed in range(3):
        x, targets = images(seed=seed).cuda(), torch.tensor([1.0, -2.0], device="cuda") * (seed + 1)
        found, wanted = (edited(nets, x, targets, play, ways=ways) for play in (recorder, called))
        torch.testing.assert_close(found, wanted, **close)
    assert recorder.refused is None
    assert recorder.recordings


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:KNIFE_GRAPHS=on")
def test_a_gpu_goes_on_after_a_work_that_cannot_be_recorded():
    x = torch.ones(2, device="cuda")
    stream = torch.cuda.current_stream()
    recorder = Recorder()
    assert recorder(lambda x: x * x.sum().item(), x).tolist() == [2, 2]
    assert recorder.refused
    assert torch.cuda.current_stream() == stream
    again = Recorder()
    assert again(torch.neg, x).tolist() == [-1, -1]
    assert again.refused is None
