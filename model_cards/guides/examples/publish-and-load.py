# %% [markdown]
# # Publish a run, and load it somewhere else
#
# Needs an account on the Hugging Face Hub, a token with the right to write (`hf auth login`, or `HF_TOKEN`) and, below,
# your own user name. Run it cell by cell in an editor that knows `# %%`, or as a whole: `python publish-and-load.py`.

# %%
import matplotlib.pyplot as plt
import timm
import torch

import timm_dyacts
from timm_dyacts.data import DigitsDataset
from timm_dyacts.training import TrainConfig, train

REPO_ID = 'user/resnet10t_dyrelu_b.digits'

# %% [markdown]
# Train on the digits of scikit-learn, a network that is a quarter as wide as timm's, to be quick. Then look at what
# would be published. Nothing is sent.

# %%
run = train(TrainConfig(
    model='resnet10t_dyrelu_b', model_kwargs=dict(channels=(16, 32, 64, 128)), epochs=3, lr=0.003, output='output',
    experiment='published')).folder
shown = timm_dyacts.hub.publish(run, REPO_ID, dry_run=True)
for name, size in shown.files.items():
    print(f'{size:>12,}  {name}')
print(f'Look at the card: {shown.folder}/README.md')

# %% [markdown]
# Publish it, in one commit. What was not published from here is never overwritten unless you ask for it.

# %%
published = timm_dyacts.hub.publish(run, REPO_ID)
print(published.url)

# %% [markdown]
# On another machine, this is all that it takes. `hub.load` checks the SHA-256 that was published with the weights;
# timm's own `create_model` loads the model, too.

# %%
model = timm_dyacts.hub.load(REPO_ID).eval()
plain = timm.create_model(f'hf-hub:{REPO_ID}', pretrained=True).eval()

# %% [markdown]
# Preprocessing and class names have come with it.

# %%
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = model.pretrained_cfg['label_names']
digits = DigitsDataset('test')
pictures = [digits[i][0] for i in range(0, 360, 15)]
with torch.no_grad():
    batch = torch.stack([transform(picture) for picture in pictures])
    probabilities, labels = model(batch).softmax(1).max(1)
    assert torch.equal(plain(batch), model(batch))

figure, axes = plt.subplots(3, 8, figsize=(8, 3.8), layout='constrained')
for axis, picture, probability, label in zip(axes.flat, pictures, probabilities, labels, strict=True):
    axis.imshow(picture)
    axis.set_title(f'{names[label]}: {probability:.0%}', fontsize=9)
    axis.axis('off')
figure.savefig('loaded.png', dpi=80)
