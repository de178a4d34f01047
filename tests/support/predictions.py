"""What a model says of the digits."""
import timm
import torch

from timm_dyacts.data import create_dataset


@torch.no_grad()
def predict(model):
    """Compute the logits of the digits to test on."""
    dataset = create_dataset('digits')
    dataset.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return model(torch.stack([dataset[i][0] for i in range(len(dataset))]))
