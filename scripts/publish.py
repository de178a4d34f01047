#!/usr/bin/env python3
"""``timm-dyacts publish`` from a checkout: publish a run on the Hugging Face Hub."""
from timm_dyacts.cli.publish import main

if __name__ == '__main__':
    main(prog='publish.py')
