"""The zoo: names, inherited tags, warm starts from a served checkpoint, and native checkpoints."""
import copy
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from support.loopback_hub import LoopbackHub, run_python
from support.trained_like import max_diff, output, probe, trained_like, trained_like_
from timm.models import get_pretrained_cfg, is_model_in_modules, save_for_hf
from torch import nn

from timm_dyacts import BipolarMaxPool2d, BReLU, DyReLUB, PretrainedWeightsError, SoftPool2d, zoo
from timm_dyacts.operators import zoo_operators

VARIANTS = list(zoo.variants())
SMALL = ('resnet18', 'mobilenetv2_050', 'mobilenetv3_small_100', 'densenet121', 'efficientnet_b0')


def file_of(model, path):
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return dict(file=str(path))


def warm_start(name, overlay, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_the_names_that_must_work_exactly_as_written():
    assert any(isinstance(m, DyReLUB) for m in timm.create_model('resnet50_dyrelu_b').modules())
    assert any(isinstance(m, SoftPool2d) for m in timm.create_model('mobilenetv2_softpool').modules())
    model = timm.create_model('resnet_brelu_nobn')
    assert any(isinstance(m, BReLU) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_every_variant_is_registered_once_in_a_module_of_our_own():
    names = [v.name for v in VARIANTS]
    assert len(names) == len(set(names))
    assert set(timm.list_models(module='zoo')) == set(names)
    assert all(timm.is_model(v.base) and not is_model_in_modules(v.base, ['zoo']) for v in VARIANTS)
    assert {'resnet50_brelu', 'resnet50_brelu_nobn'} <= set(timm.list_models('resnet50_brelu*'))


@pytest.mark.parametrize('variant', VARIANTS, ids=lambda v: v.name)
def test_tags_are_inherited(variant):
    tags = {name.partition('.')[2] for name in timm.list_pretrained(f'{variant.base}.*')}
    assert tags == {name.partition('.')[2] for name in timm.list_pretrained(f'{variant.name}.*')}
    assert tags
    for tag in tags:
        base, cfg = get_pretrained_cfg(f'{variant.base}.{tag}'), get_pretrained_cfg(f'{variant.name}.{tag}')
        assert cfg.architecture == variant.name
        assert (cfg.hf_hub_id, cfg.license, cfg.input_size) == (base.hf_hub_id, base.license, base.input_size)
        assert cfg.origin_url
        assert variant.warm_start in cfg.notes[-1] and base.hf_hub_id in cfg.notes[-1]
    default = get_pretrained_cfg(variant.name)
    assert default.tag == get_pretrained_cfg(variant.base).tag


@pytest.mark.parametrize('variant', [v for v in VARIANTS if v.base in SMALL], ids=lambda v: v.name)
def test_warm_start_keeps_the_function_where_the_table_says_so(variant, tmp_path):
    base = trained_like(variant.base)
    model = warm_start(variant.name, file_of(base, tmp_path / 'base.safetensors'))
    assert model.conversion.function == variant.warm_start
    expected = output(base, probe(64))
    difference = max_diff(output(model, probe(64)), expected)
    if variant.warm_start == 'exact':
        assert difference <= (1e-4 if variant.nobn else 0)
    else:
        assert 0 < difference
    assert model.pretrained_cfg['architecture'] == variant.name


FIRST = [v for v in VARIANTS if v.base == v.family.bases.split()[0] and v.base not in SMALL]


@pytest.mark.parametrize('variant', FIRST, ids=lambda v: v.name)
def test_a_base_of_each_family_builds_and_reports_what_the_table_says(variant):
    with torch.device('meta'):
        model = timm.create_model(variant.name)
    assert model.conversion.function == variant.warm_start
    assert model.conversion.replaced
    assert all(p.is_meta for p in model.parameters())


def test_the_published_form_of_softpool():
    assert timm.create_model('resnet18_softpool').maxpool.kernel_size == (2, 2)
    assert timm.create_model('densenet121_softpool').features.pool0.kernel_size == (2, 2)
    assert timm.create_model('resnet18_softpool', pool_kwargs=dict(beta=3.0)).maxpool.beta == 3.0
    assert isinstance(timm.create_model('resnet18_brelu').maxpool, BipolarMaxPool2d)


@pytest.mark.parametrize('operator', [*zoo_operators(), 'brelu_nobn'])
def test_native_checkpoints_load_as_they_are(operator, tmp_path):
    torch.manual_seed(1)
    model = trained_like_(timm.create_model(f'resnet18_{operator}', num_classes=10))
    expected = output(model, probe())
    cfg = dict(file_of(model, tmp_path / 'native.safetensors'), num_classes=10)
    assert torch.equal(output(warm_start(f'resnet18_{operator}', cfg), probe()), expected)

    save_for_hf(model, tmp_path / 'folder', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}/folder', pretrained=True)
    assert torch.equal(output(loaded, probe()), expected)


@pytest.mark.parametrize('operator', ['dyrelu_b', 'brelu', 'brelu_nobn'])
def test_neither_kind_of_weights_loads_into_the_other_unnoticed(operator):
    base, variant = timm.create_model('resnet18'), timm.create_model(f'resnet18_{operator}')
    with pytest.raises(RuntimeError, match='Missing key'):
        variant.load_state_dict(base.state_dict())
    with pytest.raises(RuntimeError, match='Unexpected key'):
        base.load_state_dict(variant.state_dict())


@pytest.mark.parametrize('operator', ['dyrelu_b', 'brelu', 'brelu_nobn'])
class TestAdaptedWarmStart:
    """Arguments that change the model behave as they do for the base."""

    @pytest.fixture
    def base_file(self, tmp_path):
        return file_of(trained_like('resnet18'), tmp_path / 'base.safetensors')

    def both(self, operator, base_file, **kwargs):
        return warm_start('resnet18', base_file, **kwargs), warm_start(f'resnet18_{operator}', base_file, **kwargs)

    def test_in_chans(self, operator, base_file):
        base, model = self.both(operator, base_file, in_chans=1)
        assert max_diff(output(model, probe(in_chans=1)), output(base, probe(in_chans=1))) < 1e-5

    def test_num_classes(self, operator, base_file):
        base, model = self.both(operator, base_file, num_classes=7)
        assert output(model, probe()).shape == (2, 7)
        ours, theirs = model.forward_features(probe()), base.eval().forward_features(probe())
        assert max_diff(ours.abs(), theirs.abs()) < 1e-5
        model.reset_classifier(5)
        assert output(model, probe()).shape == (2, 5)

    @pytest.mark.parametrize('kwargs', [dict(num_classes=0), dict(num_classes=0, global_pool='')])
    def test_no_classifier(self, operator, base_file, kwargs):
        base, model = self.both(operator, base_file, **kwargs)
        ours, theirs = output(model, probe()), output(base, probe())
        assert ours.shape == theirs.shape
        assert max_diff(ours.abs(), theirs.abs()) < 1e-5

    def test_features_only(self, operator, base_file):
        base, model = self.both(operator, base_file, features_only=True, out_indices=(1, 3))
        assert model.feature_info.channels() == base.feature_info.channels()
        for ours, theirs in zip(output(model, probe()), output(base, probe()), strict=True):
            assert max_diff(ours.abs(), theirs.abs()) < 1e-5


def test_a_damaged_checkpoint_is_refused(tmp_path):
    state = trained_like('resnet18').state_dict()
    del state['layer1.0.conv1.weight']
    safetensors.torch.save_file(state, tmp_path / 'partial.safetensors')
    with pytest.raises(RuntimeError, match='layer1.0.conv1.weight'):
        warm_start('resnet18_brelu', dict(file=str(tmp_path / 'partial.safetensors')))
    other = file_of(trained_like('resnet34'), tmp_path / 'other.safetensors')
    with pytest.raises(RuntimeError, match='Unexpected key'):
        warm_start('resnet18_dyrelu_b', other)


def test_a_missing_file_says_what_to_do(tmp_path):
    path = str(tmp_path / 'no.safetensors')
    with pytest.raises(PretrainedWeightsError, match=f"'resnet18_brelu.a1_in1k' from the file '{path}'"):
        warm_start('resnet18_brelu', dict(file=path))


def test_weights_come_from_the_hub(tmp_path):
    """The real client, against a server on this machine."""
    base = trained_like('resnet18')
    content = safetensors.torch.save({k: v.contiguous() for k, v in base.state_dict().items()})
    torch.save((probe(), output(base, probe())), tmp_path / 'expected.pt')
    code = """
import sys, timm, timm_dyacts, torch
x, expected = torch.load(sys.argv[1])
for name in ('resnet18_dyrelu_c.a1_in1k', 'resnet18_brelu', 'resnet18_brelu_nobn.a1_in1k'):
    model = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        difference = (model(x) - expected).abs().max() / expected.abs().max()
    assert model.conversion.function == 'exact', model.conversion
    assert difference <= (1e-4 if 'nobn' in name else 0), (name, difference)
    assert timm.create_model(name, pretrained=True, features_only=True)(x)[-1].shape[1] == 512
"""
    with LoopbackHub() as hub:
        hub.add_repo('timm/resnet18.a1_in1k', {'model.safetensors': content, 'config.json': b'{}'})
        run_python(code, hub.env(tmp_path / 'cache'), tmp_path / 'expected.pt')
        downloads = [r for r in hub.requests if r[0] == 'GET' and 'model.safetensors' in r[1]]
        assert any('timm/resnet18.a1_in1k' in path for _, path in hub.requests)
        assert len(downloads) <= 1


def test_without_network_the_error_tells_the_way_out(tmp_path):
    code = """
import timm, timm_dyacts
try:
    timm.create_model('resnet18_dyrelu_b.a1_in1k', pretrained=True)
except timm_dyacts.PretrainedWeightsError as e:
    print(e)
"""
    with LoopbackHub() as hub:
        missing = run_python(code, hub.env(tmp_path / 'a')).stdout
        offline = run_python(code, hub.env(tmp_path / 'b', offline=True)).stdout
    for message in (missing, offline):
        assert "'resnet18_dyrelu_b.a1_in1k' from the Hugging Face Hub repo 'timm/resnet18.a1_in1k'" in message
        assert "pretrained_cfg_overlay=dict(file='/path/to/model.safetensors')" in message
        assert 'HF_ENDPOINT' in message


def test_config_is_json_and_names_the_variant(tmp_path):
    model = timm.create_model('resnet18_dyrelu_b', num_classes=3, act_kwargs=dict(reduction=16), where='all')
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert {m.reduction for m in loaded.modules() if isinstance(m, DyReLUB)} == {16}
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_import_is_quiet_and_leaves_the_heavy_parts_out():
    code = (
        'import sys, warnings, logging; warnings.simplefilter("error"); import timm; before = set(sys.modules);'
        'import timm_dyacts; new = set(sys.modules) - before;'
        'print(*sorted({m.split(".")[0] for m in new} - {"timm_dyacts"}))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert not {'matplotlib', 'sklearn', 'scipy', 'triton'} & set(done.stdout.split())
    assert done.stderr == ''


def test_deepcopy_and_pickle(tmp_path):
    model = timm.create_model('resnet18_brelu_nobn').eval()
    torch.save(model, tmp_path / 'model.pt')
    for twin in (copy.deepcopy(model), torch.load(tmp_path / 'model.pt', weights_only=False)):
        assert torch.equal(output(twin, probe()), output(model, probe()))
        assert twin.conversion.replaced == model.conversion.replaced
