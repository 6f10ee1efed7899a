"""Residual and ODE networks of `flashode.nn`: what they have in common, and what they cost."""

import pytest
import torch
from torch import nn

from flashode import ArgumentError, ArgumentTypeError
from flashode.nn import ConvField, ODEBlock, ODENet, ResidualBlock, ResNet, RKNet

F64 = torch.float64


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_a_residual_block_is_two_preactivated_convolutions_and_a_skip():
    block = ResidualBlock(6).double()
    y = torch.randn(2, 6, 5, 5, dtype=F64)
    expected = y
    for norm, conv in zip(block.field.norms, block.field.convs):
        expected = nn.functional.group_norm(expected, 2, norm.weight, norm.bias)
        expected = nn.functional.conv2d(expected.relu(), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(block(y), y + expected)


@pytest.mark.parametrize("blocks", [1, 3])
def test_residual_blocks_that_share_weights_are_eulers_method(blocks):
    field = ConvField(4, time=False).double()
    shared = ResidualBlock(4).double()
    shared.load_state_dict({f"field.{name}": value for name, value in field.state_dict().items()})
    residual = nn.Sequential(*[shared] * blocks)
    euler = ODEBlock(field, (0.0, float(blocks)), method="euler", options={"step_size": 1.0})
    y = torch.randn(2, 4, 5, 5, dtype=F64)
    ours, theirs = euler(y), residual(y)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    assert euler.nfe_forward == blocks
    gradients = torch.autograd.grad(ours.sum(), list(field.parameters()))
    expected = torch.autograd.grad(theirs.sum(), list(shared.parameters()))
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_steps_of_rk_net_are_even_and_end_at_one(steps):
    body = RKNet(steps, channels=4).body.double()
    y = torch.randn(2, 4, 5, 5, dtype=F64)
    expected = y
    for step in range(steps):
        expected = expected + body.field(torch.tensor(step / steps, dtype=F64), expected) / steps
    torch.testing.assert_close(body(y), expected, rtol=1e-12, atol=1e-12)
    assert body.nfe_forward == steps


def test_parameters_are_as_few_as_published():
    """For MNIST: 0.6 million in a ResNet with six blocks, 0.22 in RK-Net and ODE-Net (Chen et al. 2018, table 1)."""
    block = parameters(ResidualBlock(64))
    assert 140_000 < parameters(ResNet(1)) < 155_000
    assert parameters(ResNet(6)) == parameters(ResNet(1)) + 5 * block
    assert 500_000 < parameters(ResNet(6)) < 600_000
    # An ODE costs a block and, in both convolutions, a channel for the time.
    assert parameters(RKNet()) == parameters(ODENet()) == parameters(ResNet(1)) + 2 * 64 * 9 < 220_000


@pytest.mark.parametrize("make", [ResNet, RKNet, ODENet])
def test_networks_have_the_same_stem_and_head(make):
    net = make(channels=8, in_channels=3, classes=5)
    x = torch.randn(2, 3, 28, 28)
    assert net.stem(x).shape == net.body(net.stem(x)).shape == (2, 8, 7, 7)
    scores = net(x)
    assert scores.shape == (2, 5)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert parameters(net.stem) == parameters(ResNet(channels=8, in_channels=3, classes=5).stem)


@pytest.mark.parametrize("steps", [1, 6, 49])
def test_rknet_takes_the_steps_asked_for(steps):
    for method, calls in (("euler", 1), ("rk4", 4)):
        net = RKNet(steps, method=method, channels=2)
        net(torch.randn(1, 1, 8, 8)).sum().backward()
        assert net.body.nfe_forward == steps * calls and net.body.nfe_backward == 0


def test_odenet_solves_backwards_for_its_gradients():
    x, gradients = torch.randn(2, 1, 8, 8, dtype=F64), []
    backwards = ODENet(channels=4, rtol=1e-9, atol=1e-9).double()
    through = ODENet(channels=4, rtol=1e-9, atol=1e-9, adjoint=None).double()
    through.load_state_dict(backwards.state_dict())
    for net in (backwards, through):
        net.body.field.activation = torch.tanh  # a kink costs either gradient more than the tolerance
        gradients.append(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))
    assert backwards.body.nfe_backward > 0 == through.body.nfe_backward
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0, 2.0, True, None, "5", 10**30])
def test_sizes_are_whole_numbers(size):
    for net, name in ((RKNet, "steps"), (ResNet, "blocks")):
        for name in (name, "channels", "in_channels", "classes"):
            with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{name} must be"):
                net(**{name: size})
