# %% [markdown]
# # Convert a network of your own
#
# A small residual network in plain PyTorch is trained on the handwritten digits of scikit-learn. Then its activations
# and pools are replaced, without losing what it has learned. Run it cell by cell in an editor that knows `# %%`, or as
# a whole: `python convert-your-model.py` writes the pictures into the current folder.

# %%
import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import timm_dyacts

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
labels = torch.tensor(labels)
train_images, test_images = images[:1400], images[1400:]
train_labels, test_labels = labels[:1400], labels[1400:]

# %% [markdown]
# The network calls `F.relu` in its `forward`, and one `nn.MaxPool2d` twice. Neither is a problem: `convert` works on a
# record of one forward pass, not on the names of modules.


# %%
class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.block1, self.block2 = Block(32), Block(32)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.pool(self.block1(self.stem(x)))
        x = self.pool(self.block2(x))
        return self.fc(x.mean((2, 3)))


def train(model, epochs, lr):
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(train_images)).split(100):
            loss = F.cross_entropy(model(train_images[batch]), train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def top1(model):
    return (model(test_images).argmax(1) == test_labels).float().mean().item() * 100


base = train(Net(), epochs=3, lr=0.01)
print(f'trained: {top1(base):.1f} %')

# %% [markdown]
# Convert copies of it. `input_size` is the size of one image: the network is called once, to see what it does.
# `model.conversion` says what was replaced, what was left alone and why, and whether the function was kept.

# %%
ways = {
    'Dynamic ReLU': dict(act='dyrelu_b'),
    'bipolar ReLU': dict(act='brelu'),
    'no BatchNorm': dict(norm='none'),
    'SoftPool': dict(pool='softpool'),
    'SoftPool by\na transition': dict(pool='softpool', transition=True),
}
converted = {
    name: timm_dyacts.convert(copy.deepcopy(base), input_size=(1, 8, 8), **options) for name, options in ways.items()}
for name, model in converted.items():
    print(f'{" ".join(name.split())}: {model.conversion.function}, {model.conversion.counts}')
print()
print(converted['Dynamic ReLU'].conversion)

# %% [markdown]
# What did it do to the logits of the test images? All but SoftPool start where the trained network was. SoftPool
# computes something else than the max pool, so putting it straight in changes the logits; a transition begins at the
# max pool, and `timm_dyacts.set_transition(model, t)` leads it to SoftPool during training.

# %%
with torch.no_grad():
    expected = base(test_images)
    scale = expected.abs().max()
    change = {name: 100 * ((model(test_images) - expected).abs().max() / scale).item()
              for name, model in converted.items()}

figure, axis = plt.subplots(figsize=(7, 2.8), layout='constrained')
bars = axis.barh(list(change), list(change.values()))
notes = [f'{value:.1f} %, top-1 {top1(converted[name]):.1f} %' for name, value in change.items()]
axis.bar_label(bars, notes, padding=4)
axis.set_xlim(0, 2 * max(change.values()))
axis.set_xlabel('largest change of a logit, in % of the largest logit')
axis.set_title(f'Right after conversion; top-1 before {top1(base):.1f} %')
axis.invert_yaxis()
figure.savefig('after-conversion.png', dpi=80)

# %% [markdown]
# The network with Dynamic ReLU is now fine-tuned. Whether it does better than the base fine-tuned alike is another
# question, which takes many seeds: `timm-dyacts compare`.

# %%
model = train(converted['Dynamic ReLU'], epochs=3, lr=0.01)
print(f'fine-tuned: {top1(model):.1f} %')

# %% [markdown]
# Dynamic ReLU is `max(a1 x + b1, a2 x + b2)`, with slopes and intercepts that a small network computes from the image.
# Here are the functions that one channel uses for an image of each digit, beside the ReLU as which it started. Hooks
# get what goes into the modules.

# %%
inputs = {}
layers = {name: module for name, module in model.named_modules() if isinstance(module, timm_dyacts.DyReLU)}
hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
         for name, layer in layers.items()]
with torch.no_grad():
    model(torch.stack([test_images[test_labels == digit][0] for digit in range(10)]))
    # (N, C, 2 K): for each image and channel the K slopes, then the K intercepts
    coefficients = {name: layer.coefficients(inputs[name]) for name, layer in layers.items()}
for hook in hooks:
    hook.remove()
name = max(coefficients, key=lambda name: coefficients[name].var(0).sum(1).max())
channel = coefficients[name].var(0).sum(1).argmax()
x = torch.linspace(-2, 2, 101)

figure, axis = plt.subplots(figsize=(6, 4), layout='constrained')
for digit, (a1, a2, b1, b2) in enumerate(coefficients[name][:, channel].tolist()):
    axis.plot(x, torch.maximum(a1 * x + b1, a2 * x + b2), color=plt.cm.viridis(digit / 9), label=str(digit))
axis.plot(x, x.relu(), color='black', linestyle='--', label='ReLU')
axis.set(xlabel='input', ylabel='output', title=f'{name}, channel {channel}')
axis.legend(ncols=2, title='for the image of a')
figure.savefig('dynamic-relu.png', dpi=80)
