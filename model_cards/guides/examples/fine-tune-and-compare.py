# %% [markdown]
# # Fine-tune a variant, and find out whether it helps
#
# On the handwritten digits of scikit-learn, which need no download. For your own images give `data_dir='photos'`, a
# folder with `train/<class>/` and `validation/<class>/` in it, and `pretrained=True`. Run it cell by cell in an editor
# that knows `# %%`, or as a whole: `python fine-tune-and-compare.py` writes into `output/`, and copies its pictures
# into the current folder.

# %%
import shutil
from pathlib import Path

from timm_dyacts.data import DigitsDataset
from timm_dyacts.evaluation import PredictConfig, ValidateConfig, predict, validate
from timm_dyacts.study import CompareConfig, compare
from timm_dyacts.training import TrainConfig, train

# %% [markdown]
# ## Fine-tune
#
# `TrainConfig` has the options of `timm-dyacts train`. The network is a quarter as wide as timm's, and trained for
# three epochs only, to be quick. `resume='auto'` goes on where the run was stopped, if it was.

# %%
small = dict(channels=(16, 32, 64, 128))
result = train(TrainConfig(
    model='resnet10t_dyrelu_b', model_kwargs=small, epochs=3, lr=0.003, output='output', experiment='digits',
    resume='auto'))
print(f'top-1 {result.best["top1"]:.2f} % after epoch {result.best_epoch}, in {result.folder}')

# %% [markdown]
# The folder is itself the best checkpoint. Beside it are the pictures of the run: `curves.png` shows its course,
# `confusion.png` which classes are taken for which, `mistakes.png` the worst mistakes, and `dyrelu.png` the slopes and
# intercepts that each Dynamic ReLU really uses.

# %%
run = Path(result.folder)
shutil.copy(run / 'curves.png', 'curves.png')
shutil.copy(run / 'dyrelu.png', 'coefficients.png')

# %% [markdown]
# A run folder is a model like any others: evaluate it again, or let it name images.

# %%
record = validate(ValidateConfig(model=(str(run),)))
assert record['top1'] == round(result.best['top1'], 4)

image, label = DigitsDataset('test')[0]
image.save('output/digit.png')
[prediction] = predict(PredictConfig(model=str(run), images=('output/digit.png',), topk=2))
print(f'a picture of a {label}:', prediction['predictions'])

# %% [markdown]
# ## Compare
#
# One run says little: another seed may well turn the result round. `compare` trains the base and the variant with the
# same seeds, and takes differences seed by seed. Three seeds, three epochs and 60 images of each class keep this
# example at a minute or two. Stopped and started again, it goes on where it was.

# %%
SEEDS = 3  # take ten for an answer
comparison = compare(
    CompareConfig(
        models=('base=resnet10t', 'dyrelu_b=resnet10t_dyrelu_b:lr_ops=0.1'), seeds=SEEDS, repeats=3,
        output='output', experiment='comparison'),
    model_kwargs=small, epochs=3, lr=0.003, images_per_class=60)
for sentence in comparison.sentences:
    print(sentence)
shutil.copy(comparison.folder / 'compare.png', 'comparison.png')
