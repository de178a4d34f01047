#!/usr/bin/env python3
"""Train or fine-tune a timm model: the command ``timm-dyacts train``."""
from timm_dyacts.cli.train import main

if __name__ == '__main__':
    main(prog='train.py')
