"""A BatchNorm for each part of a batch while training, and the plain model afterwards."""
import pytest
import timm
import torch
from support.versions import needs_timm
from timm.layers import convert_splitbn_model

import timm_dyacts  # noqa: F401
from timm_dyacts.training.checkpoint import save_checkpoint
from timm_dyacts.training.split_bn import drop_split_bn, split_bn


@pytest.mark.parametrize('name', [
    'test_resnet', pytest.param('test_efficientnet', marks=needs_timm('1.0.31'))])
def test_each_part_has_its_own_and_the_first_is_kept(name, tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=3)
    model = split_bn(timm.create_model(name, num_classes=3), 2)
    model.load_state_dict(plain.state_dict(), strict=False)
    plain.train(), model.train()
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.cat([images, images + 1]))[:8], plain(images))
    save_checkpoint(model, tmp_path)
    drop_split_bn(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    saved = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        expected = plain.eval()(images)
        torch.testing.assert_close(model.eval()(images), expected)
        torch.testing.assert_close(saved(images), expected)


def test_a_model_without():
    with pytest.raises(ValueError, match='--split-bn needs a model with BatchNorm'):
        split_bn(timm.create_model('test_vit'), 2)


def test_an_old_timm_is_named(monkeypatch):
    """One that leaves out the activation of a BatchNorm that has one."""
    def without_activations(model, num_splits):
        model = convert_splitbn_model(model, num_splits)
        for module in model.modules():
            module._modules.pop('act', None)
        return model

    monkeypatch.setattr('timm_dyacts.training.split_bn.convert_splitbn_model', without_activations)
    with pytest.raises(ImportError, match=r'--split-bn with this model needs timm>=1\.0\.31'):
        split_bn(timm.create_model('test_efficientnet'), 2)
