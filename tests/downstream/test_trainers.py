"""The trainers of lightning and fastai."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from timm_dyacts import DyReLU, get_transition, set_transition


@pytest.mark.filterwarnings('ignore')
def test_lightning_resumes_to_the_same_weights(tmp_path):
    """In bf16, with a transition under way: two epochs are two times one, continued from a checkpoint."""
    lightning = pytest.importorskip('lightning')
    x = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batches = DataLoader(TensorDataset(x, torch.arange(12) % 3), batch_size=4)

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model('test_efficientnet_dyrelu_b', num_classes=3, transition=True)

        def on_train_epoch_start(self):
            set_transition(self.model, (1 + self.current_epoch) / 4)

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def fit(epochs, folder, checkpoint=None):
        torch.manual_seed(0)
        module = Classifier()
        trainer = lightning.Trainer(
            max_epochs=epochs, precision='bf16-mixed', accelerator='cpu', devices=1, default_root_dir=folder,
            logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, batches, ckpt_path=checkpoint)
        return module, trainer.checkpoint_callback.best_model_path

    whole, _ = fit(2, tmp_path / 'whole')
    half, checkpoint = fit(1, tmp_path / 'half')
    resumed, _ = fit(2, tmp_path / 'resumed', checkpoint)
    state, expected, before = (module.state_dict() for module in (resumed, whole, half))
    assert get_transition(whole.model) == get_transition(resumed.model) == 0.5
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert any(not torch.equal(before[key], expected[key]) for key in expected if 'fc2' in key)
    loaded = Classifier.load_from_checkpoint(checkpoint).state_dict()
    assert all(torch.equal(loaded[key], before[key]) for key in before)


@pytest.mark.filterwarnings('ignore')
def test_fastai(tmp_path, write_photos, weights, monkeypatch):
    """A start that is the base's, a body that stays frozen, and one that does not; then a learner from a file."""
    vision = pytest.importorskip('fastai.vision.all')
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loaders = vision.ImageDataLoaders.from_folder(
        write_photos(tmp_path / 'photos'), valid='validation', item_tfms=vision.Resize(64), bs=4, num_workers=0)
    learner = vision.vision_learner(loaders, 'resnet18_dyrelu_b', metrics=vision.accuracy, **weights('resnet18'))
    base = timm.create_model('resnet18', pretrained=True, num_classes=0, **weights('resnet18')).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(learner.model[0].eval()(x), base.forward_features(x))

    def coefficients():
        return [m.fc2_weight.detach().clone() for m in learner.model.modules() if isinstance(m, DyReLU)]

    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
        assert len(coefficients()) == 17 and not any(value.any() for value in coefficients())
        learner.unfreeze()
        learner.fit(1, 1e-3)
        assert all(value.any() for value in coefficients())
        learner.export('learner.pkl')
        loaded = vision.load_learner(tmp_path / 'photos' / 'learner.pkl')
        image = tmp_path / 'photos' / 'train' / 'dark' / '0.png'
        with loaded.no_bar():
            assert torch.equal(loaded.predict(image)[2], learner.predict(image)[2])
