"""What is exported to ONNX: few nodes, and in onnxruntime the results of eager mode, for inputs of any size."""
import collections
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from support.trained_like import trained_like_
from torch import nn

from timm_dyacts import (
    BipolarMaxPool2d,
    BPReLU,
    BReLU,
    DyReLU,
    GlobalSoftPool2d,
    SoftPool1d,
    SoftPool2d,
    SoftPool2dSame,
    SoftPool3d,
    convert,
)
from timm_dyacts.data.digits import DigitsDataset

pytest.importorskip('onnxscript')
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

ANY = torch.export.Dim.DYNAMIC


def to_onnx(module, x, dims):
    """Export with these dimensions of any size."""
    program = torch.onnx.export(
        module, (x,), dynamo=True, verbose=False, dynamic_shapes=({dim: ANY for dim in dims},))
    return program.model_proto


def runtime(graph):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def perturbed(module):
    """With parameters that are neither zero nor what they start as."""
    generator = torch.Generator().manual_seed(0)
    for param in module.parameters():
        nn.init.normal_(param, 0, 0.3, generator=generator)
    return module.eval()


def noise(*shape, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# What the graph of each operator consists of, at most, if only the number of samples is not fixed
HYPER = dict(ReduceMean=1, Gemm=2, Relu=1, Sigmoid=1, Reshape=1, Mul=1, Add=1, Split=1)
PIECES = dict(Mul=2, Add=2, Max=1)
ATTENTION = dict(Reshape=2, Unsqueeze=1, MatMul=1, Add=1, Div=2, ReduceMax=1, Sub=1, Exp=1, ReduceMean=1, Clip=1, Mul=1)
# Four elements: taken apart, the largest of them, exponentials, their sum, and the sum of the weighted elements
WINDOW = dict(Conv=4, Max=3, Sub=4, Exp=4, Add=6, Div=4, Mul=4)
GRAPHS = {
    'dyrelu_a': (lambda: DyReLU(8, mode='a'), [HYPER, PIECES]),
    'dyrelu_b': (lambda: DyReLU(8), [HYPER, PIECES]),
    'dyrelu_b_relu6': (lambda: DyReLU(8, max_value=6), [HYPER, PIECES, dict(Clip=1)]),
    'dyrelu_b_k3': (lambda: DyReLU(8, k=3), [HYPER, PIECES, dict(Mul=1, Add=1, Max=1)]),
    'dyrelu_c': (lambda: DyReLU(8, mode='c'), [HYPER, PIECES, ATTENTION]),
    'dyrelu_static': (lambda: DyReLU(8, static=True),
                      [PIECES, dict(Shape=1, Concat=1, Expand=1, Reshape=1, Split=1)]),
    'softpool': (lambda: SoftPool2d(2, ceil_mode=True), [WINDOW]),
    'softpool_same': (lambda: SoftPool2dSame(2), [WINDOW]),
    'softpool_beta': (lambda: SoftPool2d(2, beta=-2.0),
                      [{**WINDOW, 'Max': 0}, dict(Min=3, Mul=4)]),
    'softpool_1d': (lambda: SoftPool1d(2), [dict(Conv=2, Max=1, Sub=2, Exp=2, Add=2, Div=2, Mul=2)]),
    # Five of the nine elements lie in the padding for some windows. Which windows does not depend on the input:
    # runtimes compute a Conv and what follows from it once, when they load the graph.
    'softpool_3x3': (lambda: SoftPool2d(3, 2, 1), [
        dict(Conv=10, Greater=1, Where=1, Slice=5, Add=5 + 8 + 8, Max=8, Sub=9, Exp=9, Div=9, Mul=9)]),
    'brelu': (lambda: BReLU(), [dict(Mul=2, Relu=1)]),
    'brelu6': (lambda: BReLU(max_value=6.0), [dict(Mul=2, Clip=1)]),
    'bprelu': (lambda: BPReLU(8), [dict(Mul=2, PRelu=1)]),
    'bipolar_max_pool': (lambda: BipolarMaxPool2d(3, 2, 1), [dict(Mul=2, MaxPool=1)]),
}


@pytest.mark.parametrize('name', GRAPHS)
def test_nodes(name):
    make, parts = GRAPHS[name]
    module = perturbed(make())
    shape = (8, 6) if name.endswith('1d') else (8, 6, 10)
    graph = to_onnx(module, noise(2, *shape), [0])
    allowed = collections.Counter()
    for part in parts:
        allowed.update(part)
    nodes = collections.Counter(node.op_type for node in graph.graph.node)
    assert not nodes - allowed, nodes
    x = noise(3, *shape)
    torch.testing.assert_close(runtime(graph)(x), module(x).detach(), rtol=1e-5, atol=1e-5)


SIZES = {
    'dyrelu_c': lambda: DyReLU(3, mode='c'),
    'softpool_2x2': lambda: SoftPool2d(2, ceil_mode=True),
    'softpool_3x3': lambda: SoftPool2d(3, 2, 1, beta=-1.5),
    'softpool_3x3_ceil': lambda: SoftPool2d(3, 2, 1, ceil_mode=True),
    'softpool_padded': lambda: SoftPool2d(2, 2, 1, ceil_mode=True),
    'softpool_gaps': lambda: SoftPool2d(2, 3, 0, ceil_mode=True),
    'softpool_dilated': lambda: SoftPool2d(3, 1, 1, dilation=2),
    'softpool_same_2x2': lambda: SoftPool2dSame(2),
    'softpool_same_3x3': lambda: SoftPool2dSame(3, 2),
    'softpool_average': lambda: SoftPool2d(2, beta=0),
    'softpool_large': lambda: SoftPool2d((5, 2), 2),
    'global_softpool': lambda: GlobalSoftPool2d(),
    'brelu': lambda: BReLU(),
}


@pytest.mark.parametrize('name', SIZES)
def test_any_batch_height_and_width(name):
    module = perturbed(SIZES[name]())
    run = runtime(to_onnx(module, noise(2, 3, 9, 10), [0, 2, 3]))
    for x in (noise(1, 3, h, w) for h in (7, 8, 9, 12) for w in (7, 8, 11)):
        torch.testing.assert_close(run(x), module(x).detach(), rtol=1e-5, atol=1e-5)


def test_volumes_of_any_size():
    module = SoftPool3d((2, 1, 2))
    run = runtime(to_onnx(module, noise(2, 3, 6, 8, 5), [0, 2, 3, 4]))
    x = noise(1, 3, 7, 4, 9)
    torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('module', [SoftPool2d(2), SoftPool2d(3, 2, 1), SoftPool2d(2, beta=-3.0)], ids=str)
def test_softpool_of_values_that_overflow_and_of_those_that_are_none(module):
    limit = torch.finfo(torch.float32).max
    x = noise(5, 4, 6, 8)
    x[0] *= limit / x[0].abs().max()
    x[1] = limit * x[1].sign()
    x[2] = -1e4 + x[2]
    x[3, 0, 2, 3], x[3, 1, 1, 1], x[3, 2, 0, 7] = math.nan, math.inf, -math.inf
    x[4] = limit
    run = runtime(to_onnx(module, noise(2, 4, 6, 8), [0]))
    torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert run(x)[[0, 1, 2, 4]].isfinite().all()


def test_dyrelu_of_values_that_are_none():
    module = perturbed(DyReLU(4, max_value=6.0))
    x = noise(3, 4, 5, 5)
    x[0, 1, 2, 3], x[1, 2] = math.nan, 1e30
    run = runtime(to_onnx(module, noise(2, 4, 5, 5), [0]))
    torch.testing.assert_close(run(x), module(x).detach(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize('module', [DyReLU(8, mode='c'), SoftPool2d(3, 2, 1), BReLU()], ids=lambda m: type(m).__name__)
def test_half_precision(module):
    module = perturbed(module).half()
    x = noise(2, 8, 6, 7).half()
    graph = to_onnx(module, x, [0])
    torch.testing.assert_close(runtime(graph)(x), module(x).detach())


@pytest.mark.parametrize('act, pool', [('dyrelu_b', 'softpool'), ('dyrelu_c', None), ('brelu', None)])
@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_a_network_for_images_of_any_size(name, act, pool):
    torch.manual_seed(0)
    options = dict(pool=pool) if pool and name == 'test_resnet' else {}
    model = trained_like_(convert(timm.create_model(name, num_classes=5), act=act, **options))
    run = runtime(to_onnx(model, noise(2, 3, 64, 96, scale=1), [0, 2, 3]))
    for x in (noise(1, 3, 64, 64, scale=1), noise(3, 3, 96, 160, scale=1)):
        torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-4, atol=1e-4)


def digits(split):
    data = DigitsDataset(split)
    x = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image, _ in data])
    return x.reshape(-1, 32, 32, 3).movedim(-1, 1) / 127.5 - 1, torch.tensor(data.targets)


OPERATORS = [dict(act='dyrelu_b'), dict(pool='softpool'), dict(act='brelu')]


def trained_on_digits(x, target, options):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=10)
    model = (convert(model, **options) if options else model).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for batch in (batch for _ in range(3) for batch in torch.randperm(len(x)).split(64)):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), target[batch]).backward()
        optimizer.step()
    return model.eval()


def quantized_by_onnxruntime(model, x, folder):
    """The network, and that with 8 bits, as functions."""
    quantization = pytest.importorskip('onnxruntime.quantization')
    graph = to_onnx(model, x[:2], [0])
    onnx.save(graph, folder / 'fp32.onnx')
    batches = iter([{graph.graph.input[0].name: batch.numpy()} for batch in x.split(64)])

    class Calibration(quantization.CalibrationDataReader):
        def get_next(self):
            return next(batches, None)

    # Products of matrices, where the time goes. What is between them costs more precision than it saves time.
    quantization.quantize_static(
        folder / 'fp32.onnx', folder / 'int8.onnx', Calibration(), op_types_to_quantize=['Conv', 'Gemm'])
    return runtime(graph), runtime(onnx.load(folder / 'int8.onnx'))


@torch.no_grad()
def quantized_by_torchao(model, x, folder):
    pytest.importorskip('torchao')
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: ANY},))
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in x.split(64):
        prepared(batch)
    return model, torch.no_grad()(convert_pt2e(prepared))


@pytest.mark.parametrize('options', OPERATORS, ids=str)
@pytest.mark.parametrize('quantize', [quantized_by_onnxruntime, quantized_by_torchao])
def test_int8_keeps_the_answers(quantize, options, tmp_path):
    """As many of them as it keeps of the base, but for a few."""
    pytest.importorskip('sklearn')
    if quantize is quantized_by_torchao:
        pytest.importorskip('torchao')
    (x, target), (held_out, answers) = digits('train'), digits('test')

    def kept(options):
        model = trained_on_digits(x, target, options)
        before, after = (run(held_out).argmax(1) for run in quantize(model, x[:256], tmp_path))
        assert (before == answers).double().mean() > 0.9
        return (before == after).double().mean().item()

    assert kept(options) >= kept({}) - 0.02
