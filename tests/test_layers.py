"""Convolutions of frozen networks: the same answers and gradients as torch's, and torch's wherever they do not pay."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from knife import layers, ops
from knife.bench import operations
from knife.layers import Convolution, Linear
from knife.unet import Architecture, Encoder, UNet, attend

ARCH = Architecture(32, (1, 2), res_blocks=1, attention=(2,), heads=2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Tell the shapes that were convolved by fewer products."""
    if ops.status().path != "native":
        pytest.skip(ops.status().reason)
    seen = list[torch.Size]()

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(x.shape)
        return ops.winograd(x, weight, bias)

    monkeypatch.setattr(layers, "winograd", spy)
    return seen


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tell what is made of weights."""
    made = list[str]()
    once = layers.Made.once

    def spy(self, what: str, make):
        return once(self, what, lambda: made.append(what) or make())

    monkeypatch.setattr(layers.Made, "once", spy)
    return made


def frozen(channels: int = 32, outputs: int = 48) -> tuple[Convolution, nn.Conv2d]:
    """Build a frozen convolution, and torch's own with the same weights."""
    torch.manual_seed(0)
    ours, plain = Convolution(channels, outputs), nn.Conv2d(channels, outputs, 3, padding=1)
    plain.load_state_dict(ours.state_dict())
    return ours.requires_grad_(False), plain.requires_grad_(False)


def gradient(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = net(x)
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), x)[0]


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 13, 10), (5, 8, 8)])
def test_answers_and_gradients_are_those_of_torch(calls: list[torch.Size], shape: tuple[int, int, int]) -> None:
    ours, plain = frozen()
    for x in (torch.randn(shape[0], 32, *shape[1:]), torch.randn(2, 32, 20, 12)):  # packed weights suit any size
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient(ours, x), gradient(plain, x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 6, "an answer, and an answer and a gradient, each twice"


def test_without_a_gradient_nothing_is_recorded(calls: list[torch.Size]) -> None:
    ours, _ = frozen()
    with torch.no_grad():
        assert ours(torch.randn(1, 32, 16, 16, requires_grad=True)).grad_fn is None
    assert calls


def test_a_gradient_is_not_differentiated_again(calls: list[torch.Size]) -> None:
    ours, _ = frozen()
    x = torch.randn(1, 32, 16, 16, requires_grad=True)
    slope = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_the_state_is_that_of_a_torch_convolution(calls: list[torch.Size]) -> None:
    ours, plain = frozen()
    ours(torch.randn(1, 32, 16, 16))
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert isinstance(ours, nn.Conv2d)


def changes() -> Iterator[tuple[str, object]]:
    """Yield ways in which frozen weights come to be others."""
    yield "in place", lambda net, new: net.weight.copy_(new)
    yield "loaded", lambda net, new: net.load_state_dict({"weight": new, "bias": net.bias})
    yield "replaced", lambda net, new: setattr(net, "weight", nn.Parameter(new, requires_grad=False))
    yield "data", lambda net, new: setattr(net.weight, "data", new)


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in changes()])
def test_weights_that_change_are_transformed_anew(calls: list[torch.Size], change) -> None:
    ours, plain = frozen()
    x = torch.randn(1, 32, 16, 16)
    gradient(ours, x)
    new = torch.randn_like(ours.weight)
    change(ours, new.clone())
    plain.weight.copy_(new)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient(ours, x), gradient(plain, x), rtol=1e-4, atol=1e-4)
    assert len(ours.made[1]) == 2, "the old ones are dropped"


def test_a_network_that_learns_is_left_to_torch(calls: list[torch.Size]) -> None:
    torch.manual_seed(0)
    ours = Convolution(32, 32)
    x = torch.randn(1, 32, 16, 16)
    ours(x).square().sum().backward()
    with torch.no_grad():
        ours(x)
    assert ours.weight.grad is not None
    assert not calls
    assert not ours.made[1]


UNSUITED = {"six tiles": (32, 32, 8, 12), "few channels": (16, 32, 32, 32), "odd channels": (40, 32, 32, 32)}


@pytest.mark.parametrize("many", [1, 2**18], ids=["packed", "by torch"])
@pytest.mark.parametrize(("channels", "outputs", "height", "width"), UNSUITED.values(), ids=UNSUITED)
def test_where_fewer_products_do_not_suit_large_weights_are_packed(
    calls, halved: list[str], monkeypatch: pytest.MonkeyPatch, channels: int, outputs: int, height, width, many: int
) -> None:
    if not layers.has_packing():
        pytest.skip("this torch or processor packs no weights")
    monkeypatch.setattr(layers, "MANY", many)
    ours, plain = frozen(channels, outputs)
    x = torch.randn(1, channels, height, width)
    for _ in range(2):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient(ours, x), gradient(plain, x), rtol=1e-5, atol=1e-5)
    assert halved == (["packed torch.float32", "packed torch.float32 back"] if many == 1 else [])
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions_are_left_to_torch(calls: list[torch.Size], halved: list[str], dtype: torch.dtype) -> None:
    ours, plain = (net.to(dtype) for net in frozen())
    x = torch.randn(1, 32, 32, 32, dtype=dtype)
    assert torch.equal(ours(x), plain(x))
    assert not calls
    assert not halved


def test_without_kernels_no_products_are_saved(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "status", lambda device: ops.native.Status(device, "torch", "not compiled"))
    ours, plain = frozen()
    x = torch.randn(1, 32, 16, 16)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    assert not calls


def test_autocast_takes_no_fewer_products(calls: list[torch.Size]) -> None:
    ours, _ = frozen()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(1, 32, 16, 16)).dtype == torch.bfloat16
    assert not calls


FORMS = {"three wide": (3, 1), "one wide": (1, 1), "halving": (3, 2)}


@pytest.mark.parametrize(("width", "stride"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("packed", [True, False])
def test_under_autocast_frozen_weights_are_halved_once(monkeypatch, halved, width: int, stride: int, packed) -> None:
    if packed and not layers.has_packing():
        pytest.skip("this torch or processor packs no weights")
    if not packed:
        monkeypatch.setattr(layers, "packs", lambda: False)
    torch.manual_seed(0)
    ours, plain = Convolution(32, 48, width, stride), nn.Conv2d(32, 48, width, stride, width // 2)
    plain.load_state_dict(ours.state_dict())
    for net in (ours, plain):
        net.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(1, 32, 16, 16), torch.randn(3, 32, 12, 20).to(memory_format=torch.channels_last)):
            for x_as_given in (x, x.bfloat16()):
                got, wanted = ours(x_as_given), plain(x_as_given)
                assert got.dtype == torch.bfloat16
                torch.testing.assert_close(got, wanted, rtol=0.01, atol=0.01)
                descents = [gradient(net, x_as_given) for net in (ours, plain)]
                assert descents[0].dtype == x_as_given.dtype
                torch.testing.assert_close(*descents, rtol=0.01, atol=0.01)
    assert len(halved) == len({*halved})
    assert ("packed torch.bfloat16 back" in halved) == (packed and stride == 1)


def test_weights_that_change_are_halved_anew(halved: list[str]) -> None:
    ours, plain = frozen()
    x = torch.randn(1, 32, 8, 8)
    for bias in (ours.bias, ours.weight):
        with torch.autocast("cpu", torch.bfloat16):
            ours(x)
        bias.mul_(2)
    plain.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), plain(x), rtol=0.01, atol=0.01)


def test_another_weight_in_the_place_of_one_that_is_gone_is_another() -> None:
    ours, plain = frozen()
    x = torch.randn(1, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):  # the allocator gives memory that is free again
            weights = {"weight": torch.randn_like(ours.weight), "bias": torch.randn(48)}
            got, wanted = (torch.func.functional_call(net, weights, (x,)) for net in (ours, plain))
            torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.1)
            del weights


@pytest.mark.parametrize("layer", [Linear(24, 40), Convolution(32, 32), Convolution(32, 32, stride=2)], ids=repr)
def test_what_is_made_in_inference_mode_serves_gradients_too(layer: nn.Module) -> None:
    layer.requires_grad_(False)
    x = torch.randn(2, 3, 24) if isinstance(layer, Linear) else torch.randn(1, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            layer(x)
        assert gradient(layer, x).any()


@pytest.mark.parametrize("layer", [Linear(24, 40), Convolution(32, 32)], ids=repr)
def test_a_bias_that_learns_beside_frozen_weights_has_a_gradient(layer: nn.Module) -> None:
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 3, 24) if isinstance(layer, Linear) else torch.randn(1, 32, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert layer.bias.grad is not None


def test_in_bfloat16_an_images_bits_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    net = UNet(ARCH, 4, 8)
    for parameter in net.parameters():
        parameter.data.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    net.requires_grad_(False).eval()
    x, t = torch.randn(17, 4, 32, 32).to(memory_format=torch.channels_last), torch.arange(17) * 50
    with torch.autocast("cpu", torch.bfloat16):
        together = net(x, t)
        for part in (slice(0, 1), slice(3, 5), slice(4, 13)):
            assert torch.equal(net(x[part], t[part]), together[part])


def test_layers_that_learn_are_left_to_autocast(halved: list[str]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Convolution(32, 32), nn.Flatten(), Linear(32 * 64, 3))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(1, 32, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not halved


@pytest.mark.parametrize("shape", [(2,), (64,), (3, 5)])
def test_linear_maps_under_autocast_answer_as_torch_does(halved: list[str], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours, plain = Linear(24, 40), nn.Linear(24, 40)
    plain.load_state_dict(ours.state_dict())
    for net in (ours, plain):
        net.requires_grad_(False)
    x = torch.randn(*shape, 24)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = ours(x), plain(x)
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
        torch.testing.assert_close(gradient(ours, x), gradient(plain, x), rtol=0.02, atol=0.02)
    assert halved == (["halved", "halved bias"] if len(shape) > 1 else [])
    assert torch.equal(ours(x), plain(x))


def test_operations_are_counted_alike_however_they_are_done() -> None:
    ours, _ = frozen()
    x = torch.randn(2, 32, 16, 16)
    for halved in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            ours(x)  # weights are made ready
            assert operations(lambda: ours(x)) == 2 * 2 * 9 * 32 * 48 * 16 * 16


def test_attention_has_the_same_gradient_in_bfloat16() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 3, 16, 8)
    wanted, got = gradient(lambda x: attend(*x), x), gradient(lambda x: attend(*x.bfloat16()).float(), x)
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("batch", [1, 3])
def test_networks_answer_as_with_torch(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    torch.manual_seed(0)
    nets = [UNet(ARCH, 4, 8), Encoder(ARCH, 4, 1, (32, 32))]
    x, t = torch.randn(batch, 4, 32, 32), torch.full((batch,), 400)
    for net in nets:
        for parameter in net.parameters():
            parameter.data.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
        net.requires_grad_(False).eval()
        twin = copy.deepcopy(net)
        answer, slope = net(x, t), gradient(lambda x, net=net: net(x, t), x)
        count = len(calls)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "is_ready", lambda x, convolution: False)
            plain = twin(x, t), gradient(lambda x, twin=twin: twin(x, t), x)
        assert count == len(calls) > 0
        for got, wanted in zip((answer, slope), plain, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
        calls.clear()
