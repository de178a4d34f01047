#!/usr/bin/env python3
"""Initialise a model with LSUV and print what became of it: ``timm-dyacts lsuv`` from a checkout."""
from timm_dyacts.cli.lsuv import main

if __name__ == '__main__':
    main(prog='lsuv.py')
