"""Each operator in OpenVINO and, as int8, in torchao. For onnxruntime, see tests/ops/test_exported.py."""
import copy

import pytest
import timm
import torch
from torch import nn

from timm_dyacts import BELU, BipolarMaxPool2d, BReLU, DyReLU, SoftPool2d, SoftPool2dSame

# In place, as convert has them
OPERATORS = {
    'dyrelu_a': lambda: DyReLU(8, 'a'),
    'dyrelu_b': lambda: DyReLU(8, 'b', max_value=6),
    'dyrelu_c': lambda: DyReLU(8, 'c'),
    'brelu': lambda: BReLU(inplace=True),
    'belu': lambda: BELU(inplace=True),
    'bipolar_max_pool': lambda: BipolarMaxPool2d(3, 2, 1),
    'softpool': lambda: SoftPool2d(2, ceil_mode=True),
    'softpool_padded': lambda: SoftPool2d(3, 2, 1),
    'softpool_same': lambda: SoftPool2dSame(3, 2),
}
ANY = {dim: torch.export.Dim.DYNAMIC for dim in (0, 2, 3)}


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def perturbed(module):
    """With parameters that are neither zero nor what they start as."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator=generator)
    return module.eval()


def network(name):
    return perturbed(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), OPERATORS[name](), nn.Conv2d(8, 4, 1)))


def compiled(source):
    openvino = pytest.importorskip('openvino')
    # Other precisions are the default where the CPU has them.
    model = openvino.compile_model(source, 'CPU', dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS='1'))
    return lambda x: torch.from_numpy(model(x.numpy())[0])


@torch.no_grad()
def assert_same(run, model, *sizes):
    for size in sizes:
        x = noise(*size)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', OPERATORS)
def test_openvino_by_way_of_onnx(name, tmp_path):
    pytest.importorskip('openvino')
    pytest.importorskip('onnxscript')
    model = network(name)
    torch.onnx.export(
        model, (noise(2, 3, 16, 20),), str(tmp_path / 'model.onnx'), dynamo=True, verbose=False, dynamic_shapes=(ANY,))
    assert_same(compiled(tmp_path / 'model.onnx'), model, (2, 3, 16, 20), (1, 3, 31, 18))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['dyrelu_b', 'dyrelu_c', 'brelu', 'belu', 'bipolar_max_pool', 'softpool'])
def test_openvino_of_a_module(name):
    openvino = pytest.importorskip('openvino')
    model = network(name)
    run = compiled(openvino.convert_model(model, example_input=noise(2, 3, 16, 20)))
    assert_same(run, model, (2, 3, 16, 20), (3, 3, 16, 20))
    if 'softpool' not in name:  # its trace is for one size of the images
        assert_same(run, model, (1, 3, 31, 18))


def test_openvino_of_an_exported_program():
    openvino = pytest.importorskip('openvino')
    for name in ('dyrelu_b', 'brelu', 'softpool_padded'):
        model = network(name)
        program = torch.export.export(model, (noise(2, 3, 16, 20),), dynamic_shapes=(ANY,))
        if name == 'softpool_padded':  # the page may leave this out once it works
            with pytest.raises(Exception, match='sym_min'):
                openvino.convert_model(program)
        else:
            assert_same(compiled(openvino.convert_model(program)), model, (2, 3, 16, 20), (1, 3, 31, 18))


@torch.no_grad()
@pytest.mark.parametrize('config', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
@pytest.mark.parametrize('base, operator', [
    ('test_vit', 'dyrelu_b'), ('test_convnext', 'dyrelu_b'), ('test_resnet', 'dyrelu_b'), ('test_resnet', 'softpool'),
    ('test_resnet', 'brelu'),
])
def test_torchao_keeps_the_answers(base, operator, config):
    """Where it makes int8 of the linear layers of the base, it does so of the variant's."""
    quantization = pytest.importorskip('torchao.quantization')
    x = noise(16, 3, 160, 160)

    def quantized(name):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=10)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.train()(x)
        int8 = copy.deepcopy(model.eval())
        quantization.quantize_(int8, getattr(quantization, config)())
        linear = [module.weight for module in int8.modules() if isinstance(module, nn.Linear)]
        count = sum(type(weight) is not nn.Parameter for weight in linear)
        before, after = model(x), int8(x)
        assert (after - before).norm() <= 0.05 * before.norm()
        assert not torch.equal(before, after)
        sure = before.topk(2).values.diff().abs().squeeze(1) > 0.1 * before.std()
        assert sure.any() and torch.equal(before.argmax(1)[sure], after.argmax(1)[sure])
        return count

    assert quantized(f'{base}_{operator}') == quantized(base) > 0
