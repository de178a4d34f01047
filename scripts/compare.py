#!/usr/bin/env python3
"""Find out whether a variant helps on your data: ``timm-dyacts compare``."""
from timm_dyacts.cli.compare import main

if __name__ == '__main__':
    main(prog='compare.py')
