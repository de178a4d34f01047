"""Options files of timm's train.py, in the words of this package.

``args.yaml`` of a run of timm's holds all of its options. Most have the same name and the same meaning here. What this
module lists is the rest: other names, options that change no result, and options that would change it and do not exist
here, which are refused by name unless they are off.
"""
import logging
from collections.abc import Mapping
from typing import Any

__all__ = ['REFUSED', 'UNASKED', 'WITHOUT_EFFECT', 'translate']

_logger = logging.getLogger(__name__)

# Options for which an empty text means that they are not given
_EMPTY = (
    'class_map', 'experiment', 'initial_checkpoint', 'interpolation', 'lr_base_scale', 'output', 'resume',
    'wandb_resume_id',
)
_RENAMED = dict(data='data_dir', kd_model_name='kd_model', native_amp='amp')

# What train.py writes for schedules that are not asked for, and that differs from the defaults here
UNASKED: dict[str, Any] = dict(decay_epochs=90, decay_milestones=(90, 180, 270))

# How a run is watched, kept or sped up, or belongs to a refused option; with the default of train.py, None for those
# that it had once
WITHOUT_EFFECT: dict[str, Any] = dict(
    device_modules=None,
    dist_backend=None,
    dist_url=None,
    kd_student_feature_dim=None,
    kd_teacher_feature_dim=None,
    kd_token_distill_type='soft',
    local_rank=0,
    naflex_loss_scale='linear',
    naflex_max_seq_len=576,
    naflex_patch_size_probs=None,
    naflex_patch_sizes=None,
    naflex_patchify_channels_first=False,
    naflex_train_seq_lens=[128, 256, 576, 784, 1024],
    no_prefetcher=False,
    num_gpu=None,
    pin_mem=False,
    recovery_interval=0,
    save_images=False,
    synchronize_step=False,
    train_batch_sizes=None,
    train_batches_per_epoch=None,
    train_size_probs=None,
    train_size_random_mix=0.1,
    train_size_schedule='constant',
    train_size_schedule_spread=0.65,
    use_multi_epochs_loader=False,
    variable_batch_loss_scale='none',
    worker_seeding='all',
)

# What each does when it is off, and why it is refused when it is on
REFUSED: dict[str, tuple[Any, str]] = dict(
    amp_impl=('native', 'obsolete: Apex is not needed for mixed precision'),
    apex_amp=(False, 'obsolete: Apex is not needed for mixed precision, which is amp'),
    bn_tf=(False, 'obsolete: a model whose name begins with tf_ has it'),
    dataset_trust_remote_code=(False, 'code of a data set is not run'),
    drop_connect=(None, "obsolete: timm's train.py does not read it any more, and drop_path is what it was"),
    epoch_repeats=(0, 'an epoch is one pass'),
    fast_norm=(False, 'unknown here'),
    fuser=('', 'obsolete: for TorchScript; torchcompile fuses'),
    kd_distill_type=('logit', 'teachers are followed by their logits'),
    kd_loss_type=('kl', 'teachers are followed by KL divergence'),
    model_dtype=(None, 'weights are float32; amp is mixed precision'),
    naflex_loader=(False, 'images have one size'),
    no_ddp_bb=(False, 'unknown here'),
    no_resume_opt=(False, 'a run is resumed with its optimizer; initial_checkpoint takes over the weights alone'),
    start_epoch=(None, 'a resumed run knows its epoch'),
    torchscript=(False, 'obsolete: torchcompile takes its place'),
    train_img_sizes=(None, 'images have one size'),
    tta=(0, "timm's train.py takes the mean over different images: none of its loaders gives several views of one"),
)


def translate(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options of a file as ``TrainConfig`` has them.

    Args:
        values: Options by name, from YAML. Names that neither timm nor ``TrainConfig`` has are left for the caller.
        known: What ``TrainConfig`` declares, by name. What it has is no longer looked for in the lists above.

    Raises:
        ValueError: Options that would change the result, and that there are none of here.
    """
    translated = {name: value for name, value in values.items() if not (name in _EMPTY and value == '')}
    on_updates = translated.pop('sched_on_updates', None)
    if on_updates is not None:
        translated.setdefault('sched_on_epochs', not on_updates)
    for old, new in _RENAMED.items():
        value = translated.pop(old, None)
        if value and not translated.get(new):
            translated[new] = value
    left_out, refused = [], []
    for name in [name for name in translated if name not in known]:
        if name in WITHOUT_EFFECT:
            if translated.pop(name) != WITHOUT_EFFECT[name]:
                left_out.append(name)
        elif name in REFUSED:
            off, reason = REFUSED[name]
            value = translated.pop(name)
            if value != off and value not in (None, False, ''):
                refused.append(f'{name} {value} ({reason})')
    if refused:
        raise ValueError(f"these options of timm's train.py would change the result: {'; '.join(refused)}.")
    if left_out:
        _logger.warning("Options of timm's train.py that change no result are left out: %s.", ', '.join(left_out))
    return translated
