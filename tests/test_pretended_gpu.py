"""The pretended GPU keeps the rules that torch has on a machine with one."""

import pytest
import torch
from ingot.engines.weights import of_tensor
from pretended_gpu import OnGpu, pretended_gpu

HOST = torch.arange(12.0).view(3, 4)


@pytest.fixture(params=[False, True], ids=["grad", "inference"])
def gpu(request):
    with pretended_gpu() as gpu, torch.inference_mode(request.param):
        yield gpu


def test_what_lies_on_the_device(gpu):
    x = HOST.to("cuda")
    with torch.device("cuda"):
        inside = [torch.zeros(2), torch.tensor([1, 2]), torch.arange(3), torch.full((2,), 1.0)]
    there = [
        x, HOST.cuda(), HOST.to(x), HOST.to(device=torch.device("cuda", 0), dtype=torch.half), *inside,
        torch.ones(2, device="cuda"), torch.zeros(2, device=x.device), torch.tensor(1, device="cuda"),
        torch.ones_like(x), x.new_zeros(2), x + 1, x[0], x.T, x @ x.T, x.view(-1)[2:5], x.sum(), x.half(), *x.split(2),
        torch.cat([x, x]), torch.nn.functional.linear(x, x), x.where(x > 0, 1.0), x.max(0).indices,
        torch.linalg.qr(x, mode="r").R,
    ]  # fmt: skip
    for y in there:
        assert type(y) is OnGpu and y.is_cuda and not y.is_cpu and y.device == torch.device("cuda:0"), y
    for y in (x.cpu(), x.to("cpu"), x.to(HOST), torch.zeros_like(x, device="cpu"), HOST + 1, torch.zeros(2)):
        assert type(y) is torch.Tensor and y.device.type == "cpu"
    assert torch.cuda.is_available() and x.to("cuda") is x and x.float() is x
    assert x.tolist() == HOST.tolist() and x[1, 2].item() == 6 == float(x[1, 2]) and x.equal(x.clone())


def test_numbers_are_changed_where_they_lie(gpu):
    host, x = HOST.clone(), HOST.to("cuda")
    y = x.view(-1)
    assert x.add_(1) is x and torch.add(y, 1, out=y) is y and type(y) is OnGpu
    x[0] = 7
    y[4:6] = torch.tensor([1.0, 2.0])  # a copy, which may come from the host
    x[1, 2:].copy_(torch.ones(2))
    assert x.tolist() == [[7, 7, 7, 7], [1, 2, 1, 1], [10, 11, 12, 13]] and torch.equal(host, HOST), "a copy"
    host.copy_(x)
    assert type(host) is torch.Tensor and host.tolist() == x.tolist()


def test_what_torch_refuses(gpu):
    x, host, one = HOST.cuda(), HOST.clone(), torch.tensor(2.0)
    for call in (
        lambda: x + host, lambda: host[0] * x, lambda: x.add_(host), lambda: host.add_(x),
        lambda: one.clone().add_(x.sum()),
        lambda: x @ host.T, lambda: torch.nn.functional.linear(host, x), lambda: torch.cat([x, host]),
        lambda: torch.stack([x.sum(), one]), lambda: torch.where(x > 0, x, host), lambda: x.equal(host),
        lambda: host[torch.tensor([0], device="cuda")], lambda: x.index_select(0, torch.tensor([0])),
        lambda: x.gather(0, torch.zeros(1, 4, dtype=torch.long)), lambda: x.__setitem__(torch.tensor([0]), host[:1]),
        lambda: torch.add(x, 1, out=host),
        lambda: torch.add(x[0, 0], 1, out=one.clone()), lambda: torch.maximum(x, host), lambda: x.clamp(min=host),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="all tensors to be on the same device, but found .* cuda:0 and cpu"):
            call()
    for call in (x.numpy, x.__array__, of_tensor("x", x).load):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            call()


def test_what_torch_allows(gpu):
    x, one = HOST.cuda(), torch.tensor(2.0)
    for y in (
        x + one, one * x, one + x.sum(), x.where(x > 3, one), x.clamp(min=one), torch.maximum(x, one),
        x.masked_fill(x > 3, one), x[torch.tensor([0, 2])], x[torch.tensor([0]), torch.tensor([1], device="cuda")],
    ):  # fmt: skip
        assert type(y) is OnGpu
    assert (x + one).tolist() == (HOST + 2).tolist() and x[torch.tensor([0, 2])].tolist() == HOST[[0, 2]].tolist()
    x[torch.tensor([1])] = one
    x[0] = one
    assert x[:2].tolist() == [[2.0] * 4] * 2 and (x.numpy(force=True) == x.cpu().numpy()).all()


def test_what_is_alive_is_counted():
    with pretended_gpu() as gpu:
        x = torch.zeros(256, device="cuda")
        y = x.view(2, -1)[1]
        assert gpu.alive == gpu.peak == 1024
        z = x + 1
        del x, z
        assert gpu.alive == 1024 and gpu.peak == 2048, "a view keeps what it looks at"
        kept = y
        del y
    with pytest.raises(AssertionError, match="outside of it"):
        kept + 1
    assert not torch.cuda.is_available() or torch.zeros(1, device="cuda").is_cuda
