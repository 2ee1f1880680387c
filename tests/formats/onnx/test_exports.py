"""Networks exported by both exporters of torch give the same logits as the original."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoorscan.ops.gates import suspects


class Residual(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, groups=after)
        self.bn2 = nn.BatchNorm2d(after)
        self.short = nn.Conv2d(before, after, 1, 2)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu6(self.bn1(self.conv1(x))))) + self.short(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Residual(6, 8), Residual(8, 12))
        self.gate = nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        x = self.blocks(F.hardswish(self.stem(x)))
        x = x * F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.groups = nn.GroupNorm(2, 8)
        self.prelu = nn.PReLU(8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.prelu(self.groups(self.conv(x)))
        left, right = x.chunk(2, 1)
        x = self.instance(torch.cat([F.elu(left), F.silu(right)], 1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = self.up(F.pad(x, (0, 1, 0, 1), mode="reflect"))[:, :, 1:, :-1]
        return F.log_softmax(self.head(x.amax((2, 3))), 1)


class ViT(nn.Module):
    """With the attention of torch (sequence first, images in the middle), or with one written out."""

    def __init__(self, own):
        super().__init__()
        self.own = own
        self.patch = nn.Conv2d(3, 24, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 24))
        self.places = nn.Parameter(torch.randn(1, 17, 24))
        self.norm = nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 4)
        self.qkv, self.mix = nn.Linear(24, 72), nn.Linear(24, 24)
        self.mlp = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        n = x.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.places
        y = self.norm(x)
        if self.own:
            q, k, v = self.qkv(y).reshape(n, 17, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
            weights = ((q @ k.transpose(-2, -1)) * 6**-0.5).softmax(-1)
            y = self.mix((weights @ v).transpose(1, 2).reshape(n, 17, 24))
        else:
            y = y.transpose(0, 1)
            y = self.attention(y, y, y, need_weights=False)[0].transpose(0, 1)
        x = x + y
        return self.head((x + self.mlp(x))[:, 0])


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(512, 20),
        nn.Tanh(),
        nn.Linear(20, 5),
        nn.Softmax(1),
    )


MODELS = {
    "plain": plain,
    "resnet": ResNet,
    "mixed": Mixed,
    "vit": lambda: ViT(False),
    "own-vit": lambda: ViT(True),
}


def made(name):
    model = MODELS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def check(model, loaded):
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(loaded.network(x), model(x), atol=1e-5)
    assert loaded.input_shape == (3, 32, 32) and loaded.layout == "NCHW"
    assert suspects(loaded.network).decisions == ()


@pytest.mark.parametrize("batch", [None, 1, 4])
@pytest.mark.parametrize("opset", [9, 11, 13, 17, 20])
@pytest.mark.parametrize("name", MODELS)
def test_by_torchscript(export, load, name, opset, batch):
    if opset < 17 and name == "vit":
        pytest.skip("the exporter cannot write this attention before opset 14")
    if (name, opset) == ("mixed", 9):
        pytest.skip("opset 9 has no bilinear resizing as torch does it")
    model = made(name)
    check(model, load(export(model, opset=opset, batch=batch)))


@pytest.mark.slow
@pytest.mark.parametrize("opset, batch", [(None, None), (None, 1), (18, None), (23, None), (24, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_by_dynamo(export, load, name, opset, batch):
    model = made(name)
    check(model, load(export(model, dynamo=True, opset=opset, batch=batch)))


def test_layers_are_named_as_in_the_file(export, load):
    loaded = load(export(made("resnet")))
    layers = {name for name, module in loaded.network.named_modules() if list(module.parameters())}
    assert {"stem", "gate", "head", "blocks_0_short", "blocks_blocks_1_conv2"} <= layers
    assert isinstance(loaded.network.head, nn.Linear) and isinstance(loaded.network.gate, nn.Conv2d)
    assert loaded.num_classes == 7


def test_batch_norm_that_the_exporter_keeps(export, load):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 3)).eval()
    nn.init.uniform_(model[2].running_var, 0.5, 2.0)
    loaded = load(export(model))
    (norm,) = (module for module in loaded.network.modules() if isinstance(module, nn.BatchNorm2d))
    assert torch.equal(norm.running_var, model[2].running_var) and norm.weight.requires_grad
