"""The models on a GPU: what they compute there is what they compute on the CPU, eager, compiled and as CUDA graphs."""

import copy

import pytest
import timm
import torch
from accuracy import relative_rms

import vision  # noqa: F401  registers the models
from vision.models import mixer, vim
from vision.module import capture
from vision.tables import Kept

MODULES = ["efficient_vmamba", "local_vim", "local_vmamba", "mamba_nd", "plain_mamba", "vmamba", "vim"]
every_model = pytest.mark.parametrize("name", timm.list_models("test_*", module=MODULES))
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch):
    """cuDNN would round float32 inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """A model on the CPU, the same on the GPU, and images whose side windows don't tile."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    return model, copy.deepcopy(model).cuda(), torch.rand(2, 3, 96, 64)


def gradients(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    y = model(images)
    y.square().sum().backward()
    return {"y": y.detach().cpu()} | {n: p.grad.cpu() for n, p in model.named_parameters()}


@every_model
def test_numbers_and_gradients(name):
    cpu, gpu, images = pair(name)
    wanted, found = gradients(cpu, images), gradients(gpu, images.cuda())
    off = {n: relative_rms(found[n], wanted[n]) for n in wanted}
    assert max(off.values()) < 1e-3, sorted(off.items(), key=lambda item: -item[1])[:3]


@every_model
def test_autocast(name):
    cpu, gpu, images = pair(name)
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(gpu, images.cuda())
    wanted = gradients(cpu, images)
    assert all(t.isfinite().all() for t in found.values())
    assert relative_rms(found["y"].float(), wanted["y"]) < 0.05


@every_model
def test_cuda_graphs(name):
    _, model, images = pair(name)
    still = images.cuda()
    with torch.no_grad():
        wanted = model(still)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(still)
        y.zero_()
        graph.replay()
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("name", ["test_vmamba", "test_efficient_vmamba"])
def test_compiled(name):
    _, model, images = pair(name)
    other = copy.deepcopy(model)
    wanted = gradients(model, images.cuda())
    compiled = torch.compile(other, fullgraph=True)
    compiled(images.cuda()).square().sum().backward()
    off = {n: relative_rms(p.grad.cpu(), wanted[n]) for n, p in other.named_parameters()}
    assert max(off.values()) < 1e-3, sorted(off.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
def test_compiled_with_cuda_graphs(name):
    _, model, images = pair(name)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):  # warm up, record, replay
            y = compiled(images.cuda()).clone()
        torch.testing.assert_close(y, model(images.cuda()), rtol=1e-3, atol=1e-4)


def test_captured_training_is_training():
    _, model, images = pair("test_vmamba")
    captured = copy.deepcopy(model).train()
    capture(captured, images.cuda())
    for i in range(3):
        batch = images.roll(i, 0).cuda()
        wanted = gradients(model.train(), batch)
        found = gradients(captured, batch)
        assert max(relative_rms(found[n], wanted[n]) for n in wanted) < 1e-4
        for net in (model, captured):
            for p in net.parameters():
                p.data -= 1e-3 * p.grad
                p.grad = None
    one = images[:1].cuda()
    torch.testing.assert_close(captured.eval()(one), model.eval()(one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", [False, True])
def test_both_directions_at_once_are_the_same(graph, monkeypatch):
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_classes": 5}
    model = timm.create_model("vim_tiny_patch16_224", **sizes).cuda()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    assert mixer._leaves_idle(images.new_empty(2, 1025, 128))
    with monkeypatch.context() as patch:
        patch.setattr(mixer, "_leaves_idle", lambda x: False)
        wanted = gradients(model, images)
    model.zero_grad()
    if graph:
        capture(model, images)
    for _ in range(3):
        torch.testing.assert_close(gradients(model, images), wanted)
        model.zero_grad()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("side", [16, 64])  # one direction after the other, both at once
def test_the_way_without_gradients_is_the_same(side, autocast, monkeypatch):
    torch.manual_seed(0)
    sizes = {"img_size": side, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_classes": 5}
    model = timm.create_model("vim_tiny_patch16_224", **sizes).cuda().eval()
    images = torch.randn(5, 3, side, side, device="cuda")
    off = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        with monkeypatch.context() as patch:
            patch.setattr(vim.Vim, "infers", lambda self, hidden: False)
            wanted = model(images)
        assert model.infers(model.embed(images)[0])
        for _ in range(3):
            torch.testing.assert_close(model(images), wanted, **off)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(images)
        for _ in range(3):
            y.zero_()
            graph.replay()
            torch.testing.assert_close(y, wanted, **off)
        seen = []
        model.layers[1].register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
        torch.testing.assert_close(model(images), wanted, **off)
        assert seen == [5]  # who looks into a block sees the whole batch


def test_a_graph_reads_its_table_as_long_as_it_lives():
    kept = Kept(lambda n, device: torch.arange(n, device=device))
    device = torch.device("cuda", torch.cuda.current_device())
    kept(1000, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read, own = kept(1000, device).clone(), kept(2000, device).clone()
    kept.forget()
    others = [torch.full((1000,), -1, device=device) for _ in range(20)]
    graph.replay()
    assert read.tolist() == list(range(1000))
    assert own.tolist() == list(range(2000))
    assert kept(2000, device).tolist() == list(range(2000))  # not the graph's
    assert len(others) == 20
