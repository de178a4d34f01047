"""A Hugging Face Hub on the loopback interface: the tests drive the real ``huggingface_hub`` client without internet.

The server keeps its repos in memory and speaks the part of the Hub's protocol that publishing and loading a model
needs: resolving files (ETags, commits, ranges, the redirect of large files to another origin), repo and tree listings,
creating repos, branches and tags, validating a card, and commits of regular and LFS files, as pull requests too. It
refuses with the Hub's own status and error codes, and misbehaves on demand (``Fault``). It offers neither Xet storage
nor multipart uploads.

Access follows ownership, as on the Hub: there is one user with one token, who owns the namespace of that name. In other
namespaces the user may write nothing, sees no private repo and reads no file of a gated one.

``huggingface_hub`` reads its endpoint and cache folder when it is imported, so a client runs in a process of its own:

    with LoopbackHub() as hub:
        hub.add_repo("timm/resnet18.a1_in1k", {"model.safetensors": weights})
        run_python("import timm; timm.create_model('resnet18.a1_in1k', pretrained=True)", hub.env(tmp_path))
"""
from .cards import check_card
from .client import Client, ClientError, run_python
from .faults import Fault
from .hub import LoopbackHub

__all__ = ['Client', 'ClientError', 'Fault', 'LoopbackHub', 'check_card', 'run_python']
