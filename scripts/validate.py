#!/usr/bin/env python3
"""Evaluate models: the command ``timm-dyacts validate``."""
from timm_dyacts.cli.validate import main

if __name__ == '__main__':
    main(prog='validate.py')
